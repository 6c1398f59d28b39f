//! Output energies from the Gram matrix, without another pass over the inputs.

use nalgebra::DMatrix;
use rayon::prelude::*;

use crate::{Real, STRIP};

/// Computes `‖AX‖² = tr(A H Aᵀ)` for `a [rows, in]` and the undamped Gram matrix `H = XᵀX [in,
/// in]`.
///
/// The relative output error of a linear layer is `output_energy(W - Q) / output_energy(W)`.
pub fn output_energy<T: Real>(a: &DMatrix<T>, gram: &DMatrix<T>) -> f64 {
    output_energies(a, gram).iter().sum()
}

/// Computes the same for each strip of [`STRIP`] rows.
pub fn output_energies<T: Real>(a: &DMatrix<T>, gram: &DMatrix<T>) -> Vec<f64> {
    assert_eq!(a.ncols(), gram.nrows(), "one column per input");
    let starts: Vec<usize> = (0..a.nrows()).step_by(STRIP).collect();
    starts
        .into_par_iter()
        .map(|start| {
            let strip = a.rows(start, STRIP.min(a.nrows() - start));
            let product = strip * gram;
            strip
                .iter()
                .zip(product.iter())
                .map(|(x, y)| x.exact() * y.exact())
                .sum()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn energy_from_the_gram_matrix_equals_the_direct_one() {
        let x = DMatrix::from_fn(6, 50, |r, c| ((r * 13 + c * 7) % 17) as f64 - 8.0);
        let a = DMatrix::from_fn(130, 6, |r, c| ((r * 5 + c * 3) % 7) as f64 - 3.0);
        let direct = (&a * &x).norm_squared();
        let energy = output_energy(&a, &(&x * x.transpose()));
        assert!((energy - direct).abs() < 1e-12 * direct);
    }
}
