//! The weights to round when the quantized model's inputs differ from the dense model's.
//!
//! A linear layer of the quantized model receives `X`, not the `X_d` of the dense model, and should
//! reproduce the dense output `X_d Wᵀ` (rows are tokens). The weights that come closest on `X`,
//! `argmin ‖X_d Wᵀ - X W'ᵀ‖² + λ ‖W' - W‖²`, are
//!
//! `W' = W + W C (XᵀX + λI)⁻¹`, `C = (X_d - X)ᵀX`,
//!
//! and the loss of rounding `W'` is measured with the same `XᵀX`: GPTQ needs no change (Li et al.,
//! GPTAQ, 2025, fold the same term into each column's update). `λ` is the damping; a strength
//! between 0 and 1 applies only part of the correction.
//!
//! If the output is added to a residual stream, `R_d` in the dense model and `R` in the branch, the sum is what
//! should be reproduced: `R_d + X_d Wᵀ`. Then `(R_d - R)ᵀX` joins `W C`. So each block makes up for what the
//! blocks before have lost in the stream, as far as its own inputs tell.

use nalgebra::DMatrix;
use rayon::prelude::*;

use crate::{Real, STRIP, SolverError, cholesky, factor::damped};

/// Activation-mismatch correction for weights that share an input.
#[derive(Clone, Debug)]
pub struct Target<T: Real> {
    /// Lower factor of the damped Gram matrix, in the columns' own order.
    lower: DMatrix<T>,
    cross: DMatrix<T>,
    strength: T,
    /// `λ`.
    ridge: f64,
}

impl<T: Real> Target<T> {
    /// Builds the correction from `gram = XᵀX` and `cross = (X_d - X)ᵀX`, `[in, in]` over the same
    /// tokens. The damping is a fraction of the mean diagonal and is raised as by
    /// [`Factor::new`](crate::Factor::new).
    ///
    /// # Errors
    /// A non-finite element, or failure at every damping.
    pub fn new(
        gram: &DMatrix<T>,
        cross: DMatrix<T>,
        damping: f64,
        strength: f64,
    ) -> Result<Self, SolverError> {
        let n = gram.nrows();
        if let Some(at) = cross.iter().position(|v| !v.is_finite()) {
            let (row, col) = (at % n, at / n);
            return Err(SolverError::NonFiniteGram { row, col });
        }
        let (lower, damping) = damped(gram, damping, cholesky::lower)?;
        Ok(Target {
            lower,
            cross,
            strength: T::of(strength),
            ridge: damping * gram.trace().exact() / n as f64,
        })
    }

    /// Returns `W'` for `w [out, in]`, and its reduction of the distance to the dense output, `‖X_d
    /// Wᵀ - X Wᵀ‖² - ‖X_d Wᵀ - X W'ᵀ‖²`, in each strip of [`STRIP`] rows. `residual` is `(R_d - R)ᵀX [out, in]`, if the output is added to a
    /// residual stream; then the distance is that of the sums.
    ///
    /// With `A = W C + (R_d - R)ᵀX`, `S = A (XᵀX + λI)⁻¹` and strength `t`, that is `(2t - t²) tr(A Sᵀ) + t² λ
    /// ‖S‖²`.
    pub fn of(&self, w: &DMatrix<T>, residual: Option<&DMatrix<T>>) -> (DMatrix<T>, Vec<f64>) {
        let starts: Vec<usize> = (0..w.nrows()).step_by(STRIP).collect();
        let strips: Vec<(DMatrix<T>, f64)> = starts
            .par_iter()
            .map(|&start| {
                let rows = STRIP.min(w.nrows() - start);
                let w = w.rows(start, rows);
                let mut toward = w * &self.cross;
                if let Some(residual) = residual {
                    toward += residual.rows(start, rows);
                }
                let mut shift = toward.clone();
                cholesky::solve_right(&self.lower, &mut shift);
                let t = self.strength.exact();
                let gain = (2.0 - t) * t * toward.dot(&shift).exact()
                    + t * t * self.ridge * shift.norm_squared().exact();
                (w + shift * self.strength, gain)
            })
            .collect();
        let mut target = w.clone();
        let mut gains = Vec::with_capacity(strips.len());
        for (start, (strip, gain)) in starts.into_iter().zip(strips) {
            gains.push(gain);
            target.rows_mut(start, strip.nrows()).copy_from(&strip);
        }
        (target, gains)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, cols: usize, seed: usize) -> DMatrix<f64> {
        DMatrix::from_fn(rows, cols, |r, c| {
            ((r * 37 + c * 101 + seed * 13 + r * c * 7) % 97) as f64 / 48.0 - 1.0
        })
    }

    #[test]
    fn no_weights_near_the_target_come_closer_to_the_dense_output() {
        let (tokens, n) = (150, 70);
        let (x, w) = (matrix(tokens, n, 1), matrix(3, n, 2));
        let dense = &x + matrix(tokens, n, 3) * 0.2;
        let (gram, cross) = (x.transpose() * &x, (&dense - &x).transpose() * &x);
        for strength in [1.0, 0.3] {
            let shift = Target::new(&gram, cross.clone(), 0.01, strength).unwrap();
            let (target, gains) = shift.of(&w, None);
            let gained = gains.iter().sum::<f64>();
            let lost =
                |v: &DMatrix<f64>| (&dense * w.transpose() - &x * v.transpose()).norm_squared();
            let closer = lost(&w) - lost(&target);
            assert!(
                closer > 0.0 && (gained / closer - 1.0).abs() < 1e-9,
                "{gained} {closer}"
            );
        }
        let (target, _) = Target::new(&gram, cross, 0.01, 1.0).unwrap().of(&w, None);
        let ridge = 0.01 * gram.trace() / n as f64;
        let loss = |v: &DMatrix<f64>| {
            (&dense * w.transpose() - &x * v.transpose()).norm_squared()
                + ridge * (v - &w).norm_squared()
        };
        let least = loss(&target);
        assert!(least < loss(&w));
        for (r, c) in [(0, 0), (1, 33), (2, 69)] {
            for step in [1e-3, -1e-3] {
                let mut other = target.clone();
                other[(r, c)] += step;
                assert!(least < loss(&other), "({r}, {c}) {step}");
            }
        }
    }

    #[test]
    fn what_a_residual_stream_has_lost_is_made_up_for_in_the_sum() {
        let (tokens, n, features) = (150, 70, 3);
        let (x, w) = (matrix(tokens, n, 1), matrix(features, n, 2));
        let dense = &x + matrix(tokens, n, 3) * 0.2;
        let lost = matrix(tokens, features, 6) * 4.0; // R_d - R
        let (gram, cross) = (x.transpose() * &x, (&dense - &x).transpose() * &x);
        let residual = lost.transpose() * &x;
        let shift = Target::new(&gram, cross, 0.01, 1.0).unwrap();
        let (target, gains) = shift.of(&w, Some(&residual));
        let gained = gains.iter().sum::<f64>();
        let distance =
            |v: &DMatrix<f64>| (&lost + &dense * w.transpose() - &x * v.transpose()).norm_squared();
        let closer = distance(&w) - distance(&target);
        assert!(closer > 0.0 && (gained / closer - 1.0).abs() < 1e-9);
        let ridge = 0.01 * gram.trace() / n as f64;
        let loss = |v: &DMatrix<f64>| distance(v) + ridge * (v - &w).norm_squared();
        for (r, c) in [(0, 0), (1, 33), (2, 69)] {
            for step in [1e-3, -1e-3] {
                let mut other = target.clone();
                other[(r, c)] += step;
                assert!(loss(&target) < loss(&other), "({r}, {c}) {step}");
            }
        }
    }

    #[test]
    fn strength_zero_leaves_the_weights_as_they_are() {
        let (x, w) = (matrix(40, 12, 1), matrix(130, 12, 2));
        let (gram, cross) = (x.transpose() * &x, matrix(12, 12, 5));
        let target = Target::new(&gram, cross, 0.1, 0.0).unwrap();
        assert_eq!(target.of(&w, None), (w, vec![0.0; 3]));
    }

    #[test]
    fn inputs_that_have_not_drifted_leave_the_weights_as_they_are() {
        let (x, w) = (matrix(40, 12, 1), matrix(5, 12, 2));
        let gram = x.transpose() * &x;
        let cross = DMatrix::zeros(12, 12);
        let target = Target::new(&gram, cross, 0.1, 1.0).unwrap();
        assert_eq!(target.of(&w, None), (w, vec![0.0]));
    }
}
