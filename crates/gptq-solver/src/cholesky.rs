//! Blocked Cholesky, `A = LLᵀ`: nalgebra's own is unblocked and several times slower from a
//! thousand columns on.

use nalgebra::{Cholesky, DMatrix};

use crate::Real;

/// Columns factored at once; small enough for the unblocked kernel's cache, large enough for the
/// trailing products to dominate.
const BLOCK: usize = 64;

/// Lower factor of the symmetric `a`, of which only the lower triangle is read; `None` when it is
/// not positive definite. The result's upper triangle is zero.
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
    fn an_indefinite_matrix_is_refused() {
        let mut a = DMatrix::<f64>::identity(130, 130);
        a[(100, 100)] = -1.0;
        assert!(lower(a).is_none());
        assert!(lower(DMatrix::from_element(2, 2, f64::NAN)).is_none());
    }
}
