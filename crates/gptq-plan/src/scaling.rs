//! A run that several ranks share, from shapes alone: memory of each, bytes between them, and time relative to one.
//!
//! For `b` branches and blocks of taps with `n` inputs and linears `[out, n]`, on `T` tokens, one rank takes
//!
//! ```text
//! t_1 = Σ_blocks b (2 T Σ out n / forward + T Σ n² / Gram + Σ out n² / sweep + Σ n³ / factor)
//! ```
//!
//! at measured rates, and of `N` ranks, each with a machine of its own, the slowest
//!
//! ```text
//! t_N = Σ_blocks b ((forward + Gram + sweep) / N + factor) + bytes of rank 0 / network
//! ```
//!
//! as every rank factors the Gram matrices. What is not in it: the dense model beside branches that correct mismatch, of
//! which forward and Gram are shared alike; tuning, which rank 0 does alone; the start.

use gptq_spec::BlockSpec;

use crate::{Memory, Plan, Propagation};

/// Operations a second of the CPU engine, as the module has them: forward, Gram, sweep, factor. From the times by phase
/// of one run (`kernels/README.md`); their ratios matter here.
const RATES: [f64; 4] = [3.6e10, 1.6e11, 7.4e8, 8.9e9];
/// Bytes a second between hosts: 10 Gbit/s.
const NETWORK: f64 = 1.25e9;

/// A run on several ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Peak memory of each rank.
    pub memory: Memory,
    /// Bytes that rank 0 exchanges with all others together.
    pub exchanged: u64,
    /// Time relative to one rank's.
    pub time: f64,
}

/// Operations and bytes of a block in one branch.
#[derive(Clone, Copy, Debug, Default)]
struct BlockWork {
    /// Operations, in the order of [`RATES`].
    operations: [f64; 4],
    /// Sums of Gram matrices, and those of mismatch correction.
    summed: [f64; 2],
    /// Codes of all rows, and what rank 0 needs besides.
    codes: [f64; 2],
}

impl BlockWork {
    fn of(block: &BlockSpec, tokens: f64, hidden: f64) -> BlockWork {
        let mut work = BlockWork::default();
        for tap in block.taps() {
            let (n, inputs) = (block.in_features(tap) as f64, block.inputs(tap) as f64);
            let experts = block.experts_at(tap).map(|it| it.how);
            // Of experts, the tokens that each is chosen for.
            let given =
                experts.map_or(tokens, |how| tokens * how.top_k as f64 / how.experts as f64);
            for linear in &block.linears()[block.linears_of(tap)] {
                let (_, out) = linear.shape();
                let out = out as f64;
                work.operations[0] += 2.0 * given * out * n;
                work.operations[2] += out * n * n;
                work.codes[0] += out * n;
                work.codes[1] += 4.0 * out * n;
            }
            work.operations[1] += inputs * given * n * n;
            work.operations[3] += inputs * n * n * n;
            let half = inputs * n * n / 2.0 * 4.0;
            work.summed[0] += half;
            work.summed[1] += 3.0 * half + inputs * hidden * n * 4.0;
        }
        work
    }
}

impl Scaling {
    /// Reckons with `ranks` ranks of the CPU engine.
    pub fn of(plan: &Plan, ranks: usize) -> Scaling {
        let (tokens, hidden) = (plan.tokens() as f64, plan.config.hidden_size as f64);
        let streams = match plan.propagation {
            Propagation::Quantized => plan.branches.len() as f64,
            Propagation::Dense => 1.0,
        };
        let corrects = plan
            .branches
            .iter()
            .filter(|it| it.method.corrects_mismatch());
        let (branches, corrects) = (plan.branches.len() as f64, corrects.count() as f64);
        let (n, others) = (ranks as f64, ranks as f64 - 1.0);
        let (mut one, mut all, mut exchanged) = (0.0, 0.0, 0.0);
        for block in plan.config.blocks() {
            let work = BlockWork::of(block, tokens, hidden);
            let [forward, gram, sweep, factor] =
                [0, 1, 2, 3].map(|at| work.operations[at] / RATES[at]);
            let shared = streams * (forward + gram) + branches * sweep;
            let time = |ranks: f64| shared / ranks + branches * factor;
            one += time(1.0);
            all += time(n);
            // Sums and codes go both ways; what rank 0 needs besides comes from the others.
            let sums = 2.0 * (streams * work.summed[0] + corrects * work.summed[1]);
            let [codes, besides] = work.codes;
            exchanged += others * (sums + branches * (codes + (codes + besides) / n));
        }
        Scaling {
            memory: Memory::of_ranks(plan, ranks),
            exchanged: exchanged as u64,
            time: (all + exchanged / NETWORK) / one,
        }
    }
}

#[cfg(test)]
mod tests {
    use gptq_spec::ModelConfig;
    use serde_json::json;

    use super::*;
    use crate::Recipe;

    fn plan() -> Plan {
        let config = json!({
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 32000,
        });
        let text = "[model]\nsource = \"m\"\n[calibration]\nsource = \"rows.json\"\nsamples = 128\nseq_len = 4096\n\
                    [output]\ndir = \"out\"\n[[branch]]\nname = \"a\"\nbits = 4\npreset = \"standard\"\n";
        let recipe = Recipe::parse("r.toml".as_ref(), text.to_owned()).unwrap();
        Plan::for_config(&recipe, ModelConfig::from_json(config).unwrap()).unwrap()
    }

    #[test]
    fn one_rank_is_one_and_more_ranks_take_less_time_and_memory_and_exchange_more() {
        let plan = plan();
        let one = Scaling::of(&plan, 1);
        assert_eq!(
            (one.time, one.exchanged, one.memory),
            (1.0, 0, Memory::of(&plan))
        );
        let mut before = one;
        for ranks in [2, 4, 8] {
            let now = Scaling::of(&plan, ranks);
            assert!(
                now.time < before.time && now.time > 1.0 / ranks as f64,
                "{now:?}"
            );
            assert!(now.memory.cpu < before.memory.cpu, "{now:?}");
            assert!(now.exchanged > before.exchanged, "{now:?}");
            before = now;
        }
    }

    #[test]
    fn the_bytes_of_two_ranks_are_those_of_sums_and_codes() {
        // Three taps of 4096 and one of 11008: halves of Gram matrices in f32, there and back.
        let gram = |n: u64| n * n / 2 * 4;
        let sums = 2 * (3 * gram(4096) + gram(11008));
        let weights = 4 * 4096 * 4096 + 3 * 4096 * 11008;
        let codes = weights + 5 * weights / 2;
        assert_eq!(Scaling::of(&plan(), 2).exchanged, 32 * (sums + codes));
    }
}
