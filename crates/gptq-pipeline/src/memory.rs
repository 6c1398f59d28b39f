//! What a run holds at once, from shapes alone, and what of it a device has room for.

use gptq_kernels::{Cpu, Cuda, Engine};
use gptq_model::{Projection, Stage};

use crate::stream::DENSE_SHARE;
use crate::{PipelineError, Plan, Propagation};

/// Peak memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// On the device of a CUDA run.
    pub device: u64,
    /// On the host beside it.
    pub host: u64,
    /// On the host of a CPU run.
    pub cpu: u64,
}

/// Windows whose transient activations are alive together.
pub(crate) fn chunk_windows<B: Engine>(seq_len: usize) -> usize {
    (B::CHUNK_TOKENS / seq_len).max(1)
}

/// Host memory of packed tensors on their way to the files; see `write_behind`.
const QUEUE: u64 = 1 << 30;
/// Device memory that the runtime's pools and the libraries' workspaces take beyond what is asked
/// for, as a divisor of the whole.
const SLACK: u64 = 10;

/// Sizes that the peaks are sums of, in elements.
struct Sizes {
    tokens: u64,
    /// Residuals of every stream and one stream's widest activation, per token.
    states: u64,
    /// All linears of a block.
    block: u64,
    table: u64,
    widest: u64,
    hidden: u64,
    /// Square matrices beside the factor: Gram matrices, and what a refinement or a drift needs.
    squares: u64,
}

impl Sizes {
    fn of(plan: &Plan) -> Sizes {
        let config = &plan.config;
        let streams = match plan.propagation {
            Propagation::Quantised => plan.branches.len() as u64,
            Propagation::Dense => 1,
        };
        let hidden = config.hidden_size as u64;
        let widest = Stage::ALL
            .iter()
            .map(|stage| stage.in_features(config) as u64)
            .max()
            .unwrap_or(hidden);
        let asymmetric = u64::from(plan.asymmetric());
        let refined = plan.branches.iter().any(|b| b.method.refine > 0);
        // The dense model's residual before and after attention, at the end, and both activations.
        let dense = asymmetric * (4 * hidden + widest) / DENSE_SHARE as u64;
        Sizes {
            tokens: plan.tokens() as u64,
            states: streams * hidden + widest + dense,
            block: Projection::ALL
                .iter()
                .map(|p| p.shape(config))
                .map(|(n_in, n_out)| (n_in * n_out) as u64)
                .sum(),
            table: config.vocabulary as u64 * hidden,
            widest,
            hidden,
            squares: 4 + 3 * asymmetric + u64::from(refined),
        }
    }

    /// One chunk's transient activations.
    fn transients<B: Engine>(&self, seq_len: usize) -> u64 {
        let chunk = (chunk_windows::<B>(seq_len) * seq_len) as u64;
        chunk * (self.hidden * 6 + self.widest * 4)
    }

    /// What a device holds besides hidden states, in bytes: a block dense and quantised, the
    /// embedding, a chunk's transients, the largest Gram matrix with its factors.
    fn fixed<B: Engine>(&self, seq_len: usize) -> u64 {
        (2 * self.block + self.table + self.transients::<B>(seq_len)) * 2
            + self.squares * self.widest * self.widest * 4
    }
}

impl Memory {
    /// Hidden states of every branch and one branch's activations in f16, and what stands beside
    /// them. A CPU run computes in f32 and factors in f64.
    pub(crate) fn of(plan: &Plan) -> Memory {
        let sizes = Sizes::of(plan);
        let seq_len = plan.calibration.seq_len;
        let states = sizes.tokens * sizes.states * 2;
        let program = 100 << 20;
        let packed = (2 * sizes.block).min(QUEUE);
        let on_host = 2 * sizes.block * 2 + packed + sizes.tokens * 4 + program;
        Memory {
            device: states + sizes.fixed::<Cuda>(seq_len),
            host: on_host,
            cpu: states
                + (2 * sizes.block).max(sizes.table) * 4
                + Cpu::LANES as u64 * sizes.transients::<Cpu>(seq_len) * 4
                + sizes.squares * sizes.widest * sizes.widest * 8
                + on_host,
        }
    }
}

/// How many of a plan's chunks of windows can keep their hidden states on a device with `budget`
/// bytes; the others are kept on the host and brought over when their turn comes.
///
/// # Errors
/// A budget too small for even one chunk.
pub(crate) fn resident_chunks<B: Engine>(plan: &Plan, budget: u64) -> Result<usize, PipelineError> {
    let sizes = Sizes::of(plan);
    let seq_len = plan.calibration.seq_len;
    let windows = chunk_windows::<B>(seq_len);
    let chunks = plan.calibration.samples.div_ceil(windows);
    let chunk = (windows * seq_len) as u64 * sizes.states * 2;
    let usable = budget - budget / SLACK;
    let fixed = sizes.fixed::<B>(seq_len);
    // One chunk's states are on the device while it runs, wherever they are kept.
    let needed = fixed + chunk;
    if usable < needed {
        return Err(PipelineError::DeviceMemory {
            needed: needed + needed.div_ceil(SLACK - 1),
            budget,
        });
    }
    let room = ((usable - fixed) / chunk.max(1)) as usize;
    // The chunk that runs needs its place even when all places are taken.
    Ok(if room >= chunks { chunks } else { room - 1 })
}
