//! The factor for GPTQ's sweep: one Cholesky of the damped, reordered Gram matrix.
//!
//! With the columns in the order of the sweep, `J` the reversal and `H` the damped Gram matrix,
//! `J·H·J = L·Lᵀ` (cuSOLVER, f32) gives `M = J·L·J`, upper, with `H = M·Mᵀ`, and the factor `U` of
//! `H⁻¹ = UᵀU` is `M⁻¹`. cuSOLVER writes `L` column-major, and `L` read backwards is `M`,
//! column-major: the reversal costs one pass, and read row-major the result is `Mᵀ`. Of `U` only
//! the diagonal blocks are formed.
//!
//! Dead columns (zero on the diagonal) get the diagonal 1. Damping adds a fraction of the mean
//! diagonal, dead columns counted as zero. If the factorization fails, the fraction is raised as in
//! `gptq_solver::Factor` ([`raised`]), up to [`MAX_DAMPING`].

use std::ops::Range;

use burn::tensor::DType;
use cubecl::prelude::*;
use cudarc::cusolver::{result::CusolverError, sys as cusolver};
use gptq_solver::{MAX_DAMPING, raised};

use super::{
    buffer::{self, Buffer, array, rows_by},
    error::Error,
    stream::on_stream,
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

/// The upper triangle of `J·H·J`: element `(i, j)` is the Gram matrix's at the `i`-th and `j`-th
/// columns from the end of the sweep, with its diagonal replaced.
#[cube(launch_unchecked)]
fn arrange_kernel(
    gram: &Array<f32>,
    order: &Array<u32>,
    diagonal: &Array<f32>,
    out: &mut Array<f32>,
    n: u32,
    across: u32,
) {
    let i = CUBE_POS_X / across;
    let j = CUBE_POS_X % across * UNITS + UNIT_POS;
    if j >= i && j < n {
        let a = order[(n - 1 - i) as usize];
        let b = order[(n - 1 - j) as usize];
        let row = a.min(b);
        let column = a.max(b);
        let mut value = gram[row as usize * n as usize + column as usize];
        if i == j {
            value = diagonal[a as usize];
        }
        out[i as usize * n as usize + j as usize] = value;
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

/// Reverses the whole array in place.
#[cube(launch_unchecked)]
fn reverse_kernel(values: &mut Array<f32>, length: u32) {
    let first = ABSOLUTE_POS;
    if first < (length / 2) as usize {
        let last = length as usize - 1 - first;
        let a = values[first];
        let b = values[last];
        values[first] = b;
        values[last] = a;
    }
}

/// Inverts the diagonal blocks of the matrix whose transpose is `m`, each padded with the identity
/// to `PANEL` square: one cube per block, one unit per column, back substitution.
#[cube(launch_unchecked)]
fn invert_kernel(m: &Array<f32>, starts: &Array<u32>, out: &mut Array<f32>, n: u32) {
    let n = n as usize;
    let block = CUBE_POS_X as usize;
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
            let corner = start * n + start + i;
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
        out[(block * PANEL + i) * PANEL + column] = x[i * PANEL + column];
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

/// A factored Gram matrix.
pub(crate) struct DeviceFactor {
    /// `Mᵀ`, f32 row-major `[n, n]` in the sweep's order, of which only the lower triangle is
    /// defined.
    pub(crate) m: Buffer,
    /// `M`'s diagonal, f32 `[n]`: an error in column `k` costs its square times `M_kk²`.
    pub(crate) pivots: Buffer,
    /// Order of the columns.
    pub(crate) columns: Columns,
    /// The damping used, as a fraction of the mean diagonal.
    pub(crate) damping: f64,
}

/// Factors a Gram matrix, f32 `[n, n]`, of which the upper triangle is read.
///
/// # Errors
///
/// A diagonal that is not finite, or failure at every damping up to [`MAX_DAMPING`].
pub(crate) fn factor(
    gram: &Buffer,
    activation_order: bool,
    damping: f64,
) -> Result<DeviceFactor, Error> {
    let n = gram.meta.shape()[0];
    let columns = sorted(diagonal(gram)?, activation_order);
    let order = buffer::upload(gram, &columns.order, DType::U32);
    let m = buffer::empty(gram, [n, n], DType::F32);
    let damping = cholesky_of(gram, &order, &columns.diagonal, damping, &m)?;
    reverse(&m);
    Ok(DeviceFactor {
        pivots: diagonal_of(&m),
        m,
        columns,
        damping,
    })
}

/// Returns the Cholesky factor of a damped Gram matrix in the original column order, for
/// [`solve_right`], and the value added to its diagonal.
///
/// # Errors
///
/// The same errors as [`factor`].
pub(crate) fn unordered(
    gram: &Buffer,
    diagonal: &[f32],
    damping: f64,
) -> Result<(Buffer, f64), Error> {
    let n = gram.meta.shape()[0];
    let reversed: Vec<u32> = (0..n as u32).rev().collect();
    let order = buffer::upload(gram, &reversed, DType::U32);
    let lower = buffer::empty(gram, [n, n], DType::F32);
    let damping = cholesky_of(gram, &order, diagonal, damping, &lower)?;
    Ok((lower, damping * mean(diagonal)))
}

/// Writes the Cholesky factor of the damped Gram matrix, from the last column of `order` to its
/// first, to `out`: lower, column-major. Returns the damping that succeeded.
fn cholesky_of(
    gram: &Buffer,
    order: &Buffer,
    diagonal: &[f32],
    damping: f64,
    out: &Buffer,
) -> Result<f64, Error> {
    let mut tried = damping;
    loop {
        arrange(gram, order, &damped(diagonal, tried), out);
        if cholesky(out)? {
            return Ok(tried);
        }
        if tried >= MAX_DAMPING {
            return Err(Error::NotPositiveDefinite { damping: tried });
        }
        tried = raised(tried);
    }
}

/// Returns the diagonal with a fraction of its mean added, and 1 for dead columns.
fn damped(diagonal: &[f32], damping: f64) -> Vec<f32> {
    let mean = mean(diagonal);
    let damped = |&value: &f32| match value {
        0.0 => 1.0,
        value => (f64::from(value) + damping * mean) as f32,
    };
    diagonal.iter().map(damped).collect()
}

fn mean(diagonal: &[f32]) -> f64 {
    diagonal.iter().copied().map(f64::from).sum::<f64>() / diagonal.len() as f64
}

/// Returns the damped Gram matrix that `factor` was made from, f32 `[n, n]` in the sweep's order.
pub(crate) fn reordered(gram: &Buffer, factor: &DeviceFactor) -> Buffer {
    let n = factor.columns.order.len();
    let out = buffer::empty(gram, [n, n], DType::F32);
    let diagonal = damped(&factor.columns.diagonal, factor.damping);
    // SAFETY: `i` and `j` stay below n, and the order holds columns below n.
    unsafe {
        reordered_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            rows_by(n, n, UNITS as usize),
            CubeDim::new_1d(UNITS),
            array(gram),
            array(&buffer::upload(gram, &factor.columns.order, DType::U32)),
            array(&buffer::upload(gram, &diagonal, DType::F32)),
            array(&out),
            n as u32,
            (n as u32).div_ceil(UNITS),
        );
    }
    out
}

/// Solves `x ← x A⁻¹` for `x` f32 `[rows, n]`, given the factor of `A` from [`unordered`].
///
/// # Errors
///
/// A cuSOLVER failure.
pub(crate) fn solve_right(lower: &Buffer, x: &Buffer) -> Result<(), Error> {
    let [rows, n] = [x.meta.shape()[0], x.meta.shape()[1]].map(|size| size as i32);
    let info = buffer::empty(x, [1], DType::I32);
    on_stream(&[lower, x, &info], |libraries, pointers| {
        // SAFETY: the factor is n by n; x, column-major, is n by rows; info is one integer.
        unsafe {
            cusolver::cusolverDnSpotrs(
                libraries.cusolver,
                cusolver::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER,
                n,
                rows,
                pointers[0] as *const f32,
                n,
                pointers[1] as *mut f32,
                n,
                pointers[2] as *mut i32,
            )
        }
        .result()
        .map_err(|source: CusolverError| Error::Cusolver {
            operation: "cusolverDnSpotrs",
            source,
        })
    })
}

/// Reads back the diagonal of a Gram matrix.
///
/// # Errors
///
/// A value that is not finite.
pub(crate) fn diagonal(gram: &Buffer) -> Result<Vec<f32>, Error> {
    let diagonal: Vec<f32> = buffer::download(&diagonal_of(gram))?;
    if let Some(column) = diagonal.iter().position(|value| !value.is_finite()) {
        return Err(Error::NotFinite { column });
    }
    Ok(diagonal)
}

/// Returns the diagonal of a square matrix.
fn diagonal_of(matrix: &Buffer) -> Buffer {
    let n = matrix.meta.shape()[0];
    let out = buffer::empty(matrix, [n], DType::F32);
    // SAFETY: the index stays below `n * n`, the matrix's length, and `n`.
    unsafe {
        diagonal_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            CubeCount::new_1d((n as u32).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS),
            array(matrix),
            array(&out),
            n as u32,
        );
    }
    out
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

fn arrange(gram: &Buffer, order: &Buffer, diagonal: &[f32], out: &Buffer) {
    let n = gram.meta.shape()[0] as u32;
    let diagonal = buffer::upload(gram, diagonal, DType::F32);
    // SAFETY: `i <= j < n`, and the order holds columns below `n`.
    unsafe {
        arrange_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            rows_by(n as usize, n as usize, UNITS as usize),
            CubeDim::new_1d(UNITS),
            array(gram),
            array(order),
            array(&diagonal),
            array(out),
            n,
            n.div_ceil(UNITS),
        );
    }
}

fn reverse(values: &Buffer) {
    let length = values.meta.shape().num_elements() as u32;
    // SAFETY: both ends stay below the length.
    unsafe {
        reverse_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &values.client,
            CubeCount::new_1d((length / 2).div_ceil(UNITS).max(1)),
            CubeDim::new_1d(UNITS),
            array(values),
            length,
        );
    }
}

/// Factors the row-major upper triangle in place; returns true if it is positive definite.
fn cholesky(a: &Buffer) -> Result<bool, Error> {
    let n = a.meta.shape()[0] as i32;
    // Row-major upper is cuSOLVER's column-major lower, its faster side.
    let fill = cusolver::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;
    let status = |operation| {
        move |status: cusolver::cusolverStatus_t| {
            status
                .result()
                .map_err(|source: CusolverError| Error::Cusolver { operation, source })
        }
    };
    let length = on_stream(&[a], |libraries, pointers| {
        let mut length = 0;
        // SAFETY: `a` is n by n; the length is written before the call returns.
        let code = unsafe {
            cusolver::cusolverDnSpotrf_bufferSize(
                libraries.cusolver,
                fill,
                n,
                pointers[0] as *mut f32,
                n,
                &raw mut length,
            )
        };
        status("cusolverDnSpotrf_bufferSize")(code)?;
        Ok(length)
    })?;
    let workspace = buffer::empty(a, [length.max(1) as usize], DType::F32);
    let info = buffer::empty(a, [1], DType::I32);
    on_stream(&[a, &workspace, &info], |libraries, pointers| {
        // SAFETY: `a` is n by n, the workspace as long as cuSOLVER asked, and info one integer.
        let code = unsafe {
            cusolver::cusolverDnSpotrf(
                libraries.cusolver,
                fill,
                n,
                pointers[0] as *mut f32,
                n,
                pointers[1] as *mut f32,
                length,
                pointers[2] as *mut i32,
            )
        };
        status("cusolverDnSpotrf")(code)
    })?;
    // A positive number is the index of the first pivot that failed; wrong arguments would have
    // failed the call above.
    Ok(buffer::download::<i32>(&info)?[0] == 0)
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

/// Returns the inverses of `M`'s diagonal blocks, f32 `[panels, PANEL, PANEL]`, padded with the
/// identity.
pub(crate) fn block_inverses(factor: &DeviceFactor, panels: &[Range<usize>]) -> Buffer {
    let n = factor.columns.order.len() as u32;
    let mut starts: Vec<u32> = panels.iter().map(|panel| panel.start as u32).collect();
    starts.push(n);
    let starts = buffer::upload(&factor.m, &starts, DType::U32);
    let out = buffer::empty(&factor.m, [panels.len(), PANEL, PANEL], DType::F32);
    // SAFETY: the blocks lie on m's diagonal; shared and output indices stay below PANEL².
    unsafe {
        invert_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            CubeCount::new_1d(panels.len() as u32),
            CubeDim::new_1d(PANEL as u32),
            array(&factor.m),
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
