//! The decoder forward of Llama-family models in Burn, generic over the backend, one block resident
//! at a time and open between its linears.
//!
//! Reading order: [`ModelConfig`] reads `config.json` and has the [`BlockSpec`] of each block, which its
//! family describes; [`ModelTensor`]s are the tensors that it asks for, and [`Census`] compares them with a
//! checkpoint; [`Block`] runs a block from tap to tap over a [`Flow`] of hidden states; [`HostBlock`] is a
//! block read ahead; [`Model`] loads the parts from a checkpoint, dense or quantized; [`Decoder`] holds all of
//! them and a [`Cache`] per block to predict token after token.

#![forbid(unsafe_code)]

mod block;
mod block_builder;
mod cache;
mod census;
mod config;
mod decoder;
mod error;
mod families;
mod host_block;
mod inventory;
mod keys;
mod model;
mod rope;
mod rope_scaling;
mod spec;

pub use block::{Block, Flow, Linear, Seen, Weight};
pub use block_builder::BlockBuilder;
pub use cache::Cache;
pub use census::Census;
pub use config::ModelConfig;
pub use decoder::Decoder;
pub use error::ModelError;
pub use host_block::HostBlock;
pub use inventory::{ModelTensor, Role};
pub use model::{Head, Model};
pub use rope_scaling::{RopeScaling, spell_out_rotary};
pub use spec::{Attention, BlockSpec, Division, LinearSpec, Op, Register, Rope, VectorSpec};
