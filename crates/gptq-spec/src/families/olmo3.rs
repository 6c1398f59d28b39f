//! OLMo 3: OLMo 2's block, three of four over a sliding window; only the others' frequencies are stretched.

use super::family::{Family, Rotary};
use super::olmo2;
use super::sliding_window::SlidingWindow;

pub(super) const FAMILY: Family = Family {
    model_type: "olmo3",
    defaults: &[("max_position_embeddings", 2048), ("sliding_window", 4096)],
    rotary: Rotary {
        theta: 500_000.0,
        sliding: Some(("rope_theta", 500_000.0)),
        ..Rotary::PLAIN
    },
    sliding_window: SlidingWindow::Pattern {
        key: None,
        every: 4,
        null_is_off: false,
    },
    llama_cpp: None,
    ..olmo2::FAMILY
};
