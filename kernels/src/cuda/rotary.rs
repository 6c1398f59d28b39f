//! Rotary position embedding in the half-split form of Llama's reference.
//!
//! `y[d] = x[d] cos[d] - x[d + h] sin[d]` and `y[d + h] = x[d + h] cos[d] + x[d] sin[d]` for
//! `d < h = head_dim / 2`, in f32, rounded to f16 or bf16 once. Some families rotate only the first features
//! of a head, and some neighbours in place of halves.

use burn::tensor::{DType, Tensor};
use cubecl::prelude::*;

use super::{
    Cuda,
    buffer::{self, array},
    error::Error,
};

const UNITS: u32 = 256;

/// One unit per vector of the lower half of a head.
#[cube(launch_unchecked)]
fn rotary_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    cos: &Array<Vector<f32, N>>,
    sin: &Array<Vector<f32, N>>,
    out: &mut Array<Vector<F, N>>,
    seq: u32,
    heads: u32,
    vectors: u32,
    total: u32,
    #[define(F)] _dtype: StorageType,
) {
    let unit = CUBE_POS_X * UNITS + UNIT_POS;
    if unit < total {
        let head = unit / vectors;
        let d = unit % vectors;
        let position = (head / heads) % seq;
        let table = (position * vectors + d) as usize;
        let low = (head * 2 * vectors + d) as usize;
        let high = low + vectors as usize;
        let a = Vector::<f32, N>::cast_from(x[low]);
        let b = Vector::<f32, N>::cast_from(x[high]);
        let cos = cos[table];
        let sin = sin[table];
        out[low] = Vector::<F, N>::cast_from(a * cos - b * sin);
        out[high] = Vector::<F, N>::cast_from(b * cos + a * sin);
    }
}

/// Rotates `x` f16 or bf16 `[windows, seq, heads, head_dim]` by its position in the window, with
/// `cos` and `sin` f32 `[seq, head_dim / 2]`.
///
/// # Errors
///
/// Other dtypes, an odd head dimension, or shapes that do not fit.
pub fn rotary(
    x: Tensor<Cuda, 4>,
    cos: Tensor<Cuda, 2>,
    sin: Tensor<Cuda, 2>,
) -> Result<Tensor<Cuda, 4>, Error> {
    let [windows, seq, heads, head_dim] = x.dims();
    let half = head_dim / 2;
    if head_dim % 2 != 0 || cos.dims() != [seq, half] || sin.dims() != [seq, half] {
        return Err(Error::Shape {
            operation: "rotary",
            reason: format!(
                "x {:?}, cos {:?}, sin {:?}",
                x.dims(),
                cos.dims(),
                sin.dims()
            ),
        });
    }
    let x = buffer::half("rotary", "x", x)?;
    let cos = buffer::float("rotary", "cos", cos, DType::F32)?;
    let sin = buffer::float("rotary", "sin", sin, DType::F32)?;
    let out = buffer::empty(&x, [windows, seq, heads, head_dim], x.dtype);
    let lanes = buffer::vector_size(half, DType::F32);
    let total = (windows * seq * heads * half / lanes) as u32;
    if total > 0 {
        // SAFETY: each unit below `total` has its own pair of vectors inside x and out, and
        // one inside the tables.
        unsafe {
            rotary_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &out.client,
                CubeCount::new_1d(total.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS),
                lanes,
                array(&x),
                array(&cos),
                array(&sin),
                array(&out),
                seq as u32,
                heads as u32,
                (half / lanes) as u32,
                total,
                x.dtype.into(),
            );
        }
    }
    Ok(buffer::into_float(out))
}

/// One unit per element: `own cos ∓ other sin` of the first `2 half` elements of a head, the rest as it is.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn partial_rotary_kernel<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    cos: &Array<Vector<f32, N>>,
    sin: &Array<Vector<f32, N>>,
    out: &mut Array<Vector<F, N>>,
    seq: u32,
    heads: u32,
    dim: u32,
    half: u32,
    total: u32,
    #[comptime] interleaved: bool,
    #[define(F)] _dtype: StorageType,
) {
    let unit = CUBE_POS_X * UNITS + UNIT_POS;
    if unit < total {
        let head = unit / dim;
        let d = unit % dim;
        let at = unit as usize;
        if d < 2 * half {
            let mut pair = d % half;
            let mut first = d < half;
            if comptime!(interleaved) {
                pair = d / 2;
                first = 2 * pair == d;
            }
            let mut other = unit - half;
            if comptime!(interleaved) {
                other = unit - 1;
            }
            let mut sign = f32::new(1.0);
            if first {
                sign = f32::new(-1.0);
                if comptime!(interleaved) {
                    other = unit + 1;
                } else {
                    other = unit + half;
                }
            }
            let table = ((head / heads) % seq * half + pair) as usize;
            let own = Vector::<f32, N>::cast_from(x[at]);
            let other = Vector::<f32, N>::cast_from(x[other as usize]);
            let turned = other * sin[table] * Vector::<f32, N>::new(sign);
            out[at] = Vector::<F, N>::cast_from(own * cos[table] + turned);
        } else {
            out[at] = x[at];
        }
    }
}

/// Rotates the first `2 half` elements of each head of `x` f16 or bf16 `[windows, seq, heads, head_dim]` by its
/// position in the window, with `cos` and `sin` f32 `[seq, half]`; pairs are neighbours where `interleaved`,
/// else an element of either half.
///
/// # Errors
///
/// Other dtypes, or shapes that do not fit.
pub fn partial_rotary(
    x: Tensor<Cuda, 4>,
    cos: Tensor<Cuda, 2>,
    sin: Tensor<Cuda, 2>,
    interleaved: bool,
) -> Result<Tensor<Cuda, 4>, Error> {
    let [windows, seq, heads, head_dim] = x.dims();
    let half = cos.dims()[1];
    let total = windows * seq * heads * head_dim;
    let tables = [&cos, &sin].iter().all(|it| it.dims() == [seq, half]);
    if !tables || 2 * half > head_dim || u32::try_from(total).is_err() {
        return Err(Error::Shape {
            operation: "partial_rotary",
            reason: format!(
                "x {:?}, cos {:?}, sin {:?}",
                x.dims(),
                cos.dims(),
                sin.dims()
            ),
        });
    }
    let x = buffer::half("partial_rotary", "x", x)?;
    let cos = buffer::float("partial_rotary", "cos", cos, DType::F32)?;
    let sin = buffer::float("partial_rotary", "sin", sin, DType::F32)?;
    let out = buffer::empty(&x, [windows, seq, heads, head_dim], x.dtype);
    let total = total as u32;
    if total > 0 {
        // SAFETY: each unit below `total` has its own element of out, and reads elements of the same head of x and
        // of its position's row of the tables.
        unsafe {
            partial_rotary_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &out.client,
                CubeCount::new_1d(total.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS),
                1,
                array(&x),
                array(&cos),
                array(&sin),
                array(&out),
                seq as u32,
                heads as u32,
                head_dim as u32,
                half as u32,
                total,
                interleaved,
                x.dtype.into(),
            );
        }
    }
    Ok(buffer::into_float(out))
}
