//! Coordinate descent on the codes, after the sweep.
//!
//! The sweep rounds a column knowing only the errors of those before it. With all codes known, the
//! loss `tr((W - Q) H (W - Q)ᵀ)` is quadratic in each weight, with its minimum at `q_j + r_j /
//! H_jj` for `R = (W - Q) H`; a pass rounds every column to that in turn, in the sweep's order,
//! with scales and zero points fixed. A step that changes `q_j` by `δ` subtracts `δ H_j` from the
//! row of `R`. No step raises the loss: the code nearest to the minimum of a parabola is its best.
//!
//! Works in panels like the sweep: a panel's steps update only its own columns of `R`, and their
//! sum is then subtracted from the rest at once.

use nalgebra::DMatrix;
use rayon::prelude::*;

use crate::{Factor, Grid, Real, STRIP, Solution, factor::with_damping};

/// Columns per panel.
const PANEL: usize = 128;

/// Result of a refinement.
#[derive(Clone, Debug)]
pub struct Refined<T: Real> {
    /// Reduction of the loss in each strip of [`STRIP`] rows.
    pub gains: Vec<f64>,
    /// `[out, in]`: the real numbers that were rounded to the codes in the last pass, within half a step of them;
    /// without a pass, the codes.
    pub unrounded: DMatrix<T>,
}

/// Refines the codes of `solution` for `w [out, in]` in `passes` passes, with the Gram matrix
/// damped as in `factor`.
pub fn refine<T: Real>(
    w: &DMatrix<T>,
    gram: &DMatrix<T>,
    factor: &Factor<T>,
    solution: &mut Solution<T>,
    passes: usize,
) -> Refined<T> {
    if passes == 0 {
        return Refined {
            gains: vec![0.0; w.nrows().div_ceil(STRIP)],
            unrounded: solution.codes.map(|code| T::of(f64::from(code))),
        };
    }
    let (n_out, n) = w.shape();
    let order = &factor.order;
    let damped = with_damping(gram, factor.damping);
    let h = DMatrix::from_fn(n, n, |r, c| damped[(order[r], order[c])]);
    let starts: Vec<usize> = (0..n_out).step_by(STRIP).collect();
    let strips: Vec<Strip<T>> = starts
        .par_iter()
        .map(|&start| strip(w, &h, factor, solution, start, passes))
        .collect();
    let mut refined = Refined {
        gains: Vec::with_capacity(strips.len()),
        unrounded: DMatrix::zeros(n_out, n),
    };
    for (start, strip) in starts.into_iter().zip(strips) {
        let rows = strip.codes.nrows();
        refined.gains.push(strip.gained);
        let unrounded = &mut refined.unrounded;
        unrounded.rows_mut(start, rows).copy_from(&strip.unrounded);
        solution.codes.rows_mut(start, rows).copy_from(&strip.codes);
    }
    refined
}

/// New codes of one strip of rows, in original column order.
struct Strip<T: Real> {
    codes: DMatrix<u8>,
    unrounded: DMatrix<T>,
    gained: f64,
}

/// Refines one strip.
fn strip<T: Real>(
    w: &DMatrix<T>,
    h: &DMatrix<T>,
    factor: &Factor<T>,
    solution: &Solution<T>,
    start: usize,
    passes: usize,
) -> Strip<T> {
    let n = w.ncols();
    let rows = STRIP.min(w.nrows() - start);
    let order = &factor.order;
    let max_code = T::of(f64::from(solution.bits.max_code()));
    let grid = |r: usize, column: usize| {
        let at = (start + r, solution.g_idx[column]);
        Grid {
            scale: solution.scales[at],
            zero: T::of(f64::from(solution.zeros[at])),
            max_code,
        }
    };
    let mut codes = solution.codes.rows(start, rows).into_owned();
    let mut q = DMatrix::from_fn(rows, n, |r, k| {
        let grid = grid(r, order[k]);
        grid.scale * (T::of(f64::from(codes[(r, order[k])])) - grid.zero)
    });
    let mut dead = vec![false; n];
    for &column in &factor.dead {
        dead[column] = true;
    }
    let off = DMatrix::from_fn(rows, n, |r, k| match dead[order[k]] {
        true => T::zero(),
        false => w[(start + r, order[k])] - q[(r, k)],
    });
    let mut residual = off * h;
    let mut unrounded = DMatrix::<T>::zeros(rows, n);
    let mut gained = 0.0;
    for _ in 0..passes {
        for first in (0..n).step_by(PANEL) {
            let width = PANEL.min(n - first);
            let mut block = residual.columns(first, width).into_owned();
            let mut steps = DMatrix::<T>::zeros(rows, width);
            for j in 0..width {
                let (k, column) = (first + j, order[first + j]);
                for r in 0..rows {
                    let best = q[(r, k)] + block[(r, j)] / h[(k, k)];
                    let grid = grid(r, column);
                    let (code, value) = grid.round(best);
                    let half = T::of(0.5);
                    let exact = best / grid.scale + grid.zero;
                    unrounded[(r, column)] = exact.max(code - half).min(code + half);
                    codes[(r, column)] = code.exact() as u8;
                    let step = value - q[(r, k)];
                    let twice = block[(r, j)] + block[(r, j)];
                    gained += (step * (twice - step * h[(k, k)])).exact();
                    steps[(r, j)] = step;
                    q[(r, k)] = value;
                }
                for later in j + 1..width {
                    let factor = h[(k, first + later)];
                    block
                        .column_mut(later)
                        .axpy(-factor, &steps.column(j), T::one());
                }
            }
            residual.gemm(-T::one(), &steps, &h.rows(first, width), T::one());
        }
    }
    Strip {
        codes,
        unrounded,
        gained,
    }
}

#[cfg(test)]
mod tests {
    use gptq_format::{Bits, GroupSize};

    use super::*;
    use crate::{Settings, output_energy, solve};

    #[test]
    fn every_pass_lowers_the_loss_until_none_does() {
        let (n_out, n, tokens) = (70, 160, 300);
        let x = DMatrix::from_fn(tokens, n, |t, c| {
            (((t * 31 + c * 17 + t * c * 3) % 101) as f64 / 50.0 - 1.0) * (1.0 + (c % 7) as f64)
                + ((t * 13) % 29) as f64 / 29.0
        });
        let mut w = DMatrix::from_fn(n_out, n, |r, c| {
            ((r * 29 + c * 53 + r * c * 11) % 89) as f64 / 44.0 - 1.0
        });
        let mut gram = x.transpose() * &x;
        // A dead column stays at zero.
        gram.row_mut(5).fill(0.0);
        gram.column_mut(5).fill(0.0);
        for (sym, act_order) in [(true, true), (false, false)] {
            let settings = Settings {
                bits: Bits::Two,
                group_size: GroupSize::Columns(32),
                sym,
                static_groups: false,
                scale_search: true,
                f16_scales: true,
                refine: 0,
            };
            let factor = Factor::new(&gram, act_order, 0.01).unwrap();
            w.column_mut(5).fill(0.0);
            let damped = with_damping(&gram, 0.01);
            let loss =
                |solution: &Solution<f64>| output_energy(&(&w - solution.dequantize()), &damped);
            let mut solution = solve(&w, &factor, &settings);
            let grids = (solution.scales.clone(), solution.zeros.clone());
            let mut losses = vec![loss(&solution)];
            for _ in 0..60 {
                let refined = refine(&w, &gram, &factor, &mut solution, 1);
                let gained = refined.gains.iter().sum::<f64>();
                // Rounded, the unrounded numbers are the codes.
                let pairs = refined.unrounded.iter().zip(solution.codes.iter());
                let mut off = pairs.map(|(exact, &code)| (exact - f64::from(code)).abs());
                assert!(off.all(|off| off <= 0.5));
                losses.push(loss(&solution));
                let lower = losses[losses.len() - 2] - losses[losses.len() - 1];
                assert!(
                    (gained - lower).abs() <= 1e-9 * losses[0],
                    "{gained} for {lower}"
                );
            }
            // The loss is a sum of some ten thousand products.
            let rounding = 1e-9 * losses[0];
            assert!(losses.windows(2).all(|pair| pair[1] <= pair[0] + rounding));
            assert!(losses[1] < 0.97 * losses[0], "{losses:?}");
            assert!(losses[59] - losses[60] <= rounding);
            assert_eq!(grids, (solution.scales.clone(), solution.zeros.clone()));
            let zero = solution.dequantize().column(5).norm();
            assert_eq!(zero, 0.0);

            let mut together = solve(&w, &factor, &settings);
            refine(&w, &gram, &factor, &mut together, 60);
            assert_eq!(together.codes, solution.codes);
        }
    }
}
