//! The gates of feed-forward blocks, Llama's `silu(gate) * up` and Gemma's `gelu(gate) * up`, in f32, rounded to
//! f16 or bf16 once.

use burn::tensor::Tensor;
use cubecl::prelude::*;

use super::{
    Cuda,
    buffer::{self, array},
    error::Error,
};

const UNITS: u32 = 256;

#[cube(launch_unchecked)]
fn swiglu_kernel<F: Float, N: Size>(
    gate: &Array<Vector<F, N>>,
    up: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    vectors: u32,
    #[define(F)] _dtype: StorageType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors as usize {
        let g = Vector::<f32, N>::cast_from(gate[at]);
        let u = Vector::<f32, N>::cast_from(up[at]);
        let one = Vector::<f32, N>::new(1.0);
        // CubeCL 0.10 negates a CUDA vector with an operator that does not exist.
        let minus = Vector::<f32, N>::new(-1.0);
        out[at] = Vector::<F, N>::cast_from(g / (one + (g * minus).exp()) * u);
    }
}

/// `x / 2 (1 + tanh(u)) = x / (1 + exp(-2 u))`, `u = sqrt(2 / π) (x + 0.044715 x³)`.
#[cube(launch_unchecked)]
fn geglu_kernel<F: Float, N: Size>(
    gate: &Array<Vector<F, N>>,
    up: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    vectors: u32,
    #[define(F)] _dtype: StorageType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors as usize {
        let g = Vector::<f32, N>::cast_from(gate[at]);
        let u = Vector::<f32, N>::cast_from(up[at]);
        let one = Vector::<f32, N>::new(1.0);
        let cubic = g + g * g * g * Vector::<f32, N>::new(0.044715);
        let minus = Vector::<f32, N>::new(-1.595_769);
        out[at] = Vector::<F, N>::cast_from(g / (one + (cubic * minus).exp()) * u);
    }
}

/// `silu(gate) * up`, `[tokens, intermediate]`, all f16 or all bf16.
///
/// # Errors
///
/// Other dtypes, or shapes that differ.
pub fn swiglu(gate: Tensor<Cuda, 2>, up: Tensor<Cuda, 2>) -> Result<Tensor<Cuda, 2>, Error> {
    let shape = gate.dims();
    if up.dims() != shape {
        return Err(Error::Shape {
            operation: "swiglu",
            reason: format!("gate {shape:?}, up {:?}", up.dims()),
        });
    }
    let gate = buffer::half("swiglu", "gate", gate)?;
    let up = buffer::float("swiglu", "up", up, gate.dtype)?;
    let out = buffer::empty(&gate, shape, gate.dtype);
    let elements = shape[0] * shape[1];
    let lanes = buffer::vector_size(elements, gate.dtype);
    if elements > 0 {
        let vectors = (elements / lanes) as u32;
        // SAFETY: indices stay below the number of vectors in all three.
        unsafe {
            swiglu_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &out.client,
                CubeCount::new_1d(vectors.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS),
                lanes,
                array(&gate),
                array(&up),
                array(&out),
                vectors,
                gate.dtype.into(),
            );
        }
    }
    Ok(buffer::into_float(out))
}

/// `gelu(gate) * up`, in the approximation by a hyperbolic tangent, `[tokens, intermediate]`, all f16 or all bf16.
///
/// # Errors
///
/// Other dtypes, or shapes that differ.
pub fn geglu(gate: Tensor<Cuda, 2>, up: Tensor<Cuda, 2>) -> Result<Tensor<Cuda, 2>, Error> {
    let shape = gate.dims();
    if up.dims() != shape {
        return Err(Error::Shape {
            operation: "geglu",
            reason: format!("gate {shape:?}, up {:?}", up.dims()),
        });
    }
    let gate = buffer::half("geglu", "gate", gate)?;
    let up = buffer::float("geglu", "up", up, gate.dtype)?;
    let out = buffer::empty(&gate, shape, gate.dtype);
    let elements = shape[0] * shape[1];
    let lanes = buffer::vector_size(elements, gate.dtype);
    if elements > 0 {
        let vectors = (elements / lanes) as u32;
        // SAFETY: indices stay below the number of vectors in all three.
        unsafe {
            geglu_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &out.client,
                CubeCount::new_1d(vectors.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS),
                lanes,
                array(&gate),
                array(&up),
                array(&out),
                vectors,
                gate.dtype.into(),
            );
        }
    }
    Ok(buffer::into_float(out))
}
