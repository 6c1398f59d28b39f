//! Inputs and results of a solve, on any engine.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;
use gptq_format::PackedLinear;
use gptq_solver::{Gains, Settings};

use crate::{Codes, cuda::Fetched};

/// Preparation of the shared Hessian.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HessianOptions {
    /// Solve columns by descending diagonal.
    pub act_order: bool,
    /// Damping as a fraction of the mean diagonal.
    pub damping: f64,
}

/// Drift of the quantized model's inputs from the dense model's, over tokens that both
/// ran on; see [`gptq_solver::Target`].
#[derive(Clone, Debug)]
pub struct Mismatch<B: Backend> {
    /// `XᵀX` of those tokens, f32 `[in, in]`, upper triangle.
    pub gram: Tensor<B, 2>,
    /// `(X_d - X)ᵀX` with the dense model's `X_d`, f32 `[in, in]`.
    pub cross: Tensor<B, 2>,
    /// Share of the drift to make up for, 0 to 1.
    pub strength: f64,
}

/// One linear to quantize.
#[derive(Clone, Debug)]
pub struct Request<B: Backend> {
    /// `[out, in]`, compute dtype.
    pub weight: Tensor<B, 2>,
    /// Its settings.
    pub settings: Settings,
    /// `(R_d - R)ᵀX` over the tokens of the [`Mismatch`], f32 `[out, in]`, of a linear whose output is added to the
    /// residual stream `R`: what its output is to make up for besides. Not used without a mismatch.
    pub residual: Option<Tensor<B, 2>>,
    /// True to keep [`Solved::unrounded`].
    pub keep_unrounded: bool,
}

/// The linears that share one input, and what is known of that.
#[derive(Clone, Debug)]
pub struct Problem<B: Backend> {
    /// `XᵀX` of the input, f32 `[in, in]`, upper triangle.
    pub gram: Tensor<B, 2>,
    /// Its drift, to be made up for.
    pub mismatch: Option<Mismatch<B>>,
    /// The linears.
    pub requests: Vec<Request<B>>,
}

impl<B: Backend> Problem<B> {
    /// True if both have the same shapes and settings, so that they may be solved in the same launches.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let strength = |problem: &Self| problem.mismatch.as_ref().map(|it| it.strength);
        let requests = |problem: &Self| -> Vec<_> {
            let requests = problem.requests.iter();
            let requests = requests.map(|it| (it.weight.dims(), it.settings, it.keep_unrounded));
            requests.collect()
        };
        self.gram.dims() == other.gram.dims()
            && strength(self) == strength(other)
            && requests(self) == requests(other)
    }
}

/// A packed linear that may still be on its way to the host.
#[derive(Debug)]
pub struct Incoming(Arrival);

#[derive(Debug)]
enum Arrival {
    Here(PackedLinear),
    Fetched(Fetched),
}

impl Incoming {
    /// The packed linear; waits for its transfer. On any thread: the device goes on meanwhile.
    pub fn wait(self) -> PackedLinear {
        match self.0 {
            Arrival::Here(packed) => packed,
            Arrival::Fetched(fetched) => fetched.wait(),
        }
    }
}

impl From<PackedLinear> for Incoming {
    fn from(packed: PackedLinear) -> Self {
        Incoming(Arrival::Here(packed))
    }
}

impl From<Fetched> for Incoming {
    fn from(fetched: Fetched) -> Self {
        Incoming(Arrival::Fetched(fetched))
    }
}

/// One quantized linear layer.
#[derive(Debug)]
pub struct Solved<B: Backend> {
    /// Codes, scales, zero points and groups.
    pub codes: Codes<B>,
    /// The dequantized weights `[out, in]`, compute dtype.
    pub weight: Tensor<B, 2>,
    /// The same for round to nearest.
    pub nearest: Tensor<B, 2>,
    /// The real numbers that the last pass of refinement rounded to the codes, f32 `[out, in]`, within half a step
    /// of them; without refinement the codes. `None` if not asked for.
    pub unrounded: Option<Tensor<B, 2>>,
    /// `‖(W - Q)X‖² / ‖WX‖²` on the calibration inputs, undamped.
    pub relative_error: f64,
    /// The same for round to nearest.
    pub rtn_error: f64,
    /// `‖(W' - Q)X‖² / ‖WX‖²` with the weights `W'` that were rounded: those that a [`Mismatch`] asks for,
    /// else `W` itself. `None` once the codes have been tuned.
    pub objective: Option<f64>,
    /// Gains of the options beyond plain GPTQ.
    pub gains: Gains,
    /// Sums that these errors and gains come from, in order of strips; none where an engine solves all rows of a linear
    /// together ([`Engine::STRIP`](crate::Engine::STRIP)).
    pub sums: Vec<StripSums>,
}

/// Sums over a strip of rows, in the Gram matrix's unit.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StripSums {
    /// `‖WX‖²`.
    pub energy: f64,
    /// `‖(W - Q)X‖²`.
    pub lost: f64,
    /// The same for round to nearest.
    pub nearest: f64,
    /// The same as `lost` for the weights that were rounded.
    pub objective: f64,
    /// Reduction by the scale search.
    pub searched: f64,
    /// Reduction by correcting the mismatch, and `‖WX‖²` on the tokens that it was measured on.
    pub corrected: [f64; 2],
    /// Reduction by refinement.
    pub refined: f64,
}

/// Errors and gains of a linear, as parts of its output energy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SolveErrors {
    /// The same as [`Solved::relative_error`].
    pub relative_error: f64,
    /// The same as [`Solved::rtn_error`].
    pub rtn_error: f64,
    /// The same as [`Solved::objective`].
    pub objective: f64,
    /// The same as [`Solved::gains`].
    pub gains: Gains,
}

impl SolveErrors {
    /// Computes them from the sums of all strips, in order, of a linear that was solved with `settings`; `corrects`
    /// says if mismatch was corrected.
    pub fn of(sums: &[StripSums], settings: &Settings, corrects: bool) -> Self {
        let sum = |of: &dyn Fn(&StripSums) -> f64| sums.iter().map(of).sum::<f64>();
        // A linear whose output is zero has nothing to lose.
        let part = |of: f64, energy: f64| match energy {
            0.0 => 0.0,
            energy => of / energy,
        };
        let energy = sum(&|it| it.energy);
        let gains = Gains {
            scale_search: (settings.scale_search).then(|| part(sum(&|it| it.searched), energy)),
            mismatch_correction: corrects.then(|| {
                let [gain, energy] = [0, 1].map(|at| sum(&|it| it.corrected[at]));
                part(gain, energy)
            }),
            refine: (settings.refine > 0).then(|| part(sum(&|it| it.refined), energy)),
        };
        SolveErrors {
            relative_error: part(sum(&|it| it.lost), energy),
            rtn_error: part(sum(&|it| it.nearest), energy),
            objective: part(sum(&|it| it.objective), energy),
            gains,
        }
    }
}

/// Result for a set of linears with one input.
#[derive(Debug)]
pub struct Subset<B: Backend> {
    /// Results of the linears, in the order of the requests.
    pub solved: Vec<Solved<B>>,
    /// Damping that succeeded.
    pub damping: f64,
    /// Inputs that are always zero.
    pub dead_columns: usize,
    /// Times of the solve.
    pub times: SolveTimes,
}

/// Seconds of a solve, measured where it waits for the device anyway.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SolveTimes {
    /// Ordering, damping and factoring the Gram matrix; on a device, also whatever was queued before.
    pub factor: f64,
    /// Grids, codes and output errors.
    pub sweep: f64,
}
