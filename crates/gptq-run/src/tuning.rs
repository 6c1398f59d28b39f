//! Tuning of a block: its codes and scales follow the gradient of the distance to the dense block's output.
//!
//! With the branch's states `x` before the block and the dense model's `y` after it, `L = Σ ‖block(x) - y‖²` over the
//! tokens that both ran on, a batch of windows at each step. So a block makes up not for its own rounding alone, but
//! for what the blocks before it have lost. Codes start as the solver left them, just before rounding
//! ([`Tunable`]); learning rates rise over the first tenth of the steps and fall to zero. What comes of it is
//! kept if it is closer to `y` over all windows than what the solver gave.

use burn::tensor::{DType, Tensor};
use gptq_format::{Bits, FormatError};
use gptq_kernels::{Engine, Tunable, TuningStep};
use gptq_model::{Block, Flow};
use gptq_plan::{MAX_CURVE, Tuning};

use crate::RunError;
use crate::gram::Dense;
use crate::moved::squares;
use crate::stream::{Chunk, Stream};

/// Root mean square of the loss's gradient as it enters the block: in the middle of f16's range.
const SCALE: f64 = 0.1;
/// Largest magnitude of it.
const BOUND: f32 = 1e4;

/// A linear whose codes and scales are tuned.
pub(crate) struct Tuned<B: Engine> {
    /// Its index in the block.
    pub(crate) linear: usize,
    pub(crate) bits: Bits,
    pub(crate) parameters: Tunable<B>,
}

/// A window that both models ran on.
struct Window<'a, B: Engine> {
    /// The branch's states before the block, and the dense model's before and after it.
    chunks: [&'a Chunk<B>; 3],
    /// Its place in the chunk.
    at: usize,
    tokens: usize,
}

/// The windows that a block is tuned on.
pub(crate) struct TuningSet<'a, B: Engine> {
    windows: Vec<Window<'a, B>>,
    /// Number of windows in a batch.
    batch: usize,
    device: &'a B::Device,
}

/// Learning rates of codes and scales at their peak: the fewer codes there are, the more a step of one may gain
/// (`crates/README.md` has figures).
fn rates(bits: Bits) -> [f32; 2] {
    match bits {
        Bits::Two => [0.0125, 0.004],
        Bits::Three => [0.0075, 0.003],
        Bits::Four => [0.005, 0.001],
        Bits::Eight => [0.0025, 0.0005],
    }
}

/// Factor of the learning rates at step `at` of `steps`: a rise over the first tenth, then a fall to zero.
fn schedule(at: usize, steps: usize) -> f32 {
    let steps = steps as f32;
    let rise = (at + 1) as f32 / (0.1 * steps);
    (1.0 - at as f32 / steps) * rise.min(1.0)
}

impl<'a, B: Engine> TuningSet<'a, B> {
    /// Takes the windows of `start`, a branch's states before the block, that `dense` ran on too, in batches of
    /// `batch`, or all of them if these are fewer.
    pub(crate) fn new(
        start: &'a Stream<B>,
        dense: &'a Dense<B>,
        batch: usize,
        device: &'a B::Device,
    ) -> Self {
        let mut windows = Vec::new();
        for (at, own) in start.chunks.iter().enumerate() {
            let Some(before) = dense.chunk(0, at) else {
                continue;
            };
            let end = dense.end_chunk(at).expect("a chunk for each before it");
            let [n, tokens, _] = own.shape();
            windows.extend((0..n).map(|at| Window {
                chunks: [own, before, end],
                at,
                tokens: tokens / n,
            }));
        }
        TuningSet {
            batch: batch.min(windows.len()),
            windows,
            device,
        }
    }

    /// Returns one of a window's three states for some of the windows, `[tokens, hidden]` in compute dtype.
    fn states(&self, which: usize, windows: &[usize]) -> Result<Tensor<B, 2>, FormatError> {
        let states = windows.iter().map(|&window| {
            let Window { chunks, at, tokens } = &self.windows[window];
            let all = chunks[which].residual_stream(self.device)?;
            Ok(all.narrow(0, at * tokens, *tokens))
        });
        Ok(Tensor::cat(states.collect::<Result<_, FormatError>>()?, 0))
    }

    /// Returns the sums over all windows of `‖block(x) - y‖²` and of what the dense block adds, squared.
    fn distance(&self, block: &Block<B>) -> Result<[f64; 2], FormatError> {
        let all: Vec<usize> = (0..self.windows.len()).collect();
        let mut sums = Vec::new();
        for windows in all.chunks(self.batch) {
            let [x, before, y] = [0, 1, 2].map(|which| self.states(which, windows));
            let (before, y) = (before?.cast(DType::F32), y?.cast(DType::F32));
            let own = block.forward(Flow::new(windows.len(), x?)).residual;
            sums.push(total(own.cast(DType::F32) - y.clone()));
            sums.push(total(y - before));
        }
        let values = read(sums);
        let sum = |first: usize| values.iter().skip(first).step_by(2).sum::<f64>();
        Ok([sum(0), sum(1)])
    }
}

/// Takes `steps` steps; afterwards `block` and `linears` have what they end at, or, if that is no closer to the dense
/// block's output, `None` is returned in place of the tuning, and `block` and `linears` are to be thrown away.
///
/// # Errors
/// Those of the storage of states, and of `check`, which is asked before each step.
pub(crate) fn tune<B: Engine>(
    windows: &TuningSet<'_, B>,
    steps: usize,
    block: &mut Block<B>,
    linears: &mut [Tuned<B>],
    check: &mut dyn FnMut() -> Result<(), RunError>,
) -> Result<(Tuning, bool), RunError> {
    let [before, energy] = windows.distance(block)?;
    let relative = |distance: f64| match energy {
        0.0 => 0.0,
        energy => distance / energy,
    };
    let mut batches = Batches::new(windows.windows.len(), windows.batch);
    let tokens = windows.windows.len() * windows.windows[0].tokens;
    let mut losses = Vec::with_capacity(steps);
    let mut energies = Vec::with_capacity(steps);
    for step in 0..steps {
        check()?;
        let batch = batches.next();
        let [x, dense, y] = [0, 1, 2].map(|which| windows.states(which, &batch));
        let (x, dense, y) = (x?, dense?.cast(DType::F32), y?.cast(DType::F32));
        energies.push(total(y.clone() - dense));
        let dtype = x.dtype();
        let values = (tokens * x.dims()[1]) as f64;
        let scale = SCALE / (before / values).sqrt().max(f64::MIN_POSITIVE);
        let gradients = block.weight_gradients(Flow::new(batch.len(), x), |end| {
            let off = end.cast(DType::F32) - y;
            losses.push(total(off.clone()));
            off.mul_scalar(scale).clamp(-BOUND, BOUND).cast(dtype)
        });
        let mut gradients: Vec<_> = gradients.into_iter().map(Some).collect();
        for tuned in linears.iter_mut() {
            let [codes, scales] = rates(tuned.bits);
            let factor = schedule(step, steps);
            let step = TuningStep {
                number: step + 1,
                code_rate: codes * factor,
                scale_rate: scales * factor,
            };
            let gradient = gradients[tuned.linear].take();
            let gradient = gradient.expect("a gradient for each linear");
            let weight = B::tune(&mut tuned.parameters, gradient, step, dtype);
            block.set_weight(tuned.linear, weight);
        }
    }
    let [after, _] = windows.distance(block)?;
    let closer = after < before;
    let losses = read(losses);
    let energies = read(energies);
    let run = steps.div_ceil(MAX_CURVE).max(1);
    let curve = losses.chunks(run).zip(energies.chunks(run));
    let curve = curve.map(|(lost, of)| match of.iter().sum::<f64>() {
        0.0 => 0.0,
        of => lost.iter().sum::<f64>() / of,
    });
    let tuning = Tuning {
        before: relative(before),
        after: relative(if closer { after } else { before }),
        curve: curve.collect(),
    };
    Ok((tuning, closer))
}

/// Batches of windows: each window once, in an order of its own, before any comes again.
struct Batches {
    windows: usize,
    size: usize,
    next: usize,
}

impl Batches {
    fn new(windows: usize, size: usize) -> Self {
        Batches {
            windows,
            size,
            next: 0,
        }
    }

    fn next(&mut self) -> Vec<usize> {
        let first = self.next;
        self.next += self.size;
        (first..self.next).map(|at| at % self.windows).collect()
    }
}

/// Returns the squared length of all of `x`, `[1, 1]`.
fn total<B: Engine>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    squares(x).sum_dim(0)
}

/// Brings numbers to the host, in one transfer.
fn read<B: Engine>(numbers: Vec<Tensor<B, 2>>) -> Vec<f64> {
    if numbers.is_empty() {
        return Vec::new();
    }
    let values = Tensor::cat(numbers, 0).into_data();
    let values = values.as_slice::<f32>().expect("the numbers are f32");
    values.iter().map(|&value| f64::from(value)).collect()
}

#[cfg(test)]
mod tests;
