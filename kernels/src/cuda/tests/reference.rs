//! GPTQ in f64 on the host, right-looking, straight from the definition.

use half::f16;

use crate::cuda::{Settings, factor::panels};

/// Codes and parameters of one layer, by the sweep's position.
pub(super) struct Reference {
    /// The original column at each position.
    pub(super) order: Vec<usize>,
    /// Codes by row and original column.
    pub(super) codes: Vec<i32>,
    /// Dequantised weights by row and original column.
    pub(super) weight: Vec<f64>,
    /// The group of each original column.
    pub(super) group: Vec<usize>,
}

/// `XᵀX` in f64.
pub(super) fn gram(x: &[f16], n: usize) -> Vec<f64> {
    let mut gram = vec![0.0; n * n];
    for row in x.chunks_exact(n) {
        let row: Vec<f64> = row.iter().map(|v| v.to_f64()).collect();
        for (i, a) in row.iter().enumerate() {
            for (g, b) in gram[i * n..][..n].iter_mut().zip(&row) {
                *g += a * b;
            }
        }
    }
    gram
}

/// The upper `U` with `H⁻¹ = UᵀU`: `U = M⁻¹` where `H = MMᵀ`, `M` upper.
fn factor(h: &[f64], n: usize) -> Vec<f64> {
    let mut m = vec![0.0; n * n];
    for j in (0..n).rev() {
        let squares: f64 = m[j * n..][j + 1..n].iter().map(|v| v * v).sum();
        m[j * n + j] = (h[j * n + j] - squares).sqrt();
        for i in 0..j {
            let dot: f64 = (j + 1..n).map(|k| m[i * n + k] * m[j * n + k]).sum();
            m[i * n + j] = (h[i * n + j] - dot) / m[j * n + j];
        }
    }
    let mut u = vec![0.0; n * n];
    for j in (0..n).rev() {
        u[j * n + j] = 1.0 / m[j * n + j];
        for k in j + 1..n {
            let dot: f64 = (j + 1..=k).map(|i| m[j * n + i] * u[i * n + k]).sum();
            u[j * n + k] = -dot / m[j * n + j];
        }
    }
    u
}

fn parameters(values: impl Iterator<Item = f64>, settings: Settings) -> (f64, f64) {
    let max_code = f64::from((1 << settings.bits) - 1);
    let (mut low, mut high) = values.fold((0.0_f64, 0.0_f64), |(l, h), v| (l.min(v), h.max(v)));
    if low == 0.0 && high == 0.0 {
        (low, high) = (-1.0, 1.0);
    }
    let range = if settings.symmetric {
        2.0 * high.max(-low)
    } else {
        high - low
    };
    let scale = f16::from_f32(range as f32 / max_code as f32)
        .to_f64()
        .max(2.0_f64.powi(-24));
    let zero = if settings.symmetric {
        (max_code + 1.0) / 2.0
    } else {
        (-low / scale).round_ties_even().clamp(0.0, max_code)
    };
    (scale, zero)
}

/// Quantises `weight` f16 `[rows, n]` with the Gram matrix `gram`.
pub(super) fn solve(
    gram: &[f64],
    n: usize,
    weight: &[f16],
    settings: Settings,
    tokens: usize,
    activation_order: bool,
    damping: f64,
) -> Reference {
    let mut diagonal: Vec<f64> = (0..n).map(|i| gram[i * n + i]).collect();
    let dead: Vec<bool> = diagonal.iter().map(|&d| d == 0.0).collect();
    let mut order: Vec<usize> = (0..n).collect();
    if activation_order {
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]));
    }
    for (d, _) in diagonal.iter_mut().zip(&dead).filter(|(_, dead)| **dead) {
        *d = tokens as f64 / 2.0;
    }
    let mean = diagonal.iter().sum::<f64>() / n as f64;
    let mut h = vec![0.0; n * n];
    for (i, &a) in order.iter().enumerate() {
        for (j, &b) in order.iter().enumerate() {
            h[i * n + j] = gram[a * n + b];
        }
        h[i * n + i] = diagonal[a] + damping * mean;
    }
    let u = factor(&h, n);
    let size = settings.group_size.unwrap_or(n).min(n);
    let max_code = f64::from((1 << settings.bits) - 1);
    let rows = weight.len() / n;
    let group_at = |at: usize| if settings.static_groups { order[at] } else { at } / size;
    let mut result = Reference {
        codes: vec![0; rows * n],
        weight: vec![0.0; rows * n],
        group: (0..n).map(|_| 0).collect(),
        order: order.clone(),
    };
    for (at, &column) in order.iter().enumerate() {
        result.group[column] = group_at(at);
    }
    for row in 0..rows {
        let original: Vec<f64> = (0..n)
            .map(|c| {
                if dead[c] {
                    0.0
                } else {
                    weight[row * n + c].to_f64()
                }
            })
            .collect();
        let mut w: Vec<f64> = order.iter().map(|&c| original[c]).collect();
        let mut known = vec![(1.0, 0.0); n.div_ceil(size)];
        if settings.static_groups {
            for (group, values) in original.chunks(size).enumerate() {
                known[group] = parameters(values.iter().copied(), settings);
            }
        }
        let width = if settings.static_groups { 128 } else { size };
        for panel in panels(n, width) {
            if !settings.static_groups {
                for start in panel.clone().filter(|at| at.is_multiple_of(size)) {
                    let end = n.min(start + size);
                    known[start / size] = parameters(w[start..end].iter().copied(), settings);
                }
            }
            let mut errors = vec![0.0; panel.len()];
            for j in panel.clone() {
                let (scale, zero) = known[group_at(j)];
                let code = ((w[j] / scale).round_ties_even() + zero).clamp(0.0, max_code);
                let q = scale * (code - zero);
                let error = (w[j] - q) / u[j * n + j];
                errors[j - panel.start] = error;
                for k in j..panel.end {
                    w[k] -= error * u[j * n + k];
                }
                result.codes[row * n + order[j]] = code as i32;
                result.weight[row * n + order[j]] = q;
            }
            for j in panel.clone() {
                for k in panel.end..n {
                    w[k] -= errors[j - panel.start] * u[j * n + k];
                }
            }
        }
    }
    result
}

/// `tr(D H Dᵀ)` for `D` `[rows, n]`.
pub(super) fn energy(gram: &[f64], n: usize, d: &[f64]) -> f64 {
    d.chunks_exact(n)
        .map(|row| {
            (0..n)
                .map(|i| {
                    let dot: f64 = row.iter().zip(&gram[i * n..]).map(|(a, b)| a * b).sum();
                    row[i] * dot
                })
                .sum::<f64>()
        })
        .sum()
}
