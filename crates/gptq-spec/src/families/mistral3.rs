//! Mistral 3: Mistral with a vision tower around it, of which only the language model is run.

use super::family::{Family, Inside, Naming};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral3",
    tied: true,
    inside: Some(Inside {
        key: "text_config",
        model_type: "mistral",
    }),
    naming: NAMING,
    carried: CARRIED,
    refused: &["layer_types"],
    ..Family::PLAIN
};

/// Names as published, and as Transformers 5 has them in memory.
pub(super) const NAMING: &[Naming] = &[
    Naming {
        stem: "language_model.model.",
        head: "language_model.lm_head.weight",
    },
    Naming {
        stem: "model.language_model.",
        head: "lm_head.weight",
    },
];

/// Prefixes of the names of the vision tower's and the projector's tensors.
pub(super) const CARRIED: &[&str] = &[
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
];
