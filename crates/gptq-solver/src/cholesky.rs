//! Blocked Cholesky, `A = LLᵀ`: nalgebra's own is unblocked and several times slower from about a
//! thousand columns.

use nalgebra::{Cholesky, DMatrix};

use crate::Real;

/// Columns factored at once; small enough for the unblocked kernel's cache, large enough for the
/// trailing products to dominate.
const BLOCK: usize = 64;

/// Returns the lower factor of the symmetric `a`, of which only the lower triangle is read; `None`
/// if it is not positive definite. The result's upper triangle is zero.
pub(crate) fn lower<T: Real>(mut a: DMatrix<T>) -> Option<DMatrix<T>> {
    let n = a.nrows();
    for start in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - start);
        let end = start + width;
        let diagonal = a.view((start, start), (width, width)).into_owned();
        let diagonal = Cholesky::new(diagonal)?.unpack();
        if diagonal.diagonal().iter().any(|d| !d.is_finite()) {
            return None;
        }
        a.view_mut((start, start), (width, width))
            .copy_from(&diagonal);
        if end == n {
            break;
        }
        let inverse = diagonal.solve_lower_triangular(&DMatrix::identity(width, width))?;
        let below = a.view((end, start), (n - end, width)) * inverse.transpose();
        a.view_mut((end, start), (n - end, width)).copy_from(&below);
        for col in (end..n).step_by(BLOCK) {
            let cols = BLOCK.min(n - col);
            let left = below.rows(col - end, n - col);
            let right = below.rows(col - end, cols).transpose();
            a.view_mut((col, col), (n - col, cols))
                .gemm(-T::one(), &left, &right, T::one());
        }
    }
    a.fill_upper_triangle(T::zero(), 1);
    Some(a)
}

/// Solves `x ← x A⁻¹` for `A = LLᵀ`, given the lower factor: two triangular solves in blocks of
/// columns.
pub(crate) fn solve_right<T: Real>(lower: &DMatrix<T>, x: &mut DMatrix<T>) {
    let n = lower.nrows();
    let starts: Vec<usize> = (0..n).step_by(BLOCK).collect();
    let inverse = |start: usize, width: usize| {
        lower
            .view((start, start), (width, width))
            .solve_lower_triangular(&DMatrix::identity(width, width))
            .expect("the diagonal of a Cholesky factor is positive")
    };
    // z Lᵀ = x, from the left.
    for &start in &starts {
        let width = BLOCK.min(n - start);
        let (done, mut rest) = x.columns_range_pair_mut(0..start, start..);
        let mut block = rest.columns_mut(0, width);
        let left = lower.view((start, 0), (width, start)).transpose();
        block.gemm(-T::one(), &done, &left, T::one());
        let solved = &block * inverse(start, width).transpose();
        block.copy_from(&solved);
    }
    // x L = z, from the right.
    for &start in starts.iter().rev() {
        let width = BLOCK.min(n - start);
        let end = start + width;
        let (mut rest, done) = x.columns_range_pair_mut(0..end, end..);
        let mut block = rest.columns_mut(start, width);
        let below = lower.view((end, start), (n - end, width));
        block.gemm(-T::one(), &done, &below, T::one());
        let solved = &block * inverse(start, width);
        block.copy_from(&solved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(n: usize, m: usize) -> DMatrix<f64> {
        let mut state = 7u64;
        DMatrix::from_fn(n, m, |_, _| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (state >> 40) as f64 / (1u64 << 24) as f64 - 0.5
        })
    }

    #[test]
    fn the_factor_times_its_transpose_is_the_matrix() {
        for n in [1, 31, 64, 65, 200] {
            let x = random(n, 2 * n + 3);
            let a = &x * x.transpose();
            let l = lower(a.clone()).unwrap();
            // A backward-stable factorisation: the residual is a few ulps times n.
            assert!((&l * l.transpose() - &a).norm() < 1e-14 * n as f64 * a.norm());
        }
    }

    #[test]
    fn a_row_solved_from_the_right_times_the_matrix_is_the_row() {
        for n in [1, 31, 64, 65, 200] {
            let x = random(n, 2 * n + 3);
            let a = &x * x.transpose() + DMatrix::identity(n, n);
            let b = random(7, n);
            let mut solved = b.clone();
            solve_right(&lower(a.clone()).unwrap(), &mut solved);
            // Condition numbers here stay below a few hundred times n.
            assert!((solved * a - &b).norm() < 1e-11 * n as f64 * b.norm());
        }
    }

    #[test]
    fn an_indefinite_matrix_is_refused() {
        let mut a = DMatrix::<f64>::identity(130, 130);
        a[(100, 100)] = -1.0;
        assert!(lower(a).is_none());
        assert!(lower(DMatrix::from_element(2, 2, f64::NAN)).is_none());
    }
}
