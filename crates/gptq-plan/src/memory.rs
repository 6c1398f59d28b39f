//! Memory of a run, from shapes alone, and the placement of its hidden states.

use gptq_format::TABLE_PIECE;
use gptq_spec::BlockSpec;

use crate::tuning_memory::tuned;
use crate::{Chunking, Plan, PlanError, Propagation};

/// Peak memory in bytes, including the overhead of allocators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Memory on the device of a CUDA run.
    pub device: u64,
    /// Memory on the host of a CUDA run whose device holds all hidden states.
    pub host: u64,
    /// Memory on the host of a CPU run.
    pub cpu: u64,
    /// Peak size of the hidden states, included in `device` and `cpu`: a smaller device keeps them
    /// on the host, a smaller host on disk.
    pub states: u64,
    /// Minimum `--host-memory` of a CUDA run whose device cannot hold the hidden states.
    pub least_host: u64,
    /// Minimum `--host-memory` of a CPU run.
    pub least_cpu: u64,
}

/// Placement of the hidden states of a plan's chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Number of chunks on the device, which come first.
    pub device: usize,
    /// Number of the next chunks, in host memory; the others are on disk.
    pub host: usize,
    /// Size of those on disk.
    pub disk_bytes: u64,
    /// Limit on the bytes of experts' Gram matrices that are alive together.
    pub gram_bytes: u64,
}

impl Places {
    /// Places everything on the device.
    pub const DEVICE: Places = Places {
        device: usize::MAX,
        host: 0,
        disk_bytes: 0,
        gram_bytes: GRAM_BYTES,
    };
}

/// Bytes of experts' Gram matrices that are alive together, if memory is not short: experts are taken in slices.
const GRAM_BYTES: u64 = 8 << 30;

/// Maximum host memory of packed tensors waiting to be written; see `write_behind`.
const QUEUE: u128 = 1 << 30;
/// Device memory of NCCL on a rank that has others, by its defaults: 32 channels with 4 MiB for each of two directions, and
/// as much again for what it keeps besides. Not measured.
const LINK: u128 = 512 << 20;
/// Memory of the program itself: the tokenizer, thread stacks, and with CUDA the driver.
const PROGRAM: u128 = 48 << 20;
const PROGRAM_WITH_CUDA: u128 = 100 << 20;
/// Divisor that gives the share of device memory for overhead of the runtime's pools and the
/// libraries' workspaces.
const SLACK: u128 = 10;

/// Terms of the peaks, in elements. Products of recipe and config values may exceed 64 bits at
/// their limits.
struct Sizes {
    /// Number of ranks that share the windows.
    ranks: u128,
    tokens: u128,
    samples: u128,
    seq_len: u128,
    /// Residuals of every stream and one stream's widest activation, per token.
    states: u128,
    /// All linear layers of the largest block.
    block: u128,
    table: u128,
    /// Features of the widest input of linears, and of the widest that is kept: of experts, the slots of a token.
    widest: u128,
    kept: u128,
    hidden: u128,
    /// Elements of a token's slots in a mixture while it runs or its inputs are summed: inputs, gate, up, and outputs,
    /// in the order of experts and of slots; with mismatch correction the dense model's inputs too.
    slots: u128,
    /// Inputs, rows and number of the experts at each tap that has some.
    experts: Vec<[u128; 3]>,
    /// Bytes of each element of a square matrix and of a linear's rows in the solve of an expert.
    solved: [u128; 2],
    /// Bytes of the Gram matrices of one expert, in one lane, and those of all of a block's, at the tap with the most.
    expert: [u128; 2],
    /// The same of all experts at the other taps of a block with several, together.
    other_experts: u128,
    /// Bytes for comparing outputs with the dense model's, for 2- and 4-byte products: the states
    /// of the compared tokens, a window's inputs and outputs, and the rounded weights of one tap.
    compared: [u128; 2],
    /// Bytes for tuning a block, with 2- and 4-byte activations: parameters and moments of its weights, Gram
    /// matrices of its taps, activations of a step and their gradients, states before the block.
    tuned: [u128; 2],
    /// Number of square matrices of a solve: Gram matrices and factors, and those for refinement or
    /// activation-mismatch correction.
    squares: u128,
    /// Number of those of one lane of windows, while they are summed, in f32.
    lane_squares: u128,
}

impl Sizes {
    fn of(plan: &Plan, ranks: usize) -> Sizes {
        let config = &plan.config;
        let streams = match plan.propagation {
            Propagation::Quantized => plan.branches.len() as u128,
            Propagation::Dense => 1,
        };
        let hidden = config.hidden_size as u128;
        let blocks = config.blocks().iter();
        let inputs = blocks.clone().flat_map(|block| {
            let taps = block.taps();
            taps.map(|tap| block.in_features(tap) as u128)
        });
        let widest = inputs.max().unwrap_or(hidden);
        let registers = blocks.clone().flat_map(|block| {
            let taps = block.taps();
            taps.map(|tap| block.width(block.tap(tap).from) as u128)
        });
        let activation = registers.max().unwrap_or(hidden);
        let expert_taps = || {
            let blocks = config.blocks().iter();
            blocks.flat_map(|block| {
                let taps = block.taps().map(move |tap| (block, tap));
                taps.filter_map(|(block, tap)| Some((block, tap, block.experts_at(tap)?.how)))
            })
        };
        let methods = || plan.branches.iter().map(|branch| branch.method);
        let corrects = u128::from(methods().any(|it| it.corrects_mismatch()));
        let refines = u128::from(methods().any(|it| it.refine > 0));
        let slots = expert_taps().map(|(block, tap, how)| {
            let shape = block.linears()[block.linears_of(tap).start].shape();
            let (n_in, n_out) = (shape.0 as u128, shape.1 as u128);
            how.top_k as u128 * ((2 + 3 * corrects) * n_in + 4 * n_out)
        });
        let slots = slots.max().unwrap_or_default();
        let expert = expert_taps().map(|(block, tap, how)| {
            let own = plan.expert_gram_bytes(block, tap);
            [own, own * how.experts as u128]
        });
        let expert = expert.max_by_key(|own| own[1]).unwrap_or_default();
        let other_experts = blocks.clone().map(|block| {
            let all = block.taps().filter_map(|tap| {
                let experts = block.experts_at(tap)?.how.experts as u128;
                Some(plan.expert_gram_bytes(block, tap) * experts)
            });
            let (sum, most) = all.fold((0, 0), |(sum, most): (u128, u128), one| {
                (sum + one, most.max(one))
            });
            sum - most
        });
        let other_experts = other_experts.max().unwrap_or_default();
        let experts = expert_taps().map(|(block, tap, how)| {
            let linears = &block.linears()[block.linears_of(tap)];
            let rows: usize = linears.iter().map(|linear| linear.shape().1).sum();
            let n = block.in_features(tap) as u128;
            [n, (rows / how.experts) as u128, how.experts as u128]
        });
        let dense = blocks.clone().map(|block| kept(block, hidden)).max();
        let needed = u128::from(plan.needs_dense());
        let dense = needed * dense.unwrap_or_default() / plan.dense_step() as u128;
        let share = plan.share();
        let window = share.tokens as u128;
        let branches = plan.branches.len() as u128;
        let states = (5 + branches) * hidden + 2 * activation;
        let nearest = blocks.clone().flat_map(|block| {
            block.taps().map(|tap| {
                let linears = &block.linears()[block.linears_of(tap)];
                let weights = linears.iter().map(|linear| {
                    let (n_in, n_out) = linear.shape();
                    2 * n_in as u128 * n_out as u128
                });
                weights.sum::<u128>()
            })
        });
        let nearest = nearest.max().unwrap_or_default();
        let compared = |bytes: u128| {
            share.windows as u128 * window * states * 2
                + window * (activation + slots) * (3 * bytes + 3 * 4)
                + nearest * bytes
        };
        let tunes = methods().any(|it| it.tune > 0);
        let tuned = |bytes: u128| match tunes {
            true => tuned(plan, bytes),
            false => 0,
        };
        Sizes {
            compared: [compared(2), compared(4)],
            tuned: [tuned(2), tuned(4)],
            ranks: ranks as u128,
            tokens: plan.tokens() as u128,
            samples: plan.calibration.samples as u128,
            seq_len: plan.calibration.seq_len as u128,
            states: streams * hidden + activation + dense,
            block: blocks
                .map(|block| block.weights())
                .max()
                .unwrap_or_default(),
            table: config.vocabulary as u128 * hidden,
            widest,
            kept: activation,
            hidden,
            slots,
            experts: experts.collect(),
            // A factor in f32 and a correlation matrix in 16 bits, and both of the tokens that the dense model was given
            // too; weights in f32 and codes, the weights that are rounded and their copy.
            solved: [
                6 + 6 * corrects + 4 * refines,
                5 + 8 * corrects + 4 * refines,
            ],
            expert,
            other_experts,
            squares: 4 + 4 * corrects + refines,
            lane_squares: 1 + 3 * corrects,
        }
    }

    /// Returns the tokens of a chunk.
    fn chunk(&self, chunking: Chunking) -> u128 {
        let windows = chunking.windows(self.seq_len as usize) as u128;
        windows.min(self.samples) * self.seq_len
    }

    /// Returns the number of chunks of a rank, at most.
    fn chunks(&self, chunking: Chunking) -> u128 {
        let all = self.tokens.div_ceil(self.chunk(chunking).max(1));
        all.div_ceil(self.ranks)
    }

    /// Returns the bytes of one chunk's hidden states.
    fn chunk_states(&self, chunking: Chunking) -> u128 {
        self.chunk(chunking) * self.states * 2
    }

    /// Returns the elements of one chunk's transient activations.
    fn transients(&self, chunking: Chunking) -> u128 {
        self.chunk(chunking) * (self.hidden * 6 + self.kept.max(self.widest) * 4 + self.slots)
    }

    /// Returns the bytes of all chunks' hidden states.
    fn all_states(&self, chunking: Chunking) -> u128 {
        self.chunks(chunking) * self.chunk_states(chunking)
    }

    /// Returns the bytes of experts' Gram matrices with a limit on them; one expert's are alive in any case.
    fn expert_grams(&self, chunking: Chunking, limit: u64) -> u128 {
        let [one, all] = self.expert.map(|bytes| chunking.expert_sums(bytes));
        all.min(u128::from(limit)).max(one)
    }

    /// Returns the bytes of a device's pools for Gram matrices of experts at other taps than the one with the most: they
    /// have other sizes, and pools keep what they have had unless there is a budget.
    fn pooled_grams(&self, chunking: Chunking) -> u128 {
        chunking
            .expert_sums(self.other_experts)
            .min(u128::from(GRAM_BYTES))
    }

    /// Returns the bytes for solving the linears of a batch of experts.
    fn solved_together(&self, chunking: Chunking) -> u128 {
        /// Columns whose errors are taken together (`STRETCH` of the solver).
        const STRETCH: u128 = 1024;
        let [square, row] = self.solved;
        let batches = self.experts.iter().map(|&[n, rows, experts]| {
            let together = (chunking.rows as u128 / rows.max(1)).clamp(1, experts);
            together * (n * n * square + rows * (n * row + n.min(STRETCH) * 4))
        });
        batches.max().unwrap_or_default()
    }

    /// Returns the bytes of square matrices, of `bytes` for each element in a solve.
    fn squares(&self, chunking: Chunking, bytes: u128) -> u128 {
        let lanes = (chunking.partial_sums() as u128).min(self.chunks(chunking).max(1));
        let summed = lanes * self.lane_squares * 4;
        (self.squares * bytes).max(summed) * self.widest * self.widest
    }

    /// Returns the bytes on a device besides hidden states: a block dense and quantized, the
    /// embedding, a chunk's transients, the largest Gram matrix with its factors, those of experts.
    fn fixed(&self, chunking: Chunking, gram_bytes: u64) -> u128 {
        self.expert_grams(chunking, gram_bytes)
            + (2 * self.block + self.table + self.transients(chunking)) * 2
            + self.squares(chunking, 4)
            + self.solved_together(chunking)
            + self.compared[0]
            + self.tuned[0]
            + if self.ranks > 1 { LINK } else { 0 }
    }

    /// Returns the bytes on the host in any run besides hidden states: the blocks being read,
    /// packed tensors waiting to be written, the windows, the program.
    fn beside(&self, program: u128) -> u128 {
        let packed = (2 * self.block).min(QUEUE);
        2 * self.block * 2 + packed + self.tokens * 4 + self.pieces() + program
    }

    /// Returns the bytes of embedding pieces in conversion: on the way to the device as stored, as
    /// a buffer, as a tensor and as a tensor in compute dtype, and at the same time on the way into
    /// a branch's file.
    fn pieces(&self) -> u128 {
        let loaded = 2 + 2 + 2 + 4;
        let written = 2;
        self.table.min(TABLE_PIECE as u128) * (loaded + written)
    }

    /// Returns the bytes on the host of a CPU run besides hidden states. It computes in f32 and
    /// factors in f64.
    fn fixed_cpu(&self, gram_bytes: u64) -> u128 {
        let lanes = (Chunking::CPU.lanes as u128).min(self.chunks(Chunking::CPU));
        self.expert_grams(Chunking::CPU, gram_bytes)
            + (2 * self.block).max(self.table) * 4
            + lanes * self.transients(Chunking::CPU) * 4
            + self.squares(Chunking::CPU, 8)
            + self.compared[1]
            + self.tuned[1]
            + self.beside(PROGRAM)
    }

    /// Returns the bytes of the states of running chunks, which are in memory wherever they are
    /// stored.
    fn running(&self, chunking: Chunking) -> u128 {
        let lanes = (chunking.lanes as u128).min(self.chunks(chunking));
        2 * lanes * self.chunk(chunking) * (self.hidden + self.kept) * 2
    }

    /// Returns the minimum memory for hidden states if most of them are on disk: that of the
    /// running chunks, or of all if less.
    fn least_states(&self, chunking: Chunking) -> u128 {
        self.running(chunking).min(self.all_states(chunking))
    }
}

/// Returns the features per token of the states before every tap of a block and after the last: the
/// residual stream once per addition to it, and the other registers.
fn kept(block: &BlockSpec, hidden: u128) -> u128 {
    let added = block.taps().filter(|&tap| block.adds(tap..tap + 1));
    let others = block.taps().map(|tap| block.kept_features(tap) as u128);
    hidden * (1 + added.count() as u128) + others.sum::<u128>()
}

impl Memory {
    /// Computes the peaks of a run on one device: hidden states of every branch, one branch's activations in f16, and
    /// the fixed allocations.
    pub fn of(plan: &Plan) -> Memory {
        Memory::of_ranks(plan, 1)
    }

    /// Computes the peaks of each of so many ranks.
    pub fn of_ranks(plan: &Plan, ranks: usize) -> Memory {
        let sizes = Sizes::of(plan, ranks);
        Memory {
            device: with_slack(
                sizes.all_states(Chunking::CUDA)
                    + sizes.fixed(Chunking::CUDA, GRAM_BYTES)
                    + sizes.pooled_grams(Chunking::CUDA),
            ),
            host: with_slack(sizes.beside(PROGRAM_WITH_CUDA)),
            cpu: with_slack(sizes.all_states(Chunking::CPU) + sizes.fixed_cpu(GRAM_BYTES)),
            states: most(sizes.tokens.div_ceil(sizes.ranks) * sizes.states * 2),
            least_host: with_slack(
                sizes.beside(PROGRAM_WITH_CUDA) + sizes.least_states(Chunking::CUDA),
            ),
            least_cpu: with_slack(sizes.fixed_cpu(0) + sizes.least_states(Chunking::CPU)),
        }
    }
}

/// Returns the budget for which [`usable`] leaves `bytes`.
fn with_slack(bytes: u128) -> u64 {
    most(bytes + bytes.div_ceil(SLACK - 1))
}

/// Converts to 64 bits, saturating.
fn most(bytes: u128) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

fn usable(budget: u64) -> u128 {
    let budget = u128::from(budget);
    budget - budget / SLACK
}

impl Places {
    /// Places the hidden states of one of `ranks` ranks within its optional budgets of device and host memory, in bytes.
    /// `shared` means that the device uses the host's memory.
    ///
    /// # Errors
    /// A budget too small for a single chunk.
    pub fn new(
        plan: &Plan,
        ranks: usize,
        chunking: Chunking,
        device: Option<u64>,
        host: Option<u64>,
        shared: bool,
    ) -> Result<Places, PlanError> {
        let sizes = Sizes::of(plan, ranks);
        let chunks = sizes.chunks(chunking);
        let chunk = sizes.chunk_states(chunking).max(1);
        let gram_bytes = gram_bytes(&sizes, chunking, if shared { host } else { device }, shared);
        let mut on_device = match device {
            Some(budget) => resident_chunks(&sizes, chunking, budget, gram_bytes)?,
            None => chunks,
        };
        let mut on_host = chunks - on_device;
        if let Some(budget) = host {
            let (fixed, least) = match shared {
                true => (
                    sizes.fixed_cpu(gram_bytes),
                    Memory::of_ranks(plan, ranks).least_cpu,
                ),
                false => {
                    let beside = sizes.beside(PROGRAM_WITH_CUDA);
                    // A device that can hold all states leaves none to the host.
                    let states = sizes.running(chunking).min(on_host * chunk);
                    (beside, with_slack(beside + states))
                }
            };
            if budget < least {
                return Err(PlanError::HostMemory {
                    needed: least,
                    budget,
                });
            }
            let room = |beside: u128| usable(budget).saturating_sub(beside) / chunk;
            let all = room(fixed);
            // If some chunks are on disk, the running ones need additional space.
            let room = match all >= chunks {
                true => chunks,
                false => room(fixed + sizes.running(chunking)),
            };
            if shared {
                on_device = on_device.min(room);
                on_host = (chunks - on_device).min(room - on_device);
            } else {
                on_host = on_host.min(room);
            }
        }
        Ok(Places {
            device: on_device as usize,
            host: on_host as usize,
            disk_bytes: most((chunks - on_device - on_host) * chunk),
            gram_bytes,
        })
    }
}

/// Returns the limit on experts' Gram matrices: less than usual if a budget leaves too little for that.
fn gram_bytes(sizes: &Sizes, chunking: Chunking, budget: Option<u64>, shared: bool) -> u64 {
    let Some(budget) = budget else {
        return GRAM_BYTES;
    };
    let chunk = sizes.chunk_states(chunking);
    let rest = match shared {
        true => sizes.fixed_cpu(0) + sizes.least_states(chunking),
        false => sizes.fixed(chunking, 0) + chunk,
    };
    let one = sizes.expert_grams(chunking, 0);
    let left = (usable(budget) + one).saturating_sub(rest);
    most(left).min(GRAM_BYTES)
}

/// Returns the number of chunks whose hidden states stay on a device with `budget` bytes; the
/// others are transferred when they run.
fn resident_chunks(
    sizes: &Sizes,
    chunking: Chunking,
    budget: u64,
    gram_bytes: u64,
) -> Result<u128, PlanError> {
    let chunks = sizes.chunks(chunking);
    let chunk = sizes.chunk_states(chunking);
    let fixed = sizes.fixed(chunking, gram_bytes);
    // The states of a running chunk are on the device, wherever they are stored.
    let needed = fixed + chunk;
    if usable(budget) < needed {
        return Err(PlanError::DeviceMemory {
            needed: with_slack(needed),
            budget,
        });
    }
    let room = (usable(budget) - fixed) / chunk.max(1);
    // The running chunk needs space even if all other space is used.
    Ok(if room >= chunks { chunks } else { room - 1 })
}
