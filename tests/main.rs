//! End-to-end tests: the real binary on real input, offline.

mod bad_checkpoint;
mod bad_input;
mod card;
mod checkpoints;
mod generate;
mod harness;
mod inspect;
mod matrix;
mod report;
mod verify;
