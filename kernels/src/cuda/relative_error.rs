//! Relative output error of a linear layer with approximated weights.
//!
//! `‖(W - Ŵ)X‖² / ‖WX‖² = tr(D H Dᵀ) / tr(W H Wᵀ)` with the undamped Gram matrix `H`. The products
//! run on the tensor cores in bf16: with `s_j = sqrt(H_jj)`, `H_ij / (s_i s_j)` is the correlation
//! matrix, whose diagonal is exactly 1, and `D_j s_j` contains the scale, so that no element under-
//! or overflows. Both are rounded to nearest, 2^-9 relative at random signs over at least `in²`
//! terms; sums are f32 per unit and f64 over units. The result has a relative error of about 1e-3
//! (a test compares with f64), enough for a reported number; no code depends on it.

use burn::tensor::{DType, Tensor};
use cubecl::prelude::*;
use half::bf16;

use super::{
    Cuda,
    blas::{Element, MatrixAt, product},
    buffer::{self, Buffer, array, rows_by},
    error::Error,
    stream::on_stream_later,
};

const UNITS: usize = 256;
const PLANES: usize = 8;
/// Number of partial sums per reduction.
const CUBES: usize = 264;

/// `out[i, j] = gram / (s_i s_j)`, both triangles from the upper one; 0 for dead columns.
#[cube(launch_unchecked)]
fn correlation_kernel(
    gram: &Array<f32>,
    inverse: &Array<f32>,
    out: &mut Array<bf16>,
    n: u32,
    across: u32,
) {
    let i = CUBE_POS_X / across;
    let j = CUBE_POS_X % across * UNITS as u32 + UNIT_POS;
    if j < n {
        let n = n as usize;
        let value = gram[i.min(j) as usize * n + i.max(j) as usize];
        let value = value * inverse[i as usize] * inverse[j as usize];
        out[i as usize * n + j as usize] = bf16::cast_from(value);
    }
}

/// `out[r, j] = (a[r, j] - b[r, j]) s_j`, or without `b`.
#[cube(launch_unchecked)]
fn scaled_kernel<F: Float>(
    a: &Array<F>,
    b: &Array<F>,
    scale: &Array<f32>,
    out: &mut Array<bf16>,
    columns: u32,
    across: u32,
    #[comptime] difference: bool,
    #[define(F)] _dtype: StorageType,
) {
    let column = (CUBE_POS_X % across) as usize * UNITS + UNIT_POS as usize;
    if column < columns as usize {
        let at = (CUBE_POS_X / across) as usize * columns as usize + column;
        let mut value = f32::cast_from(a[at]);
        if comptime!(difference) {
            value -= f32::cast_from(b[at]);
        }
        out[at] = bf16::cast_from(value * scale[column]);
    }
}

/// `out[slot, cube] =` this cube's share of `Σ a b`.
#[cube(launch_unchecked)]
fn dot_kernel<F: Float>(
    a: &Array<F>,
    b: &Array<f32>,
    out: &mut Array<f32>,
    length: u32,
    slot: u32,
    #[define(F)] _dtype: StorageType,
) {
    let mut sum = f32::new(0.0);
    let mut at = ABSOLUTE_POS;
    while at < length as usize {
        sum += f32::cast_from(a[at]) * b[at];
        at += UNITS * CUBES;
    }
    reduce(sum, out, slot);
}

/// `out[slot, cube] =` this cube's share of the sum of `width` columns from `first` on, over
/// `lines` lines of `stride` values.
#[cube(launch_unchecked)]
fn sum_kernel(
    values: &Array<f32>,
    out: &mut Array<f32>,
    lines: u32,
    stride: u32,
    first: u32,
    width: u32,
    slot: u32,
) {
    let mut sum = f32::new(0.0);
    let width = width as usize;
    let mut at = ABSOLUTE_POS;
    while at < lines as usize * width {
        sum += values[at / width * stride as usize + first as usize + at % width];
        at += UNITS * CUBES;
    }
    reduce(sum, out, slot);
}

/// Writes the sum over a cube's units.
#[cube]
fn reduce(sum: f32, out: &mut Array<f32>, slot: u32) {
    let sum = plane_sum(sum);
    let mut partial = SharedMemory::<f32>::new(PLANES);
    if UNIT_POS_PLANE == 0 {
        partial[(UNIT_POS / PLANE_DIM) as usize] = sum;
    }
    sync_cube();
    if UNIT_POS == 0 {
        let mut total = f32::new(0.0);
        #[unroll]
        for plane in 0..PLANES {
            total += partial[plane];
        }
        out[slot as usize * CUBES + CUBE_POS_X as usize] = total;
    }
}

/// A Gram matrix prepared for computing errors.
pub(crate) struct Correlation {
    matrix: Buffer,
    scale: Buffer,
}

impl Correlation {
    /// Prepares the upper triangle of a Gram matrix, f32 `[n, n]`, given its diagonal.
    pub(crate) fn new(gram: &Buffer, diagonal: &[f32]) -> Self {
        let n = diagonal.len();
        let scale: Vec<f32> = diagonal.iter().map(|value| value.sqrt()).collect();
        let inverse: Vec<f32> = scale
            .iter()
            .map(|&s| if s == 0.0 { 0.0 } else { 1.0 / s })
            .collect();
        let inverse = buffer::upload(gram, &inverse, DType::F32);
        let matrix = buffer::empty(gram, [n, n], DType::BF16);
        // SAFETY: both indices stay below n.
        unsafe {
            correlation_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &matrix.client,
                rows_by(n, n, UNITS),
                CubeDim::new_1d(UNITS as u32),
                array(gram),
                array(&inverse),
                array(&matrix),
                n as u32,
                n.div_ceil(UNITS) as u32,
            );
        }
        Self {
            matrix,
            scale: buffer::upload(gram, &scale, DType::F32),
        }
    }
}

/// Quantity that is summed for a layer.
#[derive(Clone, Copy)]
pub(crate) enum Sum {
    /// `‖WX‖²`.
    Output,
    /// `‖(W - Q)X‖²`.
    Lost,
    /// The same for round to nearest.
    Nearest,
    /// Reduction of the groups' losses by the scale search.
    Searched,
    /// Reduction of the rows' losses by refinement.
    Refined,
    /// `‖WX‖²` on the windows used to estimate the activation mismatch.
    Drifted,
    /// `tr(W C Sᵀ)`, see [`MismatchTarget`](super::target::MismatchTarget).
    Toward,
    /// `‖S‖²`.
    Shift,
    /// `‖(W' - Q)X‖²` with the weights `W'` after activation-mismatch correction.
    Objective,
}

/// Number of [`Sum`]s.
const SUMS: usize = 9;

/// Sums of one layer; 0 if not measured.
#[derive(Clone, Copy)]
pub(crate) struct Sums([f64; SUMS]);

impl Sums {
    /// Returns one of the sums.
    pub(crate) fn of(&self, sum: Sum) -> f64 {
        self.0[sum as usize]
    }

    /// Returns `part` relative to `whole`; 0 for a layer whose output is zero.
    pub(crate) fn part(part: f64, whole: f64) -> f64 {
        if whole == 0.0 { 0.0 } else { part / whole }
    }
}

/// Sums over several layers, computed on the device and read back together.
pub(crate) struct Measurement {
    sums: Buffer,
}

impl Measurement {
    /// Allocates sums for `count` layers.
    pub(crate) fn new(like: &Buffer, count: usize) -> Self {
        Self {
            sums: buffer::upload(like, &vec![0.0_f32; count * SUMS * CUBES], DType::F32),
        }
    }

    /// Enqueues `tr(W H Wᵀ)`, f16 or bf16 `[rows, n]`, of the layer `at`.
    pub(crate) fn energy(
        &self,
        correlation: &Correlation,
        weight: &Buffer,
        into: (usize, Sum),
    ) -> Result<(), Error> {
        self.difference(correlation, weight, None, into)
    }

    /// Enqueues `tr(D H Dᵀ)` for `D = a - b`, `[rows, n]` of one dtype.
    pub(crate) fn loss(
        &self,
        correlation: &Correlation,
        [a, b]: [&Buffer; 2],
        into: (usize, Sum),
    ) -> Result<(), Error> {
        self.difference(correlation, a, Some(b), into)
    }

    fn difference(
        &self,
        correlation: &Correlation,
        a: &Buffer,
        b: Option<&Buffer>,
        into: (usize, Sum),
    ) -> Result<(), Error> {
        let [rows, n] = [a.meta.shape()[0], a.meta.shape()[1]];
        let scaled = buffer::empty(a, [rows, n], DType::BF16);
        let image = buffer::empty(a, [rows, n], DType::F32);
        // SAFETY: rows and columns stay inside the shapes; without `b` its argument is not
        // read.
        unsafe {
            scaled_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &scaled.client,
                rows_by(rows, n, UNITS),
                CubeDim::new_1d(UNITS as u32),
                array(a),
                array(b.unwrap_or(a)),
                array(&correlation.scale),
                array(&scaled),
                n as u32,
                n.div_ceil(UNITS) as u32,
                b.is_some(),
                a.dtype.into(),
            );
        }
        let buffers = [&scaled, &correlation.matrix, &image];
        on_stream_later(&buffers, move |libraries, pointers| {
            let scaled = MatrixAt::at(pointers[0], 0, n, Element::Bf16);
            let matrix = MatrixAt::at(pointers[1], 0, n, Element::Bf16);
            let image = MatrixAt::at(pointers[2], 0, n, Element::F32);
            // SAFETY: three distinct contiguous buffers of these shapes.
            unsafe { product(libraries, [rows, n, n], scaled, matrix, 0.0, image) }
        })?;
        self.dot([&scaled, &image], into);
        Ok(())
    }

    /// Enqueues `Σ a b` for two buffers of one shape, `b` f32.
    pub(crate) fn dot(&self, [a, b]: [&Buffer; 2], (at, sum): (usize, Sum)) {
        // SAFETY: indices stay below the length that both have, and the slot's partial sums inside
        // `sums`.
        unsafe {
            dot_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &self.sums.client,
                CubeCount::new_1d(CUBES as u32),
                CubeDim::new_1d(UNITS as u32),
                array(a),
                array(b),
                array(&self.sums),
                a.meta.shape().num_elements() as u32,
                (at * SUMS + sum as usize) as u32,
                a.dtype.into(),
            );
        }
    }

    /// Enqueues the sum of the columns `first..first + width` of `values`, f32 `[.., columns]`.
    pub(crate) fn columns(
        &self,
        values: &Buffer,
        [first, width]: [usize; 2],
        (at, sum): (usize, Sum),
    ) {
        let shape = values.meta.shape();
        let stride = shape[shape.num_dims() - 1];
        // SAFETY: the columns lie inside a line, the lines inside `values`, and the slot's partial
        // sums inside `sums`.
        unsafe {
            sum_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &self.sums.client,
                CubeCount::new_1d(CUBES as u32),
                CubeDim::new_1d(UNITS as u32),
                array(values),
                array(&self.sums),
                (shape.num_elements() / stride) as u32,
                stride as u32,
                first as u32,
                width as u32,
                (at * SUMS + sum as usize) as u32,
            );
        }
    }

    /// Returns the sums of each layer; waits for the device.
    pub(crate) fn read(self) -> Result<Vec<Sums>, Error> {
        let sums: Vec<f32> = buffer::download(&self.sums)?;
        let sum = |values: &[f32]| values.iter().copied().map(f64::from).sum::<f64>();
        let layers = sums.chunks_exact(SUMS * CUBES);
        Ok(layers
            .map(|layer| {
                let mut sums = [0.0; SUMS];
                for (into, partial) in sums.iter_mut().zip(layer.chunks_exact(CUBES)) {
                    *into = sum(partial);
                }
                Sums(sums)
            })
            .collect())
    }
}

/// Computes `‖(W - Ŵ)X‖² / ‖WX‖²` for `weight` and `approximation` `[out, in]`, f16 or bf16, and
/// `gram` f32 `[in, in]`, of which the upper triangle is read. Waits for the device.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes, or a cuBLAS failure.
pub fn relative_error(
    gram: Tensor<Cuda, 2>,
    weight: Tensor<Cuda, 2>,
    approximation: Tensor<Cuda, 2>,
) -> Result<f64, Error> {
    let of = "relative_error";
    let n = weight.dims()[1];
    if weight.dims() != approximation.dims() || gram.dims() != [n, n] {
        return Err(Error::Shape {
            operation: of,
            reason: format!(
                "gram {:?}, weight {:?}, approximation {:?}",
                gram.dims(),
                weight.dims(),
                approximation.dims()
            ),
        });
    }
    let gram = buffer::float(of, "gram", gram, DType::F32)?;
    let weight = buffer::half(of, "weight", weight)?;
    let approximation = buffer::float(of, "approximation", approximation, weight.dtype)?;
    let diagonals = super::factor::diagonals(std::slice::from_ref(&gram));
    let diagonals = diagonals.map_err(|failed| failed.error)?;
    let correlation = Correlation::new(&gram, &diagonals[0]);
    let measurement = Measurement::new(&gram, 1);
    measurement.energy(&correlation, &weight, (0, Sum::Output))?;
    measurement.loss(&correlation, [&weight, &approximation], (0, Sum::Lost))?;
    let sums = measurement.read()?[0];
    Ok(Sums::part(sums.of(Sum::Lost), sums.of(Sum::Output)))
}
