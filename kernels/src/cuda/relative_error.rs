//! How much of a linear layer's output an approximation of its weights loses.
//!
//! `‖(W - Ŵ)X‖² / ‖WX‖² = tr(D H Dᵀ) / tr(W H Wᵀ)` with the undamped Gram matrix `H`. The
//! products run on the tensor cores in bf16: with `s_j = sqrt(H_jj)`, `H_ij / (s_i s_j)` is
//! the correlation matrix, whose diagonal is exactly 1, and `D_j s_j` takes up the scale, so
//! that no element under- or overflows. Both are rounded to nearest, 2^-9 relative at random
//! signs over at least `in²` terms; sums are f32 per unit and f64 over units. The result is
//! right to about 1e-3 of itself (a test compares with f64), enough for a number that is
//! reported; nothing that decides a code goes through here.

use burn::tensor::{DType, Tensor};
use cubecl::prelude::*;
use half::bf16;

use super::{
    Cuda,
    blas::{Element, Matrix, product},
    buffer::{self, Buffer, array},
    error::Error,
    stream::{Failures, on_stream_later},
};

const UNITS: usize = 256;
const PLANES: usize = 8;
/// Partial sums of one reduction.
const CUBES: usize = 264;

/// `out[i, j] = gram / (s_i s_j)`, both triangles from the upper one; 0 for dead columns.
#[cube(launch_unchecked)]
fn correlation_kernel(gram: &Array<f32>, inverse: &Array<f32>, out: &mut Array<bf16>, n: u32) {
    let i = CUBE_POS_Y;
    let j = CUBE_POS_X * UNITS as u32 + UNIT_POS;
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
    #[comptime] difference: bool,
    #[define(F)] _dtype: StorageType,
) {
    let column = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    if column < columns as usize {
        let at = CUBE_POS_Y as usize * columns as usize + column;
        let mut value = f32::cast_from(a[at]);
        if comptime!(difference) {
            value -= f32::cast_from(b[at]);
        }
        out[at] = bf16::cast_from(value * scale[column]);
    }
}

/// `out[cube] =` this cube's share of `Σ a b`.
#[cube(launch_unchecked)]
fn dot_kernel(a: &Array<bf16>, b: &Array<f32>, out: &mut Array<f32>, length: u32, first: u32) {
    let mut sum = f32::new(0.0);
    let mut at = ABSOLUTE_POS;
    while at < length as usize {
        sum += f32::cast_from(a[at]) * b[at];
        at += UNITS * CUBES;
    }
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
        out[first as usize * CUBES + CUBE_POS_X as usize] = total;
    }
}

/// A Gram matrix prepared for measuring errors.
pub(crate) struct Correlation {
    matrix: Buffer,
    scale: Buffer,
}

impl Correlation {
    /// From the upper triangle of a Gram matrix, f32 `[n, n]`, and its diagonal.
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
                CubeCount::new_2d(n.div_ceil(UNITS) as u32, n as u32),
                CubeDim::new_1d(UNITS as u32),
                array(gram),
                array(&inverse),
                array(&matrix),
                n as u32,
            );
        }
        Self {
            matrix,
            scale: buffer::upload(gram, &scale, DType::F32),
        }
    }

    /// Enqueues `tr(D H Dᵀ)` for `D = a - b` (or `a`), f16 or bf16 `[rows, n]`, into slot `slot` of
    /// `sums`.
    fn energy(
        &self,
        a: &Buffer,
        b: Option<&Buffer>,
        (sums, slot): (&Buffer, usize),
        failures: &Failures,
    ) {
        let [rows, n] = [a.meta.shape()[0], a.meta.shape()[1]];
        let scaled = buffer::empty(a, [rows, n], DType::BF16);
        let image = buffer::empty(a, [rows, n], DType::F32);
        // SAFETY: rows and columns stay inside the shapes; without `b` its argument is not
        // read.
        unsafe {
            scaled_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &scaled.client,
                CubeCount::new_2d(n.div_ceil(UNITS) as u32, rows as u32),
                CubeDim::new_1d(UNITS as u32),
                array(a),
                array(b.unwrap_or(a)),
                array(&self.scale),
                array(&scaled),
                n as u32,
                b.is_some(),
                a.dtype.into(),
            );
        }
        let buffers = [&scaled, &self.matrix, &image];
        on_stream_later(&buffers, failures, move |libraries, pointers| {
            let scaled = Matrix::at(pointers[0], 0, n, Element::Bf16);
            let matrix = Matrix::at(pointers[1], 0, n, Element::Bf16);
            let image = Matrix::at(pointers[2], 0, n, Element::F32);
            // SAFETY: three distinct contiguous buffers of these shapes.
            unsafe { product(libraries, [rows, n, n], scaled, matrix, 0.0, image) }
        });
        // SAFETY: indices stay below `rows * n`, and the slot's partial sums inside `sums`.
        unsafe {
            dot_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &sums.client,
                CubeCount::new_1d(CUBES as u32),
                CubeDim::new_1d(UNITS as u32),
                array(&scaled),
                array(&image),
                array(sums),
                (rows * n) as u32,
                slot as u32,
            );
        }
    }
}

/// Errors being measured on the device, to be read back together.
pub(crate) struct Measurement {
    sums: Buffer,
    used: usize,
    failures: Failures,
}

impl Measurement {
    /// Room for `count` layers with two approximations each.
    pub(crate) fn new(like: &Buffer, count: usize) -> Self {
        Self {
            sums: buffer::empty(like, [count * 3 * CUBES], DType::F32),
            used: 0,
            failures: Failures::default(),
        }
    }

    /// Enqueues the relative errors of two approximations of `weight`, `[out, in]` of one dtype.
    pub(crate) fn add(
        &mut self,
        correlation: &Correlation,
        weight: &Buffer,
        approximations: [&Buffer; 2],
    ) {
        let slot = self.used * 3;
        self.used += 1;
        let failures = &self.failures;
        correlation.energy(weight, None, (&self.sums, slot), failures);
        for (at, approximation) in approximations.into_iter().enumerate() {
            let into = (&self.sums, slot + 1 + at);
            correlation.energy(weight, Some(approximation), into, failures);
        }
    }

    /// The relative errors, one pair per layer; waits for the device.
    pub(crate) fn read(self) -> Result<Vec<[f64; 2]>, Error> {
        let sums: Vec<f32> = buffer::download(&self.sums)?;
        self.failures.check()?;
        let sum = |values: &[f32]| values.iter().copied().map(f64::from).sum::<f64>();
        let ratio = |part: f64, whole: f64| if whole == 0.0 { 0.0 } else { part / whole };
        Ok(sums
            .chunks_exact(3 * CUBES)
            .take(self.used)
            .map(|layer| {
                let energies: Vec<f64> = layer.chunks_exact(CUBES).map(sum).collect();
                [
                    ratio(energies[1], energies[0]),
                    ratio(energies[2], energies[0]),
                ]
            })
            .collect())
    }
}

/// `‖(W - Ŵ)X‖² / ‖WX‖²` for `weight` and `approximation` `[out, in]`, f16 or bf16, and `gram` f32
/// `[in, in]`, of which the upper triangle is read. Waits for the device.
///
/// # Errors
///
/// Other dtypes, shapes that do not fit, or a cuBLAS failure.
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
    let diagonal = super::factor::diagonal(&gram)?;
    let correlation = Correlation::new(&gram, &diagonal);
    let mut measurement = Measurement::new(&gram, 1);
    measurement.add(&correlation, &weight, [&approximation, &approximation]);
    Ok(measurement.read()?[0][0])
}
