//! Tuning of a block: its codes and scales follow the gradient of the distance to the dense model.
//!
//! With the branch's states `x` before the block and the dense model's `y` after it, a [`BlockLoss`] of `block(x)` and `y`
//! over the tokens that both ran on, a batch of windows at each step. So a block makes up not for its own rounding
//! alone, but for what the blocks before it have lost. Codes start as the solver left them, just before rounding
//! ([`Tunable`]); learning rates rise over the first tenth of the steps and fall to zero. What comes of it is
//! kept if it is closer over all windows than what the solver gave.

use burn::tensor::{DType, Tensor};
use gptq_format::{Bits, FormatError};
use gptq_kernels::{Engine, Tunable, TuningStep, map_lanes};
use gptq_model::{Block, Flow};
use gptq_plan::{MAX_CURVE, Tuning};

use crate::RunError;
use crate::gram::Dense;
use crate::stream::{Chunk, Stream};
use crate::tuning_loss::BlockLoss;

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

/// Sums over some windows.
struct BatchSums<B: Engine> {
    /// The loss, and what it is told as a part of, `[1, 1]`.
    lost: Tensor<B, 2>,
    whole: Tensor<B, 2>,
    /// The loss's gradients with respect to the linears' weights.
    weights: Vec<Tensor<B, 2>>,
}

impl<B: Engine> BatchSums<B> {
    fn and(self, other: Self) -> Self {
        let weights = self.weights.into_iter().zip(other.weights);
        BatchSums {
            lost: self.lost + other.lost,
            whole: self.whole + other.whole,
            weights: weights.map(|(a, b)| a + b).collect(),
        }
    }
}

/// The windows that a block is tuned on.
pub(crate) struct TuningSet<'a, B: Engine> {
    windows: Vec<Window<'a, B>>,
    /// Number of windows in a batch.
    batch: usize,
    /// Compute dtype.
    dtype: DType,
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
    /// `batch`, or all of them if these are fewer; `dtype` is the compute dtype.
    pub(crate) fn new(
        start: &'a Stream<B>,
        dense: &'a Dense<B>,
        batch: usize,
        dtype: DType,
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
            dtype,
            device,
        }
    }

    /// Returns the windows of a batch that are taken together, where the parts of one are worth taking side by side.
    fn lane(&self) -> usize {
        self.batch.div_ceil(B::LANES)
    }

    /// Takes `block` through `windows` and back.
    fn gradients(
        &self,
        windows: &[usize],
        block: &Block<B>,
        loss: &BlockLoss<B>,
        size: &Tensor<B, 2>,
    ) -> Result<BatchSums<B>, FormatError> {
        let [x, before, y] = [0, 1, 2].map(|which| self.states(which, windows));
        let (before, y) = (before?, y?);
        let whole = loss.whole(before, y.clone());
        let mut lost = None;
        let weights = block.weight_gradients(Flow::new(windows.len(), x?), |end| {
            let (sum, gradient) = loss.gradient(end, y, size);
            lost = Some(sum);
            gradient
        });
        Ok(BatchSums {
            lost: lost.expect("every block has an end"),
            whole,
            weights,
        })
    }

    /// Returns the size of the loss's gradient on the first window.
    fn size(&self, block: &Block<B>, loss: &BlockLoss<B>) -> Result<Tensor<B, 2>, FormatError> {
        let [x, y] = [0, 2].map(|which| self.states(which, &[0]));
        let end = block.forward(Flow::new(1, x?)).residual;
        Ok(loss.size(end, y?))
    }

    /// Returns one of a window's three states for some of the windows, `[tokens, hidden]` in compute dtype.
    fn states(&self, which: usize, windows: &[usize]) -> Result<Tensor<B, 2>, FormatError> {
        let mut states = Vec::new();
        // Neighbours in one chunk are taken together.
        let together = |&a: &usize, &b: &usize| {
            let [a, b] = [a, b].map(|window| &self.windows[window]);
            std::ptr::eq(a.chunks[which], b.chunks[which]) && b.at == a.at + 1
        };
        for windows in windows.chunk_by(together) {
            let Window { chunks, at, tokens } = &self.windows[windows[0]];
            let all = chunks[which].residual_stream(self.device)?;
            let (first, length) = (at * tokens, windows.len() * tokens);
            states.push(match all.dims()[0] == length {
                true => all,
                false => all.narrow(0, first, length),
            });
        }
        Ok(match states.len() {
            1 => states.remove(0),
            _ => Tensor::cat(states, 0),
        })
    }

    /// Returns `loss` over all windows, and what it is told as a part of.
    fn distance(&self, block: &Block<B>, loss: &BlockLoss<B>) -> Result<[f64; 2], FormatError> {
        let all: Vec<usize> = (0..self.windows.len()).collect();
        let parts = all.chunks(self.lane()).collect();
        let sums = map_lanes::<B, _, _>(parts, |windows: &[usize]| {
            let [x, before, y] = [0, 1, 2].map(|which| self.states(which, windows));
            let (before, y) = (before?, y?);
            let own = block.forward(Flow::new(windows.len(), x?)).residual;
            Ok([loss.of(own, y.clone()), loss.whole(before, y)])
        });
        let sums = sums.into_iter().collect::<Result<Vec<_>, FormatError>>()?;
        let values = read(sums.into_iter().flatten().collect());
        let sum = |first: usize| values.iter().skip(first).step_by(2).sum::<f64>();
        Ok([sum(0), sum(1)])
    }
}

/// Takes `steps` steps; afterwards `block` and `linears` have what they end at. Returns whether that is closer to the
/// dense model by `loss`; otherwise `block` and `linears` are to be thrown away.
///
/// # Errors
/// Those of the storage of states, and of `check`, which is asked before each step.
pub(crate) fn tune<B: Engine>(
    windows: &TuningSet<'_, B>,
    loss: &BlockLoss<B>,
    steps: usize,
    block: &mut Block<B>,
    linears: &mut [Tuned<B>],
    check: &mut dyn FnMut() -> Result<(), RunError>,
) -> Result<(Tuning, bool), RunError> {
    let [before, whole] = windows.distance(block, loss)?;
    let relative = |distance: f64| match whole {
        0.0 => 0.0,
        whole => distance / whole,
    };
    let mut batches = Batches::new(windows.windows.len(), windows.batch);
    let mut losses = Vec::with_capacity(steps);
    let mut wholes = Vec::with_capacity(steps);
    let size = windows.size(block, loss)?;
    for step in 0..steps {
        check()?;
        let batch = batches.next();
        let parts = batch.chunks(windows.lane()).collect();
        let parts = map_lanes::<B, _, _>(parts, |part| windows.gradients(part, block, loss, &size));
        let parts = parts.into_iter().collect::<Result<Vec<_>, FormatError>>()?;
        let all = parts.into_iter().reduce(BatchSums::and);
        let all = all.expect("a batch has a window");
        losses.push(all.lost);
        wholes.push(all.whole);
        let mut gradients: Vec<_> = all.weights.into_iter().map(Some).collect();
        let tuned = linears.iter_mut().map(|tuned| {
            let gradient = gradients[tuned.linear].take();
            (tuned, gradient.expect("a gradient for each linear"))
        });
        let weights = map_lanes::<B, _, _>(tuned.collect(), |(tuned, gradient)| {
            let [codes, scales] = rates(tuned.bits);
            let factor = schedule(step, steps);
            let step = TuningStep {
                number: step + 1,
                code_rate: codes * factor,
                scale_rate: scales * factor,
            };
            let weight = B::tune(&mut tuned.parameters, gradient, step, windows.dtype);
            (tuned.linear, weight)
        });
        for (linear, weight) in weights {
            block.set_weight(linear, weight);
        }
    }
    let [after, _] = windows.distance(block, loss)?;
    let closer = after < before;
    let losses = read(losses);
    let wholes = read(wholes);
    let run = steps.div_ceil(MAX_CURVE).max(1);
    let curve = losses.chunks(run).zip(wholes.chunks(run));
    let curve = curve.map(|(lost, of)| match of.iter().sum::<f64>() {
        0.0 => 0.0,
        of => lost.iter().sum::<f64>() / of,
    });
    let tuning = Tuning {
        loss: loss.kind(),
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
