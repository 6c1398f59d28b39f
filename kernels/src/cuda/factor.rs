//! The factors for GPTQ's sweep: one Cholesky of each damped, reordered Gram matrix.
//!
//! With the columns in the order of the sweep, `J` the reversal and `H` the damped Gram matrix,
//! `J·H·J = L·Lᵀ` (cuSOLVER, f32) gives `M = J·L·J`, upper, with `H = M·Mᵀ`, and the factor `U` of
//! `H⁻¹ = UᵀU` is `M⁻¹`. cuSOLVER writes `L` column-major, and `L` read backwards is `M`,
//! column-major: the reversal costs one pass, and read row-major the result is `Mᵀ`. Of `U` only
//! the diagonal blocks are formed.

use std::ops::Range;

use burn::tensor::DType;
use cubecl::prelude::*;

use super::{
    buffer::{self, Buffer, array, matrix, part, rows_by},
    cholesky::{Failed, cholesky_of, damped},
    error::Error,
};

/// Maximum number of columns per panel.
pub(crate) const PANEL: usize = 128;
const UNITS: u32 = 256;

/// `diagonal[i] = gram[i, i]`.
#[cube(launch_unchecked)]
fn diagonal_kernel(gram: &Array<f32>, diagonal: &mut Array<f32>, n: u32) {
    if ABSOLUTE_POS < n as usize {
        diagonal[ABSOLUTE_POS] = gram[ABSOLUTE_POS * (n as usize + 1)];
    }
}

/// The damped Gram matrix in the sweep's order, both triangles.
#[cube(launch_unchecked)]
fn reordered_kernel(
    gram: &Array<f32>,
    order: &Array<u32>,
    diagonal: &Array<f32>,
    out: &mut Array<f32>,
    n: u32,
    across: u32,
) {
    let i = CUBE_POS_X / across;
    let j = CUBE_POS_X % across * UNITS + UNIT_POS;
    if j < n {
        let a = order[i as usize];
        let b = order[j as usize];
        let row = a.min(b) as usize;
        let mut value = gram[row * n as usize + a.max(b) as usize];
        if i == j {
            value = diagonal[a as usize];
        }
        out[i as usize * n as usize + j as usize] = value;
    }
}

/// Reverses each run of `length` values in place.
#[cube(launch_unchecked)]
fn reverse_kernel(values: &mut Array<f32>, length: u32) {
    let first = CUBE_POS_X as usize * UNITS as usize + UNIT_POS as usize;
    let length = length as usize;
    if first < length / 2 {
        let run = CUBE_POS_Y as usize * length;
        let last = length - 1 - first;
        let a = values[run + first];
        let b = values[run + last];
        values[run + first] = b;
        values[run + last] = a;
    }
}

/// Inverts the diagonal blocks of each matrix whose transpose is in `m`, each block padded with the identity
/// to `PANEL` square: one cube per block, one unit per column, back substitution.
#[cube(launch_unchecked)]
fn invert_kernel(m: &Array<f32>, starts: &Array<u32>, out: &mut Array<f32>, n: u32) {
    let n = n as usize;
    let block = CUBE_POS_X as usize;
    let base = CUBE_POS_Y as usize * n * n;
    let into = CUBE_POS_Y as usize * CUBE_COUNT_X as usize + block;
    let start = starts[block] as usize;
    let width = starts[block + 1] as usize - start;
    let column = UNIT_POS as usize;
    let mut x = SharedMemory::<f32>::new(PANEL * PANEL);
    for i in 0..PANEL {
        let mut unit = f32::new(0.0);
        if i == column {
            unit = f32::new(1.0);
        }
        x[i * PANEL + column] = unit;
    }
    if column < width {
        let mut step = 0;
        while step < width {
            let i = width - 1 - step;
            let corner = base + start * n + start + i;
            let mut sum = x[i * PANEL + column];
            let mut k = i + 1;
            while k < width {
                sum -= m[corner + k * n] * x[k * PANEL + column];
                k += 1;
            }
            x[i * PANEL + column] = sum / m[corner + i * n];
            step += 1;
        }
    }
    for i in 0..PANEL {
        out[(into * PANEL + i) * PANEL + column] = x[i * PANEL + column];
    }
}

/// Order of the columns, and data from the diagonal.
pub(crate) struct Columns {
    /// Diagonal of the Gram matrix, by original column.
    pub(crate) diagonal: Vec<f32>,
    /// Original column at each position of the sweep.
    pub(crate) order: Vec<u32>,
    /// Position of each original column.
    pub(crate) position: Vec<u32>,
    /// Number of dead columns.
    pub(crate) dead: usize,
}

/// Factored Gram matrices of one size.
pub(crate) struct DeviceFactors {
    /// `Mᵀ` of each, f32 row-major `[problems, n, n]` in the sweep's order, of which only the lower triangle is
    /// defined.
    pub(crate) m: Buffer,
    /// `M`'s diagonal, f32 `[problems, n]`: an error in column `k` costs its square times `M_kk²`.
    pub(crate) pivots: Buffer,
    /// Order of the columns of each.
    pub(crate) columns: Vec<Columns>,
    /// The damping used for each, as a fraction of the mean diagonal.
    pub(crate) damping: Vec<f64>,
}

impl DeviceFactors {
    /// Rows of a matrix.
    pub(crate) fn size(&self) -> usize {
        self.m.meta.shape()[1]
    }
}

/// Factors Gram matrices, f32 `[n, n]` each, of which the upper triangles are read.
///
/// # Errors
///
/// A diagonal that is not finite, or failure at every damping up to [`MAX_DAMPING`].
pub(crate) fn factor(
    grams: &[Buffer],
    activation_order: bool,
    damping: f64,
) -> Result<DeviceFactors, Failed> {
    let (count, n) = (grams.len(), grams[0].meta.shape()[0]);
    let columns: Vec<Columns> = (diagonals(grams)?.into_iter())
        .map(|diagonal| sorted(diagonal, activation_order))
        .collect();
    let order = columns.iter().flat_map(|it| it.order.iter().copied());
    let order = buffer::upload(&grams[0], &order.collect::<Vec<_>>(), DType::U32);
    let m = buffer::empty(&grams[0], [count, n, n], DType::F32);
    let diagonals: Vec<&[f32]> = columns.iter().map(|it| &*it.diagonal).collect();
    let damping = cholesky_of(grams, &order, &diagonals, damping, &m)?;
    reverse(&m);
    let pivots = buffer::empty(&m, [count, n], DType::F32);
    for problem in 0..count {
        read_diagonal(&matrix(&m, problem), &part(&pivots, problem * n, [n]));
    }
    Ok(DeviceFactors {
        m,
        pivots,
        columns,
        damping,
    })
}

/// Returns the damped Gram matrices that `factors` were made from, f32 `[problems, n, n]` in the sweep's order.
pub(crate) fn reordered(grams: &[Buffer], factors: &DeviceFactors) -> Buffer {
    let (count, n) = (grams.len(), factors.size());
    let out = buffer::empty(&grams[0], [count, n, n], DType::F32);
    let of = factors.columns.iter().zip(&factors.damping);
    for (at, (columns, &damping)) in of.enumerate() {
        let diagonal = damped(&columns.diagonal, damping);
        // SAFETY: `i` and `j` stay below n, and the order holds columns below n.
        unsafe {
            reordered_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &out.client,
                rows_by(n, n, UNITS as usize),
                CubeDim::new_1d(UNITS),
                array(&grams[at]),
                array(&buffer::upload(&out, &columns.order, DType::U32)),
                array(&buffer::upload(&out, &diagonal, DType::F32)),
                array(&matrix(&out, at)),
                n as u32,
                (n as u32).div_ceil(UNITS),
            );
        }
    }
    out
}

/// Reads back the diagonals of square matrices of one size, together.
///
/// # Errors
///
/// A value that is not finite.
pub(crate) fn diagonals(matrices: &[Buffer]) -> Result<Vec<Vec<f32>>, Failed> {
    let n = matrices[0].meta.shape()[1];
    let out = buffer::empty(&matrices[0], [matrices.len(), n], DType::F32);
    for (at, matrix) in matrices.iter().enumerate() {
        read_diagonal(matrix, &part(&out, at * n, [n]));
    }
    let all: Vec<f32> = buffer::download(&out)?;
    let diagonals = all.chunks_exact(n).enumerate();
    let diagonals = diagonals.map(|(at, diagonal)| {
        match diagonal.iter().position(|value| !value.is_finite()) {
            Some(column) => Err(Failed {
                at,
                error: Error::NotFinite { column },
            }),
            None => Ok(diagonal.to_vec()),
        }
    });
    diagonals.collect()
}

/// Copies the diagonal of a matrix with `n` columns and at least as many rows to `out`, f32 `[n]`.
fn read_diagonal(matrix: &Buffer, out: &Buffer) {
    let n = out.meta.shape()[0];
    // SAFETY: the index stays below `n * n`, at most the matrix's length, and `n`.
    unsafe {
        diagonal_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            CubeCount::new_1d((n as u32).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS),
            array(matrix),
            array(out),
            n as u32,
        );
    }
}

/// Sorts the columns by descending diagonal, ties by index, or keeps the original order.
fn sorted(diagonal: Vec<f32>, activation_order: bool) -> Columns {
    let mut order: Vec<u32> = (0..diagonal.len() as u32).collect();
    if activation_order {
        order.sort_by(|&a, &b| diagonal[b as usize].total_cmp(&diagonal[a as usize]));
    }
    let mut position = vec![0; order.len()];
    for (at, &column) in order.iter().enumerate() {
        position[column as usize] = at as u32;
    }
    Columns {
        dead: diagonal.iter().filter(|&&value| value == 0.0).count(),
        diagonal,
        order,
        position,
    }
}

/// Reverses each of some matrices.
fn reverse(matrices: &Buffer) {
    let shape = matrices.meta.shape();
    let (count, length) = (shape[0] as u32, (shape[1] * shape[2]) as u32);
    // SAFETY: both ends stay below the length, and runs inside the buffer.
    unsafe {
        reverse_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &matrices.client,
            CubeCount::new_2d((length / 2).div_ceil(UNITS).max(1), count),
            CubeDim::new_1d(UNITS),
            array(matrices),
            length,
        );
    }
}

/// Returns the column panels of the sweep: at most [`PANEL`] wide, cut at group boundaries, and of
/// whole groups if these are narrower.
pub(crate) fn panels(in_features: usize, group: usize) -> Vec<Range<usize>> {
    let mut panels = Vec::new();
    let stretch = if group <= PANEL {
        group * (PANEL / group)
    } else {
        group
    };
    for outer in (0..in_features).step_by(stretch) {
        let end = in_features.min(outer + stretch);
        panels.extend(
            (outer..end)
                .step_by(PANEL)
                .map(|at| at..end.min(at + PANEL)),
        );
    }
    panels
}

/// Returns the inverses of the diagonal blocks of each `M`, f32 `[problems, panels, PANEL, PANEL]`, padded with the
/// identity.
pub(crate) fn block_inverses(factors: &DeviceFactors, panels: &[Range<usize>]) -> Buffer {
    let n = factors.size() as u32;
    let count = factors.columns.len();
    let mut starts: Vec<u32> = panels.iter().map(|panel| panel.start as u32).collect();
    starts.push(n);
    let starts = buffer::upload(&factors.m, &starts, DType::U32);
    let shape = [count, panels.len(), PANEL, PANEL];
    let out = buffer::empty(&factors.m, shape, DType::F32);
    // SAFETY: the blocks lie on the diagonals of m; shared and output indices stay below PANEL² a block.
    unsafe {
        invert_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            CubeCount::new_2d(panels.len() as u32, count as u32),
            CubeDim::new_1d(PANEL as u32),
            array(&factors.m),
            array(&starts),
            array(&out),
            n,
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_sorted_by_descending_diagonal_with_ties_by_index() {
        let columns = sorted(vec![1.0, 3.0, 0.0, 3.0], true);
        assert_eq!(columns.order, [1, 3, 0, 2]);
        assert_eq!(columns.position, [2, 0, 3, 1]);
        assert_eq!(columns.dead, 1);
    }

    #[test]
    fn panels_hold_whole_groups_or_cut_one_at_its_boundary() {
        assert_eq!(panels(300, 300), [0..128, 128..256, 256..300]);
        assert_eq!(panels(200, 96), [0..96, 96..192, 192..200]);
        assert_eq!(panels(256, 32), [0..128, 128..256]);
        assert_eq!(panels(384, 192), [0..128, 128..192, 192..320, 320..384]);
    }
}
