//! A model as data, made from its `config.json`: no tensors, no devices.
//!
//! Reading order: [`ModelConfig`] reads `config.json` and has the [`BlockSpec`] of each block, which its
//! family describes; [`ModelTensor`]s are the tensors that it asks for, and [`Census`] compares them with a
//! checkpoint. Running the blocks is `gptq-model`'s.

#![forbid(unsafe_code)]

mod block_builder;
mod census;
mod config;
mod error;
mod experts;
mod families;
mod gguf_layout;
mod gguf_model;
mod inventory;
mod keys;
mod llama_cpp;
mod ops;
mod register;
mod rope_scaling;
mod rotary;
mod shapes;
mod spec;

pub use block_builder::BlockBuilder;
pub use census::Census;
pub use config::ModelConfig;
pub use error::SpecError;
pub use experts::{MatrixSpec, Route, Routing, Scoring};
pub use families::{Ends, Naming, model_types};
pub use gguf_layout::{GgufLayout, GgufPart, TableType};
pub use gguf_model::{GgufEntry, GgufModel};
pub use inventory::{ModelTensor, Role};
pub(crate) use llama_cpp::LlamaCpp;
pub use ops::{Activation, Attending, Attention, Norm, NormKind, Op, Rope};
pub use register::Register;
pub use rope_scaling::RopeScaling;
pub use rotary::spell_out_rotary;
pub use spec::{BlockSpec, Division, LinearSpec, Tap, VectorSpec};
