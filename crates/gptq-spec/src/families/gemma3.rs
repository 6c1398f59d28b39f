//! Gemma 3: Gemma 2's block with norms over each head's queries and keys in place of bounds; five of six are over a
//! sliding window and rotate by a base of their own. Alone, and with a vision tower around it that is not run.

use super::family::{Family, Inside, Rotary};
use super::sliding_window::SlidingWindow;
use super::{gemma2, mistral3};
use crate::LlamaCpp;
use crate::llama_cpp::SlidingBlocks;

pub(super) const TEXT: Family = Family {
    model_type: "gemma3_text",
    defaults: &[
        ("max_position_embeddings", 131_072),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("sliding_window", 4096),
    ],
    rotary: Rotary {
        theta: 1e6,
        sliding: Some(("rope_local_base_freq", 1e4)),
        ..Rotary::PLAIN
    },
    sliding_window: SlidingWindow::Pattern {
        key: Some("sliding_window_pattern"),
        every: 6,
        null_is_off: false,
    },
    wide: true,
    refused: &["attn_logit_softcapping"],
    llama_cpp: Some(LlamaCpp {
        architecture: "gemma3",
        windows: SlidingBlocks::AllBut(6),
        embedding_root: true,
        wide_scores_at: Some(62),
        ..LlamaCpp::PLAIN
    }),
    ends: |config, keys| gemma2::ends(config, keys, None),
    block: |config, keys, layer| gemma2::block(config, keys, layer, None, true),
    ..gemma2::FAMILY
};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma3",
    tied: true,
    inside: Some(Inside {
        key: "text_config",
        model_type: "gemma3_text",
    }),
    naming: mistral3::NAMING,
    carried: mistral3::CARRIED,
    refused: &["final_logit_softcapping"],
    ..Family::PLAIN
};
