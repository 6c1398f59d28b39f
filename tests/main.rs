//! End-to-end tests: the real binary on real input, offline.

mod bad_input;
mod generate;
mod harness;
mod hub;
mod hub_server;
mod inputs;
mod matrix;
mod publish;
mod requantize;
mod verify;
