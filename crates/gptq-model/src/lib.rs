//! The decoder forward pass in Burn, generic over the backend, with one block resident at a time that can be
//! stopped between its linear layers.
//!
//! Reading order: [`Block`] runs a block from tap to tap over a [`Flow`] of hidden states, as its
//! [`BlockSpec`](gptq_spec::BlockSpec) says; [`HostBlock`] is a block read ahead; the experts of a mixture are in `experts.rs`; [`Model`] loads the parts from a
//! checkpoint, dense or quantized; [`Block::forward_stretches`] runs texts
//! that share their beginnings; [`Block::weight_gradients`] goes through a block in reverse; [`Decoder`] holds all of them with a [`Cache`] per block for generation.

#![forbid(unsafe_code)]

mod attend;
mod backward;
mod block;
mod cache;
mod decoder;
mod error;
mod expert_inputs;
mod experts;
mod flow;
mod head;
mod host_block;
mod linear;
mod model;
mod rope;
mod step;
mod stretches;

pub use block::{Block, Seen};
pub use cache::Cache;
pub use decoder::Decoder;
pub use error::ModelError;
pub use expert_inputs::ExpertInputs;
pub use experts::ExpertOutputs;
pub use flow::Flow;
pub use head::Head;
pub use host_block::HostBlock;
pub use linear::{Linear, Weight};
pub use model::Model;
pub use stretches::{Stretch, StretchLayout};
