//! Errors of a branch's outputs relative to the dense model's.
//!
//! For a linear layer, `‖ŴX̂ - WX‖² / ‖WX‖²` with the dense model's inputs `X` and the branch's own
//! `X̂`: its rounding error and the error of its inputs together. For a block, the mean over tokens
//! of `‖ŷ - y‖² / ‖y‖²`, `y` the residual stream at its end. Both use the first tokens of a small
//! share of the windows ([`Share`](gptq_plan::Share)), which run through the dense blocks and each branch's beside
//! the run. So the tokens are the same for every preset and propagation, and a branch's bytes do
//! not depend on them.
//!
//! `ŴX̂ - WX = (Ŵ - W)X̂ + W(X̂ - X)`: if a branch is close to the dense model both terms are
//! small, so nothing cancels, and 16-bit products are precise enough.

use burn::tensor::{DType, Tensor};
use gptq_format::FormatError;
use gptq_kernels::Engine;
use gptq_model::Block;

use crate::expert_errors::{ExpertErrors, SolvedLinear};
use crate::gram::Dense;
use crate::linear_errors::{LinearErrors, bounded, part};
use crate::moved::squares;
use crate::profile::{Clock, Phase};
use crate::stream::{Chunk, Stream};

/// Streams of the dense model and every branch on the compared tokens.
pub(crate) struct OutputErrors<B: Engine> {
    pub(crate) dense: Dense<B>,
    /// Branches in the plan's order.
    pub(crate) own: Vec<Stream<B>>,
    /// The same before the block that was entered last.
    begun: Vec<Stream<B>>,
    /// `‖WX‖²` of the block's linear layers, in order; 0 for experts, whose inputs depend on the branch.
    energies: Vec<f64>,
    /// The block that was entered last.
    block: Option<Block<B>>,
}

impl<B: Engine> OutputErrors<B> {
    /// Starts from the states before the next block.
    pub(crate) fn new(dense: Stream<B>, own: Vec<Stream<B>>) -> Self {
        OutputErrors {
            dense: Dense::new(dense, 1),
            begun: own.clone(),
            own,
            energies: Vec::new(),
            block: None,
        }
    }

    /// Starts `branches` branches with a sample of the embedded windows.
    pub(crate) fn begin(first: Stream<B>, branches: usize) -> Self {
        let own = (0..branches).map(|branch| Stream {
            branches: vec![branch],
            ..first.clone()
        });
        OutputErrors::new(first.clone(), own.collect())
    }

    /// Runs the next block of the dense model; with `solving`, prepares the comparison of its
    /// linear layers.
    pub(crate) fn enter(
        &mut self,
        block: &Block<B>,
        solving: bool,
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<(), FormatError> {
        self.dense.enter(block, device, clock)?;
        self.begun.clone_from(&self.own);
        self.energies.clear();
        self.block = solving.then(|| block.clone());
        if !solving {
            return Ok(());
        }
        let spec = block.spec();
        let plain = || spec.taps().filter(|&tap| spec.experts_at(tap).is_none());
        let energies = clock.measure::<B, _>(Phase::Sweep, device, || {
            // All are brought over at once: each time the host waits, the device runs dry.
            let mut squared = vec![Vec::new(); self.dense.before(0).chunks.len()];
            for tap in plain() {
                for (chunk, squared) in self.dense.before(tap).chunks.iter().zip(&mut squared) {
                    let x = input(block, tap, chunk, device)?;
                    squared.extend(spec.linears_of(tap).map(|linear| {
                        let weight = block.linear(linear).weight.dense(x.dtype());
                        squares(B::matmul_nt(x.clone(), weight).cast(DType::F32))
                    }));
                }
            }
            Ok::<_, FormatError>(sums(squared))
        });
        self.energies = vec![0.0; spec.linears().len()];
        let linears = plain().flat_map(|tap| spec.linears_of(tap));
        for (linear, energy) in linears.zip(energies?) {
            self.energies[linear] = energy;
        }
        Ok(())
    }

    /// Drops what was kept of the block that was entered last.
    pub(crate) fn leave(&mut self) {
        self.block = None;
    }

    /// Takes a branch back to the start of the block that was entered last.
    pub(crate) fn restart(&mut self, branch: usize) {
        self.own[branch] = self.begun[branch].clone();
    }

    /// Returns the errors of some linear layers of `tap`, given the solved and the nearest weights;
    /// `block` still holds the dense ones.
    pub(crate) fn linears(
        &self,
        branch: usize,
        tap: usize,
        block: &Block<B>,
        solved: &[SolvedLinear<'_, B>],
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<Vec<LinearErrors>, FormatError> {
        if solved.is_empty() {
            return Ok(Vec::new());
        }
        if block.spec().experts_at(tap).is_some() {
            let dense = self
                .block
                .as_ref()
                .expect("a block was entered to solve it");
            let errors = ExpertErrors {
                blocks: [block, dense],
                tap,
                dense: &self.dense,
                own: &self.own[branch],
                device,
            };
            return clock.measure::<B, _>(Phase::Sweep, device, || errors.of(solved));
        }
        let lost = clock.measure::<B, _>(Phase::Sweep, device, || {
            let pairs = self.dense.before(tap).chunks.iter();
            let squared = pairs.zip(&self.own[branch].chunks).map(|(dense, own)| {
                let dense = input(block, tap, dense, device)?;
                let own = input(block, tap, own, device)?;
                let mismatch = own.clone() - dense;
                let squared = solved.iter().flat_map(|&(linear, weights)| {
                    let weight = block.linear(linear).weight.dense(own.dtype());
                    let shift = B::matmul_nt(mismatch.clone(), weight.clone()).cast(DType::F32);
                    weights.map(|rounded| {
                        let rounding = rounded.clone() - weight.clone();
                        let moved = B::matmul_nt(own.clone(), rounding).cast(DType::F32);
                        squares(moved + shift.clone())
                    })
                });
                Ok::<_, FormatError>(squared.collect())
            });
            let lost = sums(squared.collect::<Result<_, _>>()?);
            Ok::<_, FormatError>(lost)
        });
        let lost = lost?;
        let errors = solved.iter().zip(lost.chunks_exact(2));
        let errors = errors.map(|(&(linear, _), lost)| LinearErrors {
            output: part(lost[0], self.energies[linear]),
            nearest: part(lost[1], self.energies[linear]),
        });
        Ok(errors.collect())
    }

    /// Advances a branch past `tap` with the weights of its own block.
    pub(crate) fn advance(
        &mut self,
        branch: usize,
        tap: usize,
        block: &Block<B>,
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<(), FormatError> {
        let own = &mut self.own[branch];
        let (next, _) = own.clone().advance(block, tap..tap + 1, device, clock)?;
        *own = next;
        Ok(())
    }

    /// Returns the error of the output of the last entered block, which the branch has passed.
    pub(crate) fn block(&self, branch: usize, device: &B::Device) -> Result<f64, FormatError> {
        let mut tokens = 0;
        let pairs = self.dense.end().chunks.iter().zip(&self.own[branch].chunks);
        let parts = pairs.map(|(dense, own)| {
            let [dense, own] = [dense, own].map(|chunk| {
                let states = chunk.flow(device)?.residual;
                Ok::<_, FormatError>(states.cast(DType::F32))
            });
            let (dense, own) = (dense?, own?);
            tokens += dense.dims()[0];
            let lengths = squares(dense.clone()).add_scalar(f32::MIN_POSITIVE);
            Ok::<_, FormatError>(vec![squares(own - dense) / lengths])
        });
        let sum = sums(parts.collect::<Result<_, _>>()?)[0];
        Ok(bounded(sum / tokens as f64))
    }
}

/// Returns the input of the linear layers of `tap`.
fn input<B: Engine>(
    block: &Block<B>,
    tap: usize,
    chunk: &Chunk<B>,
    device: &B::Device,
) -> Result<Tensor<B, 2>, FormatError> {
    Ok(match chunk.kept_input(block, tap..tap + 1, device)? {
        Some(input) => input,
        None => block.input(tap, &chunk.flow(device)?),
    })
}

/// Sums columns `[tokens, 1]` over the tokens of all chunks, in f64 and in one transfer: `columns[chunk][column]`.
fn sums<B: Engine>(columns: Vec<Vec<Tensor<B, 2>>>) -> Vec<f64> {
    let n = columns.first().map_or(0, Vec::len);
    let chunks = columns.into_iter().map(|columns| Tensor::cat(columns, 1));
    let values = Tensor::cat(chunks.collect(), 0).into_data();
    let values = values.as_slice::<f32>().expect("the columns are f32");
    let mut sums = vec![0.0; n];
    for row in values.chunks_exact(n) {
        for (sum, &value) in sums.iter_mut().zip(row) {
            *sum += f64::from(value);
        }
    }
    sums
}

#[cfg(test)]
mod tests;
