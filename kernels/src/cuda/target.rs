//! Activation-mismatch correction: the weights to round when a layer's input differs from the dense
//! model's, `W' = W + strength · (W C + (R_d - R)ᵀX) (XᵀX + λI)⁻¹` (`gptq_solver::Target`), in f32. Only `W C`
//! is rounded to TF32: it is an estimate, accurate to a few per cent, and f16 and bf16 weights are exact in TF32.

use burn::tensor::{DType, Tensor};
use cudarc::driver;

use super::{
    Cuda,
    blas::{Element, MatrixAt, product},
    buffer::{self, Buffer, matrix},
    cholesky::{Failed, solve_right, unordered},
    error::Error,
    factor::diagonals,
    relative_error::{Correlation, Measurement, Sum},
    stream::on_stream_later,
};
use crate::Mismatch;

/// Copies a buffer.
fn copied(buffer: &Buffer) -> Result<Buffer, Error> {
    let [rows, columns] = [buffer.meta.shape()[0], buffer.meta.shape()[1]];
    let copy = buffer::empty(buffer, [rows, columns], buffer.dtype);
    let bytes = rows * columns * buffer.dtype.size();
    on_stream_later(&[buffer, &copy], move |libraries, pointers| {
        // SAFETY: both buffers have this many bytes, and they are not the same.
        unsafe {
            driver::result::memcpy_dtod_async(pointers[1], pointers[0], bytes, libraries.stream)
        }
        .map_err(|source| Error::Driver {
            operation: "cuMemcpyDtoDAsync",
            source,
        })
    })?;
    Ok(copy)
}

/// Correction for weights that share an input.
pub(crate) struct MismatchTarget {
    lower: Buffer,
    cross: Buffer,
    strength: f64,
    /// `λ`.
    ridge: f64,
    correlation: Correlation,
}

impl MismatchTarget {
    /// Factors the Gram matrix of each of `mismatches`.
    ///
    /// # Errors
    ///
    /// Those of [`factor`](super::factor::factor()), or matrices that are not `[n, n]`.
    pub(crate) fn each(
        mismatches: Vec<Mismatch<Cuda>>,
        n: usize,
        damping: f64,
    ) -> Result<Vec<Self>, Failed> {
        let strengths: Vec<f64> = mismatches.iter().map(|it| it.strength).collect();
        let (mut grams, mut crosses) = (Vec::new(), Vec::new());
        for (at, mismatch) in mismatches.into_iter().enumerate() {
            if mismatch.gram.dims() != [n, n] || mismatch.cross.dims() != [n, n] {
                let reason = format!(
                    "gram {:?} and cross {:?} of an activation mismatch for {n} columns",
                    mismatch.gram.dims(),
                    mismatch.cross.dims()
                );
                let error = Error::Shape {
                    operation: "target",
                    reason,
                };
                return Err(Failed { at, error });
            }
            grams.push(buffer::float("target", "gram", mismatch.gram, DType::F32)?);
            crosses.push(buffer::float(
                "target",
                "cross",
                mismatch.cross,
                DType::F32,
            )?);
        }
        // A dense input that is not finite reaches the diagonal.
        diagonals(&crosses)?;
        let columns = diagonals(&grams)?;
        let (lower, ridges) = unordered(&grams, &columns, damping)?;
        let parts = grams.iter().zip(&columns).zip(crosses);
        let parts = parts.zip(strengths.into_iter().zip(ridges)).enumerate();
        let targets =
            parts.map(
                |(at, (((gram, columns), cross), (strength, ridge)))| MismatchTarget {
                    lower: matrix(&lower, at),
                    cross,
                    strength,
                    ridge,
                    correlation: Correlation::new(gram, columns),
                },
            );
        Ok(targets.collect())
    }

    /// Returns `W'`, f32 `[out, in]`, for a weight f16 or bf16 `[out, in]`, the `at`-th of those
    /// measured, with `residual` f32 `[out, in]`, if there is one.
    ///
    /// # Errors
    ///
    /// A failure of a library.
    pub(crate) fn of(
        &self,
        weight: &Buffer,
        residual: Option<&Tensor<Cuda, 2>>,
        measurement: &Measurement,
        at: usize,
    ) -> Result<Buffer, Error> {
        let [rows, n] = [weight.meta.shape()[0], weight.meta.shape()[1]];
        if residual.is_some_and(|residual| residual.dims() != [rows, n]) {
            return Err(Error::Shape {
                operation: "target",
                reason: format!("a residual that is not [{rows}, {n}], as the weight is"),
            });
        }
        measurement.energy(&self.correlation, weight, (at, Sum::Drifted))?;
        let weight: Tensor<Cuda, 2> = buffer::into_float(weight.clone());
        let weight = weight.cast(DType::F32);
        let wide = buffer::float("target", "weight", weight.clone(), DType::F32)?;
        let shift = buffer::empty(&wide, [rows, n], DType::F32);
        on_stream_later(&[&wide, &self.cross, &shift], move |libraries, pointers| {
            let [w, c, out] = [0, 1, 2].map(|at| MatrixAt::at(pointers[at], 0, n, Element::Tf32));
            // SAFETY: `[rows, n]`, `[n, n]` and `[rows, n]`, each of its own buffer.
            unsafe { product(libraries, [rows, n, n], w, c, 0.0, out) }
        })?;
        let shift = match residual {
            None => shift,
            Some(residual) => {
                let toward: Tensor<Cuda, 2> = buffer::into_float(shift);
                buffer::float("target", "toward", toward + residual.clone(), DType::F32)?
            }
        };
        let toward = copied(&shift)?;
        solve_right(&self.lower, &shift)?;
        measurement.dot([&toward, &shift], (at, Sum::Toward));
        measurement.dot([&shift, &shift], (at, Sum::Shift));
        let shift: Tensor<Cuda, 2> = buffer::into_float(shift);
        buffer::float(
            "target",
            "target",
            weight + shift.mul_scalar(self.strength),
            DType::F32,
        )
    }

    /// Computes the gain of `W'` (`gptq_solver::Target::of`) from `tr(W C Sᵀ)` and `‖S‖²`.
    pub(crate) fn gain(&self, toward: f64, shift: f64) -> f64 {
        let t = self.strength;
        (2.0 - t) * t * toward + t * t * self.ridge * shift
    }
}
