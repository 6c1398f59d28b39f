//! A run that several ranks share, from shapes alone: memory of each, bytes between them, and time relative to one.
//!
//! For `b` branches and blocks of taps with `n` inputs and linears `[out, n]`, on `T` tokens, one rank takes
//!
//! ```text
//! t_1 = start + Σ_blocks b (2 T Σ out n / forward + T Σ n² / Gram + Σ out n² / sweep + Σ n³ / factor)
//! ```
//!
//! at measured rates, and of `N` ranks the slowest
//!
//! ```text
//! t_N = start + Σ_blocks b ((forward + Gram) / N + s sweep + factor) + bytes of rank 0 / link
//! ```
//!
//! as Gram matrices are factored whole. On CPUs, each on a machine of its own, ranks share rows, and `s = 1 / N`; rank 0
//! adds up, at the network's rate. CUDA devices share whole linears of a tap, and `s` is the largest share; sums are exchanged
//! in pairs, `log2 N` times. What is not in it: the dense model beside branches that correct mismatch, of which forward and
//! Gram are shared alike; tuning, which rank 0 does alone.

use gptq_spec::BlockSpec;

use crate::{Chunking, Memory, Plan, Propagation};

/// Kind of device that ranks have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankDevice {
    /// A host's CPU.
    Cpu,
    /// A CUDA device of one host with the others.
    Cuda,
}

/// Rates of an engine: operations and bytes a second.
struct Rates {
    /// Operations of forward, Gram, sweep, factor, as the module has them. Their ratios matter here.
    operations: [f64; 4],
    /// Bytes between ranks, one way.
    link: f64,
    /// Seconds that every rank takes besides.
    start: f64,
}

impl RankDevice {
    /// Rates by the times by phase of one run, and of the link between two (`kernels/README.md`).
    fn rates(self) -> Rates {
        match self {
            RankDevice::Cpu => Rates {
                operations: [3.6e10, 1.6e11, 7.4e8, 8.9e9],
                // 10 Gbit/s.
                link: 1.25e9,
                start: 0.0,
            },
            RankDevice::Cuda => Rates {
                operations: [4.96e14, 5.23e14, 1.59e13, 5.48e13],
                link: 2.6e11,
                start: 2.0,
            },
        }
    }
}

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
    /// Operations, in the order of [`Rates::operations`].
    operations: [f64; 4],
    /// Those of the sweep that the rank with most of them has.
    swept: f64,
    /// Sums of Gram matrices, and those of mismatch correction.
    summed: [f64; 2],
    /// Weights of all linears, in elements.
    weights: f64,
}

impl BlockWork {
    fn of(
        block: &BlockSpec,
        tokens: f64,
        hidden: f64,
        ranks: usize,
        device: RankDevice,
    ) -> BlockWork {
        let mut work = BlockWork::default();
        for tap in block.taps() {
            let (n, inputs) = (block.in_features(tap) as f64, block.inputs(tap) as f64);
            let experts = block.experts_at(tap).map(|it| it.how);
            // Of experts, the tokens that each is chosen for.
            let given =
                experts.map_or(tokens, |how| tokens * how.top_k as f64 / how.experts as f64);
            let mut sweeps = Vec::new();
            let mut rows = 0.0;
            for linear in &block.linears()[block.linears_of(tap)] {
                let (_, out) = linear.shape();
                let out = out as f64;
                work.operations[0] += 2.0 * given * out * n;
                sweeps.push(out * n * n);
                rows += out;
                work.weights += out * n;
            }
            let swept: f64 = sweeps.iter().sum();
            work.operations[2] += swept;
            work.swept += match (device, experts) {
                (RankDevice::Cpu, _) => swept / ranks as f64,
                (RankDevice::Cuda, None) => largest(sweeps, ranks),
                (RankDevice::Cuda, Some(_)) => {
                    let batches = (rows / Chunking::CUDA.rows as f64).ceil().max(1.0);
                    swept * (batches / ranks as f64).ceil() / batches
                }
            };
            work.operations[1] += inputs * given * n * n;
            work.operations[3] += inputs * n * n * n;
            let half = inputs * n * n / 2.0 * 4.0;
            work.summed[0] += half;
            work.summed[1] += 3.0 * half + inputs * hidden * n * 4.0;
        }
        work
    }
}

/// Largest share if work goes to the rank with the least so far, one after the other.
fn largest(work: Vec<f64>, ranks: usize) -> f64 {
    let mut busy = vec![0.0; ranks];
    for work in work {
        let least = busy.iter_mut().min_by(|a, b| f64::total_cmp(a, b));
        *least.expect("there is at least one rank") += work;
    }
    busy.into_iter().fold(0.0, f64::max)
}

impl Scaling {
    /// Reckons with `ranks` ranks, each with a device of this kind.
    pub fn of(plan: &Plan, ranks: usize, device: RankDevice) -> Scaling {
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
        let rates = device.rates();
        let (n, others) = (ranks as f64, ranks as f64 - 1.0);
        let (mut one, mut all, mut exchanged, mut waited) = (rates.start, rates.start, 0.0, 0.0);
        for block in plan.config.blocks() {
            let work = BlockWork::of(block, tokens, hidden, ranks, device);
            let [forward, gram, sweep, factor] =
                [0, 1, 2, 3].map(|at| work.operations[at] / rates.operations[at]);
            one += streams * (forward + gram) + branches * (sweep + factor);
            let swept = work.swept / rates.operations[2];
            all += streams * (forward + gram) / n + branches * (swept + factor);
            let sums = streams * work.summed[0] + corrects * work.summed[1];
            let part = branches * work.weights / n;
            // Bytes that come to rank 0, and that go from it.
            let [comes, goes] = match device {
                // Sums of every rank and the sum; a part's codes with what rank 0 needs besides, and all codes.
                RankDevice::Cpu => [others * (sums + 5.0 * part), others * (sums + n * part)],
                // Sums in pairs; of others' linears weights in 16 bits, codes, and weights rounded to nearest.
                RankDevice::Cuda => {
                    let pairs = n.log2() * sums;
                    [pairs + others * 5.0 * part, pairs + others * 2.0 * part]
                }
            };
            exchanged += comes + goes;
            waited += match device {
                RankDevice::Cpu => comes + goes,
                RankDevice::Cuda => comes.max(goes),
            };
        }
        Scaling {
            memory: Memory::of_ranks(plan, ranks),
            exchanged: exchanged as u64,
            time: (all + waited / rates.link) / one,
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
        let one = Scaling::of(&plan, 1, RankDevice::Cpu);
        assert_eq!(
            (one.time, one.exchanged, one.memory),
            (1.0, 0, Memory::of(&plan))
        );
        let mut before = one;
        for ranks in [2, 4, 8] {
            let now = Scaling::of(&plan, ranks, RankDevice::Cpu);
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
        assert_eq!(
            Scaling::of(&plan(), 2, RankDevice::Cpu).exchanged,
            32 * (sums + codes)
        );
    }

    /// Seconds of the 7B shape on so many CUDA devices, of which one takes 24.4.
    fn seconds(ranks: usize) -> f64 {
        24.4 * Scaling::of(&plan(), ranks, RankDevice::Cuda).time
    }

    #[test]
    fn cuda_devices_share_what_the_measured_phases_of_one_leave_them() {
        // 13.7 forward, 5.5 Gram, 2.3 sweep, 0.9 factor, 2.0 besides.
        let one = Scaling::of(&plan(), 1, RankDevice::Cuda);
        assert_eq!((one.time, one.exchanged), (1.0, 0));
        for (ranks, least, most) in [(2, 13.5, 15.0), (4, 8.5, 10.5), (8, 6.0, 8.5)] {
            let found = seconds(ranks);
            assert!(found > least && found < most, "{ranks}: {found}");
        }
        let ([two, one], of) = ([2, 1], |ranks| {
            Scaling::of(&plan(), ranks, RankDevice::Cuda)
        });
        assert!(of(two).memory.device < of(one).memory.device);
    }

    #[test]
    fn the_largest_share_of_linears_is_that_of_the_busiest_rank() {
        assert_eq!(largest(vec![4.0, 1.0, 1.0], 1), 6.0);
        assert_eq!(largest(vec![4.0, 1.0, 1.0], 2), 4.0);
        assert_eq!(largest(vec![4.0, 4.0, 4.0], 2), 8.0);
        assert_eq!(largest(vec![4.0], 8), 4.0);
    }
}
