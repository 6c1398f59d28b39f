//! The factorization the sweep needs, from one Cholesky.
//!
//! GPTQ uses the upper `U` with `H⁻¹ = UᵀU`. With `J` the reversal, `JHJ = LLᵀ` gives `M = JLJ`,
//! upper triangular with `H = MMᵀ`, and `U = M⁻¹`: no inverse is ever formed. The sweep is
//! left-looking over panels `b`: before one, `W_b += (W - Q)_{<b} P_b` with
//! `P_b = M_{<b,b} M_bb⁻¹`; inside it, AutoGPTQ's loop with `U_bb = M_bb⁻¹`.

use nalgebra::DMatrix;

use crate::{Real, SolverError, cholesky};

/// Largest damping tried, as a fraction of the mean diagonal.
pub const MAX_DAMPING: f64 = 1.0;
/// Lower bound of the second damping tried, for recipes whose own is smaller.
const FIRST_RAISE: f64 = 0.01;

/// Returns the damping to try after `failed`, which is below [`MAX_DAMPING`].
pub fn raised(failed: f64) -> f64 {
    (2.0 * failed).clamp(FIRST_RAISE, MAX_DAMPING)
}

/// `H`, permuted, damped and factored.
#[derive(Clone, Debug)]
pub struct Factor<T: Real> {
    /// `order[k]` is the original column solved `k`-th.
    pub order: Vec<usize>,
    /// `M` upper triangular, `H = MMᵀ` in solving order.
    pub upper: DMatrix<T>,
    /// Columns whose input is always zero, ascending; their weights are set to zero.
    pub dead: Vec<usize>,
    /// The damping that succeeded, as a fraction of the mean diagonal.
    pub damping: f64,
}

/// Returns the columns whose input is always zero.
pub fn dead_columns<T: Real>(gram: &DMatrix<T>) -> Vec<usize> {
    let zero = |j: &usize| gram[(*j, *j)] == T::zero();
    (0..gram.nrows()).filter(zero).collect()
}

/// Returns `gram` with `damping` times the mean diagonal added to the diagonal, and 1 for dead
/// columns.
pub(crate) fn with_damping<T: Real>(gram: &DMatrix<T>, damping: f64) -> DMatrix<T> {
    let n = gram.nrows();
    let mean = (0..n).map(|j| gram[(j, j)].exact()).sum::<f64>() / n as f64;
    let mut damped = gram.clone();
    for j in 0..n {
        match damped[(j, j)] == T::zero() {
            true => damped[(j, j)] = T::one(),
            false => damped[(j, j)] += T::of(damping * mean),
        }
    }
    damped
}

/// Returns the result of `factor` on the damped matrix, and the damping that succeeded: on failure,
/// damping is doubled up to the mean diagonal itself.
pub(crate) fn damped<T: Real, F>(
    gram: &DMatrix<T>,
    damping: f64,
    factor: impl Fn(DMatrix<T>) -> Option<F>,
) -> Result<(F, f64), SolverError> {
    let n = gram.nrows();
    if let Some(at) = gram.iter().position(|v| !v.is_finite()) {
        let (row, col) = (at % n, at / n);
        return Err(SolverError::NonFiniteGram { row, col });
    }
    let mut tried = damping;
    loop {
        if let Some(factor) = factor(with_damping(gram, tried)) {
            return Ok((factor, tried));
        }
        if tried >= MAX_DAMPING {
            return Err(SolverError::NotPositiveDefinite { tried });
        }
        tried = raised(tried);
    }
}

impl<T: Real> Factor<T> {
    /// Factors `gram [in, in]` (symmetric; scaling it changes nothing).
    ///
    /// `act_order` solves columns by descending diagonal, ties by index. `damping`, times the mean
    /// diagonal, is added to the diagonal; if the factorization fails, it is doubled up to the mean
    /// diagonal itself.
    ///
    /// # Errors
    /// A non-finite element, or failure at every damping.
    pub fn new(gram: &DMatrix<T>, act_order: bool, damping: f64) -> Result<Self, SolverError> {
        let n = gram.nrows();
        assert_eq!(gram.ncols(), n, "a Gram matrix is square");
        let mut order: Vec<usize> = (0..n).collect();
        if act_order {
            let diagonal: Vec<f64> = (0..n).map(|j| gram[(j, j)].exact()).collect();
            order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
        }

        let reversed = |damped: DMatrix<T>| {
            let at = |k: usize| order[n - 1 - k];
            cholesky::lower(DMatrix::from_fn(n, n, |r, c| damped[(at(r), at(c))]))
        };
        let (lower, damping) = damped(gram, damping, reversed)?;
        let upper = DMatrix::from_fn(n, n, |r, c| lower[(n - 1 - r, n - 1 - c)]);
        Ok(Factor {
            order,
            upper,
            dead: dead_columns(gram),
            damping,
        })
    }

    /// Returns the loss caused by a squared rounding error of 1 in the column solved `k`-th.
    ///
    /// GPTQ's loss is the sum over columns of `(w_j - q_j)² / U_jj²`, taken when column `j` is
    /// rounded, and `1 / U_jj = M_jj`.
    pub(crate) fn cost(&self, k: usize) -> T {
        match self.upper.is_empty() {
            true => T::one(),
            false => self.upper[(k, k)] * self.upper[(k, k)],
        }
    }

    /// Returns [`Factor::cost`] of every original column.
    pub(crate) fn costs_by_column(&self) -> Vec<T> {
        let mut costs = vec![T::zero(); self.order.len()];
        for (k, &column) in self.order.iter().enumerate() {
            costs[column] = self.cost(k);
        }
        costs
    }

    /// Returns `P_b` above and `U_bb` on the diagonal blocks of width `panel`, in one matrix; zero
    /// below.
    pub(crate) fn panels(&self, panel: usize) -> DMatrix<T> {
        let n = self.upper.nrows();
        let mut panels = DMatrix::zeros(n, n);
        for start in (0..n).step_by(panel) {
            let width = panel.min(n - start);
            let m_bb = self.upper.view((start, start), (width, width));
            let u_bb = m_bb
                .solve_upper_triangular(&DMatrix::identity(width, width))
                .expect("the diagonal of a Cholesky factor is positive");
            let above = self.upper.view((0, start), (start, width)) * &u_bb;
            panels
                .view_mut((0, start), (start, width))
                .copy_from(&above);
            panels
                .view_mut((start, start), (width, width))
                .copy_from(&u_bb);
        }
        panels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn act_order_is_by_descending_diagonal_with_ties_by_index() {
        let gram = DMatrix::from_diagonal(&nalgebra::dvector![1.0, 3.0, 0.0, 3.0]);
        let factor = Factor::new(&gram, true, 0.1).unwrap();
        assert_eq!(factor.order, [1, 3, 0, 2]);
        assert_eq!(factor.dead, [2]);
    }

    #[test]
    fn the_upper_factor_squares_to_the_damped_matrix() {
        let x = DMatrix::from_fn(5, 9, |r, c| ((r * 7 + c * c * 3) % 11) as f64 - 5.0);
        let gram = &x * x.transpose();
        let factor = Factor::new(&gram, false, 0.1).unwrap();
        let damped = &gram + DMatrix::identity(5, 5) * (0.1 * gram.trace() / 5.0);
        assert!((&factor.upper * factor.upper.transpose() - damped).norm() < 1e-10);
        assert_eq!(factor.upper[(4, 0)], 0.0);
    }

    #[test]
    fn damping_is_raised_until_a_singular_matrix_factors() {
        let gram = DMatrix::from_element(200, 200, 1.0f64);
        let factor = Factor::new(&gram, false, 0.0).unwrap();
        assert!(factor.damping >= FIRST_RAISE);
        // Negative definite: no damping up to the limit helps.
        let hopeless = DMatrix::from_fn(2, 2, |r, c| if r == c { 1.0 } else { 9.0 });
        let error = Factor::new(&hopeless, false, 0.1).unwrap_err();
        assert_eq!(error, SolverError::NotPositiveDefinite { tried: 1.0 });
        let nan = DMatrix::from_element(2, 2, f64::NAN);
        assert_eq!(
            Factor::new(&nan, false, 0.1).unwrap_err(),
            SolverError::NonFiniteGram { row: 0, col: 0 }
        );
    }
}
