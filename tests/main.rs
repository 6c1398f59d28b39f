//! End-to-end tests: the real binary on real input, offline.

mod bad_checkpoint;
mod bad_input;
mod checkpoints;
mod harness;
mod matrix;
mod verify;
