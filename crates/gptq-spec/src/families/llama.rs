//! Llama: biases by `attention_bias` and `mlp_bias`.

use super::family::Family;
use crate::LlamaCpp;

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    defaults: &[("max_position_embeddings", 2048)],
    llama_cpp: Some(LlamaCpp {
        architecture: "llama",
        paired: true,
        ..LlamaCpp::PLAIN
    }),
    ..Family::PLAIN
};
