//! RMSNorm as Llama's reference has it: normalised in f32, rounded to f16 (or bf16), then scaled in it.
//!
//! `y = w * f16(x / sqrt(mean(x²) + eps))`, one cube per token. The last product is taken in f32, which
//! holds it exactly, and rounded once. Other families' norms are in f32 to the end: `y = f16((w + offset) x /
//! sqrt(mean(x²) + eps))`, with the row's mean taken off before that in a LayerNorm.

use burn::tensor::Tensor;
use cubecl::prelude::*;

use super::{Cuda, buffer, error::Error};

const UNITS: u32 = 256;
const PLANES: usize = 8;

#[cube(launch_unchecked)]
fn rms_norm_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    weight: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    vectors: u32,
    hidden: f32,
    eps: f32,
    #[define(F)] _dtype: StorageType,
) {
    let lanes = x.vector_size();
    let vectors = vectors as usize;
    let start = CUBE_POS_X as usize * vectors;
    let mut sum = f32::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < vectors {
        let v = Vector::<f32, N>::cast_from(x[start + at]);
        #[unroll]
        for lane in 0..lanes {
            sum += v[lane] * v[lane];
        }
        at += CUBE_DIM as usize;
    }
    let sum = plane_sum(sum);
    let mut partial = SharedMemory::<f32>::new(PLANES);
    if UNIT_POS_PLANE == 0 {
        partial[(UNIT_POS / PLANE_DIM) as usize] = sum;
    }
    sync_cube();
    let mut total = f32::new(0.0);
    #[unroll]
    for plane in 0..PLANES {
        total += partial[plane];
    }
    let factor = Vector::<f32, N>::new(1.0 / (total / hidden + eps).sqrt());
    let mut at = UNIT_POS as usize;
    while at < vectors {
        let v = Vector::<f32, N>::cast_from(x[start + at]) * factor;
        let v = Vector::<f32, N>::cast_from(Vector::<F, N>::cast_from(v));
        out[start + at] = Vector::<F, N>::cast_from(v * Vector::<f32, N>::cast_from(weight[at]));
        at += CUBE_DIM as usize;
    }
}

/// The sum over the units of a cube.
#[cube]
fn cube_sum(part: f32) -> f32 {
    let part = plane_sum(part);
    let mut partial = SharedMemory::<f32>::new(PLANES);
    if UNIT_POS_PLANE == 0 {
        partial[(UNIT_POS / PLANE_DIM) as usize] = part;
    }
    sync_cube();
    let mut total = f32::new(0.0);
    #[unroll]
    for plane in 0..PLANES {
        total += partial[plane];
    }
    total
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn norm_f32_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    weight: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    vectors: u32,
    hidden: f32,
    eps: f32,
    offset: f32,
    #[comptime] centred: bool,
    #[define(F)] _dtype: StorageType,
) {
    let lanes = x.vector_size();
    let vectors = vectors as usize;
    let start = CUBE_POS_X as usize * vectors;
    let mut mean = f32::new(0.0);
    if comptime!(centred) {
        let mut sum = f32::new(0.0);
        let mut at = UNIT_POS as usize;
        while at < vectors {
            let v = Vector::<f32, N>::cast_from(x[start + at]);
            #[unroll]
            for lane in 0..lanes {
                sum += v[lane];
            }
            at += CUBE_DIM as usize;
        }
        mean = cube_sum(sum) / hidden;
    }
    let mean = Vector::<f32, N>::new(mean);
    let mut sum = f32::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < vectors {
        let v = Vector::<f32, N>::cast_from(x[start + at]) - mean;
        #[unroll]
        for lane in 0..lanes {
            sum += v[lane] * v[lane];
        }
        at += CUBE_DIM as usize;
    }
    let factor = Vector::<f32, N>::new(1.0 / (cube_sum(sum) / hidden + eps).sqrt());
    let offset = Vector::<f32, N>::new(offset);
    let mut at = UNIT_POS as usize;
    while at < vectors {
        let v = (Vector::<f32, N>::cast_from(x[start + at]) - mean) * factor;
        let w = Vector::<f32, N>::cast_from(weight[at]) + offset;
        out[start + at] = Vector::<F, N>::cast_from(v * w);
        at += CUBE_DIM as usize;
    }
}

/// RMSNorm of each row of `x` `[tokens, hidden]` with `weight` `[hidden]`: `[tokens, hidden]`, all f16
/// or all bf16.
///
/// # Errors
///
/// Other dtypes, or shapes that do not fit.
pub fn rms_norm(
    x: Tensor<Cuda, 2>,
    weight: Tensor<Cuda, 1>,
    eps: f64,
) -> Result<Tensor<Cuda, 2>, Error> {
    let [tokens, hidden] = x.dims();
    if weight.dims() != [hidden] {
        return Err(Error::Shape {
            operation: "rms_norm",
            reason: format!("x [{tokens}, {hidden}] and weight {:?}", weight.dims()),
        });
    }
    let x = buffer::half("rms_norm", "x", x)?;
    let weight = buffer::float("rms_norm", "weight", weight, x.dtype)?;
    let out = buffer::empty(&x, [tokens, hidden], x.dtype);
    if tokens > 0 {
        let lanes = buffer::vector_size(hidden, x.dtype);
        // SAFETY: one cube per row; every index is below `tokens * hidden` elements of x and
        // out, or `hidden` of weight, which their shapes hold.
        unsafe {
            rms_norm_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &out.client,
                CubeCount::new_1d(tokens as u32),
                CubeDim::new_1d(UNITS),
                lanes,
                buffer::array(&x),
                buffer::array(&weight),
                buffer::array(&out),
                (hidden / lanes) as u32,
                hidden as f32,
                eps as f32,
                x.dtype.into(),
            );
        }
    }
    Ok(buffer::into_float(out))
}

/// The norm of each row of `x` `[tokens, hidden]` with `weight` `[hidden]` plus `offset`, in f32 and rounded once:
/// `[tokens, hidden]`, all f16 or all bf16. `centred`: the row's mean is taken off first.
///
/// # Errors
///
/// Other dtypes, or shapes that do not fit.
pub fn norm_f32(
    x: Tensor<Cuda, 2>,
    weight: Tensor<Cuda, 1>,
    eps: f64,
    offset: f64,
    centred: bool,
) -> Result<Tensor<Cuda, 2>, Error> {
    let [tokens, hidden] = x.dims();
    if weight.dims() != [hidden] {
        return Err(Error::Shape {
            operation: "norm_f32",
            reason: format!("x [{tokens}, {hidden}] and weight {:?}", weight.dims()),
        });
    }
    let x = buffer::half("norm_f32", "x", x)?;
    let weight = buffer::float("norm_f32", "weight", weight, x.dtype)?;
    let out = buffer::empty(&x, [tokens, hidden], x.dtype);
    if tokens > 0 {
        let lanes = buffer::vector_size(hidden, x.dtype);
        // SAFETY: as in `rms_norm`.
        unsafe {
            norm_f32_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &out.client,
                CubeCount::new_1d(tokens as u32),
                CubeDim::new_1d(UNITS),
                lanes,
                buffer::array(&x),
                buffer::array(&weight),
                buffer::array(&out),
                (hidden / lanes) as u32,
                hidden as f32,
                eps as f32,
                offset as f32,
                centred,
                x.dtype.into(),
            );
        }
    }
    Ok(buffer::into_float(out))
}
