//! Llama: biases by `attention_bias` and `mlp_bias`.

use super::family::Family;

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    defaults: &[("max_position_embeddings", 2048)],
    ..Family::PLAIN
};
