//! One sentence about a branch, chosen by its settings.

use gptq_format::{Bits, GroupSize};
use gptq_plan::Preset;

use crate::Branch;

/// Describes a branch for its row in the card.
pub(crate) fn description(branch: &Branch) -> String {
    let config = &branch.report.quantize_config;
    let groups = match config.group_size {
        GroupSize::Row => "one scale per row".to_owned(),
        GroupSize::Columns(n) => format!("groups of {n}"),
    };
    let order = branch.report.order();
    let preset = match branch.report.preset {
        preset if preset == Preset::default() => String::new(),
        other => format!(", preset {}", other.name()),
    };
    let sentence = match (config.bits, config.group_size) {
        (Bits::Two, _) => {
            "The smallest files, with a clear loss of quality; only if nothing else fits."
        }
        (Bits::Three, GroupSize::Columns(..=64)) => {
            "If 4 bits do not fit in memory; smaller groups recover some quality."
        }
        (Bits::Three, _) => "If 4 bits do not fit in memory, at a visible loss of quality.",
        (Bits::Four, GroupSize::Row) => "The least memory and the lowest accuracy at 4 bits.",
        (Bits::Four, GroupSize::Columns(..=32)) => {
            "The highest accuracy and the most memory at 4 bits."
        }
        (Bits::Four, GroupSize::Columns(..=64)) => {
            "More accurate than larger groups, for a little more memory."
        }
        (Bits::Four, _) => "The usual balance of memory, speed and quality.",
        (Bits::Eight, GroupSize::Columns(..=32)) => {
            "The closest to the unquantized model, for the most memory."
        }
        (Bits::Eight, GroupSize::Columns(_)) => {
            "Almost indistinguishable from the unquantized model, at about half its size."
        }
        (Bits::Eight, GroupSize::Row) => {
            "Close to the unquantized model, in the least memory at 8 bits."
        }
    };
    // With one group per row the order has no effect on loading.
    let scattered = config.desc_act && !config.static_groups && config.group_size != GroupSize::Row;
    let ordered = match scattered {
        true => " Not for clients without act order (vLLM, AutoRound).",
        false => "",
    };
    if branch.mixed() {
        let why = match branch.report.budget {
            Some(_) => {
                "Each linear layer has the bits and groups that reduce the model's error most for their size."
            }
            None => "Some linear layers have their own bits or groups.",
        };
        let bits = branch.bits_per_weight().unwrap_or_default();
        return format!("{bits:.2} bits per weight, {order}{preset}. {why}{ordered}");
    }
    format!(
        "{}-bit, {groups}, {order}{preset}. {sentence}{ordered}",
        config.bits
    )
}
