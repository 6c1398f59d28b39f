//! The weights to round when a layer's input has drifted from the dense model's,
//! `W' = W + strength · W C (XᵀX + λI)⁻¹` (`gptq_solver::Target`), in f32. `W C` alone is rounded as the
//! tensor cores do: it is an estimate from a part of the windows, good to a few per cent, and f16 and
//! bf16 weights fit TF32 exactly.

use burn::tensor::{DType, Tensor};

use super::{
    Cuda,
    blas::{Element, Matrix, product},
    buffer::{self, Buffer},
    error::Error,
    factor::{diagonal, solve_right, unordered},
    stream::on_stream,
};
use crate::Drift;

/// The target for any weights that share an input.
pub(crate) struct Target {
    lower: Buffer,
    cross: Buffer,
    strength: f64,
}

impl Target {
    /// Factors the drift's Gram matrix.
    ///
    /// # Errors
    ///
    /// As [`factor`](super::factor::factor()), or matrices that are not `[n, n]`.
    pub(crate) fn new(drift: Drift<Cuda>, n: usize, damping: f64) -> Result<Self, Error> {
        if drift.gram.dims() != [n, n] || drift.cross.dims() != [n, n] {
            return Err(Error::Shape {
                operation: "target",
                reason: format!(
                    "gram {:?} and cross {:?} of a drift for {n} columns",
                    drift.gram.dims(),
                    drift.cross.dims()
                ),
            });
        }
        let gram = buffer::float("target", "gram", drift.gram, DType::F32)?;
        let cross = buffer::float("target", "cross", drift.cross, DType::F32)?;
        // A dense input that is not finite reaches the diagonal.
        diagonal(&cross)?;
        Ok(Target {
            lower: unordered(&gram, damping)?,
            cross,
            strength: drift.strength,
        })
    }

    /// `W'`, f32 `[out, in]`, for a weight f16 or bf16 `[out, in]`.
    ///
    /// # Errors
    ///
    /// A library's failure.
    pub(crate) fn of(&self, weight: &Buffer) -> Result<Buffer, Error> {
        let [rows, n] = [weight.meta.shape()[0], weight.meta.shape()[1]];
        let weight: Tensor<Cuda, 2> = buffer::into_float(weight.clone());
        let weight = weight.cast(DType::F32);
        let wide = buffer::float("target", "weight", weight.clone(), DType::F32)?;
        let shift = buffer::empty(&wide, [rows, n], DType::F32);
        on_stream(&[&wide, &self.cross, &shift], |libraries, pointers| {
            let [w, c, out] = [0, 1, 2].map(|at| Matrix::at(pointers[at], 0, n, Element::Tf32));
            // SAFETY: `[rows, n]`, `[n, n]` and `[rows, n]`, each of its own buffer.
            unsafe { product(libraries, [rows, n, n], w, c, 0.0, out) }
        })?;
        solve_right(&self.lower, &shift)?;
        let shift: Tensor<Cuda, 2> = buffer::into_float(shift);
        buffer::float(
            "target",
            "target",
            weight + shift.mul_scalar(self.strength),
            DType::F32,
        )
    }
}
