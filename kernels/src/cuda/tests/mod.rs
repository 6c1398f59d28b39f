//! Compares the device operations with f64 computations on the host, and the solver with
//! `gptq-solver`.
//!
//! Inputs are seeded; every output buffer is filled with NaN before its kernel runs. Without a
//! CUDA device each test prints that it was skipped and passes.

mod communicator;
mod decoding;
mod divergence;
mod experts;
mod golden;
mod gradients;
mod model;
mod ordering;
mod packed;
mod products;
mod shares;
mod solving;
mod steps;
mod transfers;
mod tuning;
mod variants;
