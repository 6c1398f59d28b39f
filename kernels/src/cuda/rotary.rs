//! Rotary position embedding in the half-split form of Llama's reference.
//!
//! `y[d] = x[d] cos[d] - x[d + h] sin[d]` and `y[d + h] = x[d + h] cos[d] + x[d] sin[d]` for
//! `d < h = head_dim / 2`, in f32, rounded to f16 or bf16 once.

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
