//! The decoder forward in Burn, generic over the backend, one block resident at a time and open between its
//! linears.
//!
//! Reading order: [`Block`] runs a block from tap to tap over a [`Flow`] of hidden states, as its
//! [`BlockSpec`](gptq_spec::BlockSpec) says; [`HostBlock`] is a block read ahead; [`Model`] loads the parts from a
//! checkpoint, dense or quantized; [`Decoder`] holds all of them and a [`Cache`] per block to predict token
//! after token.

#![forbid(unsafe_code)]

mod block;
mod cache;
mod decoder;
mod error;
mod host_block;
mod model;
mod rope;

pub use block::{Block, Flow, Linear, Seen, Weight};
pub use cache::Cache;
pub use decoder::Decoder;
pub use error::ModelError;
pub use host_block::HostBlock;
pub use model::{Head, Model};
