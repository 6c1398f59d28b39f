//! One sentence about a branch, chosen by its settings.

use gptq_format::{Bits, GroupSize};

use crate::Branch;

/// What to expect of a branch, for its row in the card.
pub(crate) fn description(branch: &Branch) -> String {
    let config = &branch.report.quantize_config;
    let groups = match config.group_size {
        GroupSize::Row => "one scale per row".to_owned(),
        GroupSize::Columns(n) => format!("groups of {n}"),
    };
    let order = branch.report.order();
    let preset = match branch.report.preset.name() {
        "standard" => String::new(),
        other => format!(", preset {other}"),
    };
    let sentence = match (config.bits, config.group_size) {
        (Bits::Two, _) => {
            "The smallest files; only where nothing else fits, quality suffers plainly."
        }
        (Bits::Three, GroupSize::Columns(..=64)) => {
            "For memory that does not hold 4 bits; finer groups win some quality back."
        }
        (Bits::Three, _) => "For memory that does not hold 4 bits, at a visible loss of quality.",
        (Bits::Four, GroupSize::Row) => {
            "The least memory at 4 bits, and the least accurate of them."
        }
        (Bits::Four, GroupSize::Columns(..=32)) => {
            "The most accurate at 4 bits, for the most memory of them."
        }
        (Bits::Four, GroupSize::Columns(..=64)) => {
            "More accurate than coarser groups, for a little more memory."
        }
        (Bits::Four, _) => "The usual balance of memory, speed and quality.",
        (Bits::Eight, GroupSize::Columns(..=32)) => {
            "The closest to the unquantized model, for the most memory."
        }
        (Bits::Eight, GroupSize::Columns(_)) => {
            "Hardly told apart from the unquantized model, at about half its size."
        }
        (Bits::Eight, GroupSize::Row) => {
            "Close to the unquantized model, in the least memory that 8 bits take."
        }
    };
    // With one group per row there is no order to it.
    let scattered = config.desc_act && !config.static_groups && config.group_size != GroupSize::Row;
    let ordered = match scattered {
        true => " Not for clients without act order (vLLM, AutoRound).",
        false => "",
    };
    if branch.mixed() {
        let why = match branch.report.budget {
            Some(_) => {
                "Each linear has the bits and groups that lower the model's error most for their size."
            }
            None => "Some linears have their own bits or groups.",
        };
        let bits = branch.bits_per_weight().unwrap_or_default();
        return format!("{bits:.2} bits per weight, {order}{preset}. {why}{ordered}");
    }
    format!(
        "{}-bit, {groups}, {order}{preset}. {sentence}{ordered}",
        config.bits
    )
}
