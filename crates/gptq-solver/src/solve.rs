//! The column sweep.
//!
//! Rows do not depend on each other, so the work is cut into strips of rows; a strip walks the
//! panels from left to right (see [`Factor`] for the update before a panel). Inside a panel, for
//! each column `j`: round `w_j` on its group's grid, `err = (w_j - q_j) / U_jj`, and
//! `w_k -= err U_jk` for the panel's later columns.

use gptq_format::{Bits, QuantizedLinear};
use half::f16;
use nalgebra::DMatrix;
use rayon::prelude::*;

use crate::{Factor, Grid, Real, STRIP, Settings};

/// Columns per panel, as in AutoGPTQ.
const BLOCK: usize = 128;

/// Codes and grids of one linear layer.
#[derive(Clone, Debug)]
pub struct Solution<T: Real> {
    /// Code width.
    pub bits: Bits,
    /// `[out, in]`, original column order.
    pub codes: DMatrix<u8>,
    /// `[out, groups]`.
    pub scales: DMatrix<T>,
    /// `[out, groups]`.
    pub zeros: DMatrix<u8>,
    /// `[in]`, the group of each original column.
    pub g_idx: Vec<usize>,
    /// Reduction of the groups' losses by the scale search in each strip of [`STRIP`] rows, in the Gram matrix's unit;
    /// see [`Gains`](crate::Gains).
    pub search_gains: Vec<f64>,
}

impl<T: Real> Solution<T> {
    /// Returns the dequantized weights, `[out, in]`.
    pub fn dequantize(&self) -> DMatrix<T> {
        DMatrix::from_fn(self.codes.nrows(), self.codes.ncols(), |r, c| {
            let g = self.g_idx[c];
            let steps = f64::from(self.codes[(r, c)]) - f64::from(self.zeros[(r, g)]);
            self.scales[(r, g)] * T::of(steps)
        })
    }

    /// Converts to the format's types; scales round to f16 (exactly, if [`Settings::f16_scales`]
    /// was on).
    pub fn into_quantized(self) -> QuantizedLinear {
        // A column-major [out, x] matrix has the memory layout of the row-major [x, out] of the
        // format.
        QuantizedLinear {
            bits: self.bits,
            in_features: self.codes.ncols(),
            out_features: self.codes.nrows(),
            codes: self.codes.as_slice().to_vec(),
            scales: self
                .scales
                .iter()
                .map(|s| f16::from_f64(s.exact()))
                .collect(),
            zeros: self.zeros.as_slice().to_vec(),
            g_idx: self.g_idx.iter().map(|&g| g as i32).collect(),
        }
    }
}

/// Runs GPTQ: returns codes for `w [out, in]` given the factored Hessian of its inputs.
pub fn solve<T: Real>(w: &DMatrix<T>, factor: &Factor<T>, settings: &Settings) -> Solution<T> {
    solve_in_blocks(w, factor, settings, BLOCK)
}

/// Rounds to nearest: each group's plain grid, each weight to its nearest code. This is the
/// baseline of every report, so it never searches scales.
pub fn round_to_nearest<T: Real>(w: &DMatrix<T>, settings: &Settings) -> Solution<T> {
    let n = w.ncols();
    // With a diagonal Hessian no error is propagated, and GPTQ is round to nearest.
    let factor = Factor {
        order: (0..n).collect(),
        upper: DMatrix::zeros(0, 0),
        dead: Vec::new(),
        damping: 0.0,
    };
    let plain = Settings {
        scale_search: false,
        ..*settings
    };
    sweep(w, &factor, &plain, None, BLOCK)
}

fn solve_in_blocks<T: Real>(
    w: &DMatrix<T>,
    factor: &Factor<T>,
    settings: &Settings,
    block: usize,
) -> Solution<T> {
    let panels = factor.panels(settings.panel(w.ncols(), block));
    sweep(w, factor, settings, Some(&panels), block)
}

/// Result of one strip of rows.
struct Strip<T: Real> {
    codes: DMatrix<u8>,
    scales: DMatrix<T>,
    zeros: DMatrix<u8>,
    search_gain: f64,
}

fn sweep<T: Real>(
    w: &DMatrix<T>,
    factor: &Factor<T>,
    settings: &Settings,
    panels: Option<&DMatrix<T>>,
    block: usize,
) -> Solution<T> {
    let (n_out, n_in) = w.shape();
    assert_eq!(factor.order.len(), n_in, "one factored column per input");
    let panel = settings.panel(n_in, block);
    let group = settings.group_size.columns(n_in);
    let groups = settings.group_size.groups(n_in);
    let mut g_idx = vec![0; n_in];
    for (k, &original) in factor.order.iter().enumerate() {
        let at = if settings.static_groups { original } else { k };
        g_idx[original] = at / group;
    }

    let starts: Vec<usize> = (0..n_out).step_by(STRIP).collect();
    let strips: Vec<Strip<T>> = starts
        .par_iter()
        .map(|&start| {
            let rows = STRIP.min(n_out - start);
            let mut w = w.rows(start, rows).into_owned();
            for &j in &factor.dead {
                w.column_mut(j).fill(T::zero());
            }
            strip(w, factor, &g_idx, settings, panels, panel)
        })
        .collect();

    let mut solution = Solution {
        bits: settings.bits,
        codes: DMatrix::zeros(n_out, n_in),
        scales: DMatrix::zeros(n_out, groups),
        zeros: DMatrix::zeros(n_out, groups),
        g_idx,
        search_gains: strips.iter().map(|strip| strip.search_gain).collect(),
    };
    for (&start, strip) in starts.iter().zip(&strips) {
        let rows = strip.codes.nrows();
        solution.codes.rows_mut(start, rows).copy_from(&strip.codes);
        solution
            .scales
            .rows_mut(start, rows)
            .copy_from(&strip.scales);
        solution.zeros.rows_mut(start, rows).copy_from(&strip.zeros);
    }
    solution
}

fn strip<T: Real>(
    original: DMatrix<T>,
    factor: &Factor<T>,
    g_idx: &[usize],
    settings: &Settings,
    panels: Option<&DMatrix<T>>,
    panel: usize,
) -> Strip<T> {
    let (rows, n_in) = original.shape();
    let group = settings.group_size.columns(n_in);
    let groups = settings.group_size.groups(n_in);
    // Groups whose grid is fitted to the weights before the sweep.
    let fixed = settings.static_groups || groups == 1;
    let mut grids: Vec<(Grid<T>, T)> = Vec::with_capacity(rows * groups); // [groups, rows], with gains
    let order = &factor.order;
    if fixed {
        let costs = factor.costs_by_column();
        for g in 0..groups {
            let columns = g * group..((g + 1) * group).min(n_in);
            grids.extend((0..rows).map(|r| {
                let weights = columns.clone().map(|c| (original[(r, c)], costs[c]));
                Grid::fit(weights, settings)
            }));
        }
    }

    let mut w = DMatrix::from_fn(rows, n_in, |r, k| original[(r, order[k])]);
    let mut d = DMatrix::<T>::zeros(rows, n_in); // W - Q of finished columns, in solving order
    let mut codes = DMatrix::<u8>::zeros(rows, n_in);
    for start in (0..n_in).step_by(panel) {
        let end = (start + panel).min(n_in);
        if let Some(panels) = panels.filter(|_| start > 0) {
            let done = d.columns(0, start);
            let above = panels.view((0, start), (start, end - start));
            w.columns_mut(start, end - start)
                .gemm(T::one(), &done, &above, T::one());
        }
        if !fixed {
            // All grids of the panel are fitted before any of its columns is rounded.
            for first in (start..end).step_by(group) {
                let columns = first..(first + group).min(n_in);
                grids.extend((0..rows).map(|r| {
                    Grid::fit(
                        columns.clone().map(|k| (w[(r, k)], factor.cost(k))),
                        settings,
                    )
                }));
            }
        }
        for j in start..end {
            let g = g_idx[order[j]];
            let (mut column, mut later) = w.columns_range_pair_mut(j, j + 1..end);
            for r in 0..rows {
                let (code, q) = grids[g * rows + r].0.round(column[r]);
                codes[(r, order[j])] = code.exact() as u8;
                // `d` is measured from the original weight: `P_b` requires that.
                d[(r, j)] = original[(r, order[j])] - q;
                column[r] -= q;
            }
            if let Some(panels) = panels {
                let scale = T::one() / panels[(j, j)];
                for k in j + 1..end {
                    let factor = panels[(j, k)] * scale;
                    later.column_mut(k - j - 1).axpy(-factor, &column, T::one());
                }
            }
        }
    }

    let grid = |r: usize, g: usize| grids[g * rows + r].0;
    Strip {
        codes,
        scales: DMatrix::from_fn(rows, groups, |r, g| grid(r, g).scale),
        zeros: DMatrix::from_fn(rows, groups, |r, g| grid(r, g).zero.exact() as u8),
        search_gain: grids.iter().map(|(_, gain)| gain.exact()).sum(),
    }
}

#[cfg(test)]
mod tests;
