//! The decoder forward of Llama-family models in Burn, generic over the backend, one block resident
//! at a time and open between its linears.
//!
//! Reading order: [`ModelConfig`] reads `config.json`; [`Projection`] and [`Stage`] name a block's
//! linears and the four points where they take their input; [`Block`] runs one stage at a time over
//! a [`Flow`] of hidden states; [`HostBlock`] is a block read ahead; [`Model`] loads the parts from a checkpoint,
//! dense or quantised; [`Decoder`] holds all of them and a [`Cache`] per block to predict token after token.

#![forbid(unsafe_code)]

mod block;
mod cache;
mod config;
mod decoder;
mod error;
mod host_block;
mod layout;
mod model;
mod rope;
mod rope_scaling;

pub use block::{Block, Flow, Linear, Weight};
pub use cache::Cache;
pub use config::ModelConfig;
pub use decoder::Decoder;
pub use error::ModelError;
pub use host_block::HostBlock;
pub use layout::{Projection, Stage};
pub use model::{Head, Model};
pub use rope_scaling::RopeScaling;
