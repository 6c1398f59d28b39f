//! End-to-end tests: the real binary on real input, offline.

mod bad_input;
mod generate;
mod harness;
mod matrix;
mod verify;
