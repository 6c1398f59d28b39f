//! Cholesky factors of damped Gram matrices, by cuSOLVER in f32, and systems solved with them.
//!
//! Dead columns (zero on the diagonal) get the diagonal 1. Damping adds a fraction of the mean
//! diagonal, dead columns counted as zero. If the factorization fails, the fraction is raised as in
//! `gptq_solver::Factor` ([`raised`]), up to [`MAX_DAMPING`].

use burn::tensor::DType;
use cubecl::prelude::*;
use cudarc::cusolver::{result::CusolverError, sys as cusolver};
use gptq_solver::{MAX_DAMPING, raised};

use super::{
    buffer::{self, Buffer, array, matrix, part, rows_by},
    error::Error,
    stream::on_stream,
};

const UNITS: u32 = 256;

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

/// An error, and which of several matrices it is of: the first, if it is of no single one.
#[derive(Debug)]
pub struct Failed {
    /// The matrix.
    pub at: usize,
    /// Its error.
    pub error: Error,
}

impl Failed {
    /// Counts `before` matrices before these.
    pub(crate) fn after(self, before: usize) -> Failed {
        Failed {
            at: self.at + before,
            ..self
        }
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed { at: 0, error }
    }
}

/// Returns the Cholesky factors of damped Gram matrices in the original column order, `[problems, n, n]`, for
/// [`solve_right`], and the values added to their diagonals.
///
/// # Errors
///
/// The same errors as [`factor`].
pub(crate) fn unordered(
    grams: &[Buffer],
    diagonals: &[Vec<f32>],
    damping: f64,
) -> Result<(Buffer, Vec<f64>), Failed> {
    let (count, n) = (grams.len(), grams[0].meta.shape()[0]);
    let reversed: Vec<u32> = (0..count).flat_map(|_| (0..n as u32).rev()).collect();
    let order = buffer::upload(&grams[0], &reversed, DType::U32);
    let lower = buffer::empty(&grams[0], [count, n, n], DType::F32);
    let diagonals: Vec<&[f32]> = diagonals.iter().map(|it| &**it).collect();
    let damping = cholesky_of(grams, &order, &diagonals, damping, &lower)?;
    let added = damping.iter().zip(diagonals);
    Ok((
        lower,
        added.map(|(damping, it)| damping * mean(it)).collect(),
    ))
}

/// Writes the Cholesky factor of each damped Gram matrix, from the last column of its `order` to its
/// first, to `out`: lower, column-major. Returns the dampings that succeeded.
pub(crate) fn cholesky_of(
    grams: &[Buffer],
    order: &Buffer,
    diagonals: &[&[f32]],
    damping: f64,
    out: &Buffer,
) -> Result<Vec<f64>, Failed> {
    let n = grams[0].meta.shape()[0];
    let mut tried = vec![damping; grams.len()];
    let mut left: Vec<usize> = (0..grams.len()).collect();
    while !left.is_empty() {
        let values = left.iter().flat_map(|&at| damped(diagonals[at], tried[at]));
        let values = buffer::upload(order, &values.collect::<Vec<_>>(), DType::F32);
        for (nth, &at) in left.iter().enumerate() {
            let order = part(order, at * n, [n]);
            let diagonal = part(&values, nth * n, [n]);
            arrange(&grams[at], &order, &diagonal, &matrix(out, at));
        }
        let matrices: Vec<Buffer> = left.iter().map(|&at| matrix(out, at)).collect();
        let factored = cholesky(&matrices)?;
        let failed = left.iter().zip(factored).filter(|(_, factored)| !factored);
        left = failed.map(|(&at, _)| at).collect();
        for &at in &left {
            if tried[at] >= MAX_DAMPING {
                let damping = tried[at];
                let error = Error::NotPositiveDefinite { damping };
                return Err(Failed { at, error });
            }
            tried[at] = raised(tried[at]);
        }
    }
    Ok(tried)
}

/// Returns the diagonal with a fraction of its mean added, and 1 for dead columns.
pub(crate) fn damped(diagonal: &[f32], damping: f64) -> Vec<f32> {
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

fn arrange(gram: &Buffer, order: &Buffer, diagonal: &Buffer, out: &Buffer) {
    let n = gram.meta.shape()[0] as u32;
    // SAFETY: `i <= j < n`, and the order holds columns below `n`.
    unsafe {
        arrange_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            rows_by(n as usize, n as usize, UNITS as usize),
            CubeDim::new_1d(UNITS),
            array(gram),
            array(order),
            array(diagonal),
            array(out),
            n,
            n.div_ceil(UNITS),
        );
    }
}

/// Factors the row-major upper triangles of matrices of one size in place; returns which are positive definite.
fn cholesky(matrices: &[Buffer]) -> Result<Vec<bool>, Error> {
    let n = matrices[0].meta.shape()[0] as i32;
    // Row-major upper is cuSOLVER's column-major lower, its faster side.
    let fill = cusolver::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER;
    let status = |operation| {
        move |status: cusolver::cusolverStatus_t| {
            status
                .result()
                .map_err(|source: CusolverError| Error::Cusolver { operation, source })
        }
    };
    let length = on_stream(&[&matrices[0]], |libraries, pointers| {
        let mut length = 0;
        // SAFETY: the matrix is n by n; the length is written before the call returns.
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
    let workspace = buffer::empty(&matrices[0], [length.max(1) as usize], DType::F32);
    let info = buffer::empty(&matrices[0], [matrices.len()], DType::I32);
    let buffers: Vec<_> = [&workspace, &info].into_iter().chain(matrices).collect();
    on_stream(&buffers, |libraries, pointers| {
        for (at, &matrix) in pointers[2..].iter().enumerate() {
            // SAFETY: the matrix is n by n, the workspace as long as cuSOLVER asked, used by one call after the
            // other, and info has an integer for each.
            let code = unsafe {
                cusolver::cusolverDnSpotrf(
                    libraries.cusolver,
                    fill,
                    n,
                    matrix as *mut f32,
                    n,
                    pointers[0] as *mut f32,
                    length,
                    (pointers[1] as *mut i32).add(at),
                )
            };
            status("cusolverDnSpotrf")(code)?;
        }
        Ok(())
    })?;
    // A positive number is the index of the first pivot that failed; wrong arguments would have
    // failed the call above.
    let infos: Vec<i32> = buffer::download(&info)?;
    Ok(infos.into_iter().map(|info| info == 0).collect())
}
