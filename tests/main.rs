//! End-to-end tests: the real binary on real input, offline.

mod bad_input;
mod card;
mod harness;
mod matrix;
mod report;
mod verify;
