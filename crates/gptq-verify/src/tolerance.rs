//! Tolerances for the distance of a branch from its dense model, and advice on reducing it.
//!
//! The baseline is the dense model rounded to nearest with the same bits and groups, layer by
//! layer, on the same text. GPTQ loses less than that; a branch that loses clearly more is broken,
//! however much its bits lose on this model. Where rounding to nearest destroys a model, as 2 bits
//! do, the mean bits per weight set the limit.

use gptq_format::{Bits, GroupSize, QuantizeConfig};
use gptq_plan::{BlockError, Check, NearestRounding, Receipt, Tolerances};

use crate::compare::{DenseComparison, Nearest};
use crate::recorded::Recorded;
use crate::weights::Strange;

/// Allowed loss relative to round-to-nearest, plus an absolute allowance for noise where the loss
/// is close to zero.
const FACTOR: f64 = 1.25;
const NOISE: f64 = 0.02;
/// The same for the error of a single block.
const BLOCK_FACTOR: f64 = 2.0;
const BLOCK_NOISE: f64 = 0.002;
/// Upper limit of a block's error: a block with an error of 1 might as well be left out.
const BLOCK_MOST: f64 = 0.9;

/// Tolerances given by the user, each overriding its default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs, reason = "the names are those of the tolerances")]
pub struct Asked {
    pub perplexity_increase: Option<f64>,
    pub kl_divergence: Option<f64>,
    pub top1_agreement: Option<f64>,
    pub block_error: Option<f64>,
}

/// Absolute limits by bits per weight: nats per token, and share of tokens, independent of the
/// baseline.
struct LossLimit {
    bits: f64,
    nats: f64,
    disagreement: f64,
}

const MOST: [LossLimit; 4] = [
    most(2.0, 1.8, 0.8),
    most(3.0, 1.0, 0.6),
    most(4.0, 0.5, 0.4),
    most(8.0, 0.1, 0.2),
];

const fn most(bits: f64, nats: f64, disagreement: f64) -> LossLimit {
    LossLimit {
        bits,
        nats,
        disagreement,
    }
}

impl LossLimit {
    /// Interpolates between the table's rows.
    fn at(bits: f64) -> LossLimit {
        let mut rows = MOST.windows(2).filter_map(|pair| match pair {
            [low, high] => Some((low, high)),
            _ => None,
        });
        let [first, .., last] = MOST;
        let between = rows.find(|(low, high)| (low.bits..high.bits).contains(&bits));
        match between {
            Some((low, high)) => {
                let part = (bits - low.bits) / (high.bits - low.bits);
                let mix = |low: f64, high: f64| low + part * (high - low);
                most(
                    bits,
                    mix(low.nats, high.nats),
                    mix(low.disagreement, high.disagreement),
                )
            }
            None if bits < first.bits => first,
            None => last,
        }
    }
}

/// Returns the tolerances that were asked for, and for the others what a branch of `bits` per weight is to keep
/// beside its rounding to nearest. The block error is the most that any block may have.
fn tolerances(asked: Asked, bits: f64, nearest: Option<&Nearest>) -> Tolerances {
    let most = LossLimit::at(bits);
    // Rounding to nearest may give numbers that are not finite.
    let beside = |lost: Option<f64>, most: f64| match lost.filter(|lost| lost.is_finite()) {
        Some(lost) => most.min(NOISE + FACTOR * lost.max(0.0)),
        None => most,
    };
    let nats = beside(nearest.map(|n| n.loss - n.dense_loss), most.nats);
    let divergence = beside(nearest.map(|n| n.kl_divergence), most.nats);
    let disagreement = beside(nearest.map(|n| 1.0 - n.top1_agreement), most.disagreement);
    Tolerances {
        perplexity_increase: asked.perplexity_increase.unwrap_or(nats.exp_m1()),
        kl_divergence: asked.kl_divergence.unwrap_or(divergence),
        top1_agreement: asked.top1_agreement.unwrap_or(1.0 - disagreement),
        block_error: asked.block_error.unwrap_or(BLOCK_MOST),
    }
}

/// Checks the measurements against the dense model, and records them.
pub(crate) fn judge(receipt: &mut Receipt, loss: f64, compared: DenseComparison, asked: Asked) {
    let mut allowed = tolerances(asked, compared.bits, compared.nearest.as_ref());
    let nearest = compared.nearest.as_ref().map(rounding);
    let increase = (loss - compared.loss).exp_m1();
    let percent = |fraction: f64| format!("{:+.2} %", 100.0 * fraction);
    let beside = |value: Option<String>| match value {
        Some(value) => format!(", rounded to nearest {value}"),
        None => String::new(),
    };
    let of = |value: fn(&NearestRounding) -> Option<f64>| nearest.as_ref().and_then(value);
    receipt.checks.extend([
        Check::new(
            "perplexity",
            increase <= allowed.perplexity_increase,
            format!(
                "{:.4}, dense {:.4}: {}{}, tolerated {}",
                loss.exp(),
                compared.loss.exp(),
                percent(increase),
                beside(of(|n| n.perplexity_increase).map(percent)),
                percent(allowed.perplexity_increase)
            ),
        ),
        Check::new(
            "KL divergence",
            compared.kl_divergence <= allowed.kl_divergence,
            format!(
                "{:.5}{}, tolerated {:.5}",
                compared.kl_divergence,
                beside(of(|n| n.kl_divergence).map(|kl| format!("{kl:.5}"))),
                allowed.kl_divergence
            ),
        ),
        Check::new(
            "top-1 agreement",
            compared.top1_agreement >= allowed.top1_agreement,
            format!(
                "{:.4}{}, at least {:.4}",
                compared.top1_agreement,
                beside(of(|n| Some(n.top1_agreement)).map(|share| format!("{share:.4}"))),
                allowed.top1_agreement
            ),
        ),
    ]);
    let worst = worst(&compared.blocks, asked.block_error);
    allowed.block_error = worst.tolerated;
    receipt.checks.push(worst.check);
    receipt.checks.extend(scales(&compared.strange));
    receipt.tolerances = allowed;
    receipt.nearest = nearest;
    receipt.kl_divergence = Some(compared.kl_divergence).filter(|kl| kl.is_finite());
    receipt.top1_agreement = Some(compared.top1_agreement);
    receipt.blocks = compared.blocks;
}

fn rounding(nearest: &Nearest) -> NearestRounding {
    let finite = |value: f64| Some(value).filter(|value| value.is_finite());
    NearestRounding {
        tokens: nearest.tokens,
        perplexity_increase: finite((nearest.loss - nearest.dense_loss).exp_m1()),
        kl_divergence: finite(nearest.kl_divergence),
        top1_agreement: nearest.top1_agreement,
    }
}

/// The block with the worst error relative to its tolerance.
struct Worst {
    check: Check,
    tolerated: f64,
}

fn worst(blocks: &[BlockError], asked: Option<f64>) -> Worst {
    let tolerated = |block: &BlockError| {
        let own = (block.nearest_error).map(|e| BLOCK_MOST.min(BLOCK_NOISE + BLOCK_FACTOR * e));
        asked.or(own).unwrap_or(BLOCK_MOST)
    };
    let broken = blocks
        .iter()
        .find(|b| b.relative_error.is_none() && !b.does_nothing());
    if let Some(block) = broken {
        let reason = block.reason.as_deref().unwrap_or_default();
        return Worst {
            check: Check::new("blocks", false, format!("block {}: {reason}", block.layer)),
            tolerated: tolerated(block),
        };
    }
    let judged = blocks
        .iter()
        .filter_map(|block| Some((block, block.relative_error?)));
    let share = |block: &BlockError, error: f64| error / tolerated(block).max(f64::MIN_POSITIVE);
    let worst = judged.max_by(|a, b| share(a.0, a.1).total_cmp(&share(b.0, b.1)));
    let Some((block, error)) = worst else {
        return Worst {
            check: Check::new(
                "blocks",
                true,
                "every block of the dense model leaves its input unchanged".into(),
            ),
            tolerated: asked.unwrap_or(BLOCK_MOST),
        };
    };
    let tolerated = tolerated(block);
    let beside = match block.nearest_error {
        Some(nearest) => format!(", rounded to nearest {nearest:.3e}"),
        None => String::new(),
    };
    let detail = format!(
        "largest relative error compared with its tolerance: {error:.3e} in block {}{beside}, tolerated {tolerated:.3e}",
        block.layer
    );
    Worst {
        check: Check::new("blocks", error <= tolerated, detail),
        tolerated,
    }
}

/// Checks that every group's scale matches its dense weights.
fn scales(strange: &[Strange]) -> Option<Check> {
    let first = strange.first()?;
    let groups: usize = strange.iter().map(|s| s.groups).sum();
    let detail = format!(
        "{}: group {} of output {} is {:.2} times its dense weights; the median is {:.2}{}",
        first.module,
        first.group,
        first.output,
        first.gain,
        first.usual,
        match groups {
            1 => String::new(),
            n => format!("; {n} such groups in {} linear layers", strange.len()),
        }
    );
    Some(Check::new("scales", false, detail))
}

/// Says where the loss is largest and how to reduce it; `None` if the loss is small.
pub(crate) fn advice(
    receipt: &Receipt,
    config: Option<&QuantizeConfig>,
    recorded: &Recorded,
) -> Option<String> {
    /// Perplexity increase over the dense model from which advice is given.
    const MUCH: f64 = 0.05;
    let measured = receipt.perplexity.as_ref()?;
    let increase = measured.value / measured.dense? - 1.0;
    let config = config?;
    let failed = ["perplexity", "KL divergence", "top-1 agreement", "blocks"];
    let failed = (receipt.checks.iter()).any(|c| !c.pass && failed.contains(&c.name.as_str()));
    if increase < MUCH && !failed {
        return None;
    }
    let mut blocks: Vec<(usize, f64)> = (receipt.blocks.iter())
        .filter_map(|block| Some((block.layer, block.relative_error?)))
        .collect();
    blocks.sort_by(|a, b| b.1.total_cmp(&a.1));
    let (top, rest) = blocks.split_at(blocks.len().min(3));
    let list = |numbers: Vec<String>| match numbers.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    };
    let layers = list(top.iter().map(|(layer, _)| layer.to_string()).collect());
    let errors = list(top.iter().map(|(_, error)| format!("{error:.3}")).collect());
    let others = match rest.len() {
        0 => String::new(),
        n => {
            let mean = rest.iter().map(|(_, error)| error).sum::<f64>() / n as f64;
            format!("; the mean of the other {n} is {mean:.3}")
        }
    };
    Some(format!(
        "perplexity changes by {:+.1} %; the largest errors are in blocks {layers} ({errors}{others}); to reduce them, try \
         {}",
        100.0 * increase,
        list(remedies(config, recorded)).replace(" and ", " or "),
    ))
}

/// Lists remedies, from free ones to those that increase the size.
fn remedies(config: &QuantizeConfig, recorded: &Recorded) -> Vec<String> {
    /// Number of calibration tokens above which more gain little.
    const ENOUGH: usize = 100_000;
    let mut remedies = Vec::new();
    if recorded.preset.as_deref() != Some("best") {
        remedies.push("preset = \"best\"".to_owned());
    }
    if let Some(tokens) = recorded.calibration_tokens.filter(|&n| n < ENOUGH) {
        remedies.push(format!("more calibration text than {tokens} tokens"));
    }
    match config.group_size {
        GroupSize::Columns(n) if n <= 32 => {}
        GroupSize::Columns(n) if n <= 64 => remedies.push("groups of 32".to_owned()),
        _ => remedies.push("groups of 64 or 32".to_owned()),
    }
    match config.bits {
        Bits::Two => remedies.push("3 or 4 bits".to_owned()),
        Bits::Three => remedies.push("4 bits".to_owned()),
        Bits::Four => remedies.push("8 bits".to_owned()),
        Bits::Eight => {}
    }
    if remedies.is_empty() {
        remedies.push("leaving these blocks unquantized".to_owned());
    }
    remedies
}
