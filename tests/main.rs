//! End-to-end tests: the real binary on real input, offline.

mod bad_checkpoint;
mod bad_input;
mod budget;
mod card;
mod checkpoints;
mod dtype;
mod generate;
mod harness;
mod hub;
mod hub_cache;
mod hub_connection;
mod hub_refusals;
mod hub_server;
mod hub_settings;
mod inputs;
mod inspect;
mod logs;
mod matrix;
mod methods;
mod numerics;
mod publish;
mod report;
mod requantize;
mod resume;
mod stop;
mod verify;
