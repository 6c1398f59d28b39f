//! The Gram matrix of a linear layer's input, `G += XᵀX`, upper half only, and the cross product
//! for activation-mismatch correction, `C += (A_d - A)ᵀX`, with states `A_d` of the dense model and a branch's
//! own `A`, in full.
//!
//! Row panels of the upper half: `G[s..e, s..] += X[:, s..e]ᵀ · X[:, s..]`, f16 or bf16 inputs, f32
//! accumulation (a product of two is exact in f32). Panels of `w` columns need `(1 + w / in) / 2`
//! of the full product's arithmetic. Tokens are processed in chunks, so that a tensor core's
//! running sum stays short; the chunks are summed in f32 in memory.

use burn::tensor::{DType, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use cudarc::driver::result::memset_d8_async;

use super::{
    Cuda, Device,
    blas::{Element, MatrixAt, product},
    buffer::{self, Buffer, array},
    error::Error,
    linear::runs,
    stream::on_stream_later,
};

/// Columns per panel: wide enough for cuBLAS's large tiles.
const PANEL: usize = 1024;
/// Tokens per product: each reads and writes G once.
const CHUNK: usize = 16_384;
const UNITS: u32 = 256;

/// Makes a matrix of zeros, f32, which [`gram_add`] and [`cross_add`] update in place.
///
/// # Errors
///
/// Lack of device memory.
pub fn gram_zeros(shape: [usize; 2], device: &Device) -> Result<Tensor<Cuda, 2>, Error> {
    let client = CudaRuntime::client(device);
    let gram = buffer::empty_on(&client, device, shape, DType::F32);
    let bytes = shape[0] * shape[1] * 4;
    on_stream_later(&[&gram], move |libraries, pointers| {
        // SAFETY: the buffer was made with this many bytes.
        unsafe { memset_d8_async(pointers[0], 0, bytes, libraries.stream) }.map_err(|source| {
            Error::Driver {
                operation: "cuMemsetD8Async",
                source,
            }
        })
    })?;
    Ok(buffer::into_float(gram))
}

/// Computes `G += XᵀX` for `gram` f32 `[in, in]` and `x` f16 or bf16 `[tokens, in]`.
///
/// Only the upper triangle (row <= column) of the result is valid; parts below it are stale.
/// Updates in place if nothing else holds `gram`.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes, or a cuBLAS failure.
pub fn gram_add(gram: Tensor<Cuda, 2>, x: Tensor<Cuda, 2>) -> Result<Tensor<Cuda, 2>, Error> {
    let starts = [0, x.dims()[0]];
    Ok(gram_add_each(vec![gram], x, &starts)?.remove(0))
}

/// Computes the same for each run of rows of `x` with a matrix of its own: run `i` is the rows `starts[i]..starts[i +
/// 1]`, and all of them are `x`.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes or starts, or a cuBLAS failure.
pub fn gram_add_each(
    grams: Vec<Tensor<Cuda, 2>>,
    x: Tensor<Cuda, 2>,
    starts: &[usize],
) -> Result<Vec<Tensor<Cuda, 2>>, Error> {
    let [tokens, in_features] = x.dims();
    let shape = [in_features, in_features];
    let runs = runs("gram_add", starts, grams.len(), tokens)?;
    let grams = sums("gram_add", "gram", grams, shape)?;
    let x = buffer::half("gram_add", "x", x)?;
    let element = Element::of(x.dtype);
    let buffers: Vec<_> = [&x].into_iter().chain(&grams).collect();
    on_stream_later(&buffers, move |libraries, pointers| {
        for (run, &gram) in runs.iter().zip(&pointers[1..]) {
            for first in run.clone().step_by(CHUNK) {
                let length = CHUNK.min(run.end - first);
                for start in (0..in_features).step_by(PANEL) {
                    let width = PANEL.min(in_features - start);
                    let rest = in_features - start;
                    let offset = first * in_features + start;
                    let x = MatrixAt::at(pointers[0], offset, in_features, element);
                    let corner = start * in_features + start;
                    let g = MatrixAt::at(gram, corner, in_features, Element::F32);
                    // SAFETY: rows `first..first + length` and columns `start..` of x, and the
                    // block `start.., start..` of gram, lie inside their checked buffers, which
                    // are distinct: gram is uniquely held.
                    unsafe { product(libraries, [width, rest, length], x.t(), x, 1.0, g)? };
                }
            }
        }
        Ok(())
    })?;
    Ok(grams.into_iter().map(buffer::into_float).collect())
}

/// Returns f32 matrices of one shape as buffers that nothing else holds.
fn sums(
    operation: &'static str,
    name: &'static str,
    matrices: Vec<Tensor<Cuda, 2>>,
    shape: [usize; 2],
) -> Result<Vec<Buffer>, Error> {
    let matrices = matrices.into_iter().map(|matrix| {
        if matrix.dims() != shape {
            return Err(Error::Shape {
                operation,
                reason: format!("{name} {:?} in place of {shape:?}", matrix.dims()),
            });
        }
        let matrix = buffer::float(operation, name, matrix, DType::F32)?;
        Ok(if matrix.can_mut() {
            matrix
        } else {
            matrix.copy()
        })
    });
    matrices.collect()
}

/// `out = a - b`, in f32, within `largest` of zero, rounded once. NaN stays.
#[cube(launch_unchecked)]
fn difference_kernel<F: Float, N: Size>(
    a: &Array<Vector<F, N>>,
    b: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    vectors: u32,
    largest: f32,
    #[define(F)] _dtype: StorageType,
) {
    let at = ABSOLUTE_POS;
    if at < vectors as usize {
        let mut off = Vector::<f32, N>::cast_from(a[at]) - Vector::<f32, N>::cast_from(b[at]);
        #[unroll]
        for lane in 0..off.vector_size() {
            let own = off[lane];
            let own = select(own > largest, largest, own);
            off[lane] = select(own < -largest, -largest, own);
        }
        out[at] = Vector::<F, N>::cast_from(off);
    }
}

/// Returns `a - b` of two f16 or bf16 buffers of one shape, rounded to their type, or to its largest value: in a
/// residual stream the difference of two large values may lie beyond it.
fn difference(a: &Buffer, b: &Buffer) -> Buffer {
    let shape = a.meta.shape();
    let out = buffer::empty(a, [shape[0], shape[1]], a.dtype);
    let elements = shape.num_elements();
    let lanes = buffer::vector_size(elements, a.dtype);
    let largest = match a.dtype {
        DType::F16 => f32::from(half::f16::MAX),
        _ => f32::from(half::bf16::MAX),
    };
    if elements > 0 {
        let vectors = (elements / lanes) as u32;
        // SAFETY: indices stay below the number of vectors in all three.
        unsafe {
            difference_kernel::launch_unchecked::<CudaRuntime>(
                &out.client,
                CubeCount::new_1d(vectors.div_ceil(UNITS)),
                CubeDim::new_1d(UNITS),
                lanes,
                array(a),
                array(b),
                array(&out),
                vectors,
                largest,
                a.dtype.into(),
            );
        }
    }
    out
}

/// Computes `C += (A_d - A)ᵀX` for `cross` f32 `[features, in]`, `dense` and `own` `[tokens, features]` and `x`
/// `[tokens, in]`, all f16 or all bf16; the difference is rounded to that dtype, or to its largest value. Updates
/// in place if nothing else holds `cross`.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes, or a cuBLAS failure.
pub fn cross_add(
    cross: Tensor<Cuda, 2>,
    pair: [Tensor<Cuda, 2>; 2],
    x: Tensor<Cuda, 2>,
) -> Result<Tensor<Cuda, 2>, Error> {
    let starts = [0, x.dims()[0]];
    Ok(cross_add_each(vec![cross], pair, x, &starts)?.remove(0))
}

/// Computes the same for each run of rows with a matrix of its own, which `starts` gives as for [`gram_add_each`].
///
/// # Errors
///
/// Other dtypes, inconsistent shapes or starts, or a cuBLAS failure.
pub fn cross_add_each(
    crosses: Vec<Tensor<Cuda, 2>>,
    [dense, own]: [Tensor<Cuda, 2>; 2],
    x: Tensor<Cuda, 2>,
    starts: &[usize],
) -> Result<Vec<Tensor<Cuda, 2>>, Error> {
    let [tokens, n] = x.dims();
    let [rows, features] = dense.dims();
    if rows != tokens || own.dims() != dense.dims() {
        return Err(Error::Shape {
            operation: "cross_add",
            reason: format!(
                "dense {:?}, own {:?} and x {:?}",
                dense.dims(),
                own.dims(),
                x.dims()
            ),
        });
    }
    let runs = runs("cross_add", starts, crosses.len(), tokens)?;
    let crosses = sums("cross_add", "cross", crosses, [features, n])?;
    let x = buffer::half("cross_add", "x", x)?;
    let dense = buffer::float("cross_add", "dense", dense, x.dtype)?;
    let own = buffer::float("cross_add", "own", own, x.dtype)?;
    let element = Element::of(x.dtype);
    let mismatch = difference(&dense, &own);
    let buffers: Vec<_> = [&mismatch, &x].into_iter().chain(&crosses).collect();
    on_stream_later(&buffers, move |libraries, pointers| {
        for (run, &cross) in runs.iter().zip(&pointers[2..]) {
            for first in run.clone().step_by(CHUNK) {
                let length = CHUNK.min(run.end - first);
                let part = |pointer, width| MatrixAt::at(pointer, first * width, width, element);
                let (mismatch, x) = (part(pointers[0], features), part(pointers[1], n));
                let c = MatrixAt::at(cross, 0, n, Element::F32);
                // SAFETY: rows `first..first + length` of both inputs and all of cross lie inside their
                // checked buffers, and cross is uniquely held.
                unsafe { product(libraries, [features, n, length], mismatch.t(), x, 1.0, c)? };
            }
        }
        Ok(())
    })?;
    Ok(crosses.into_iter().map(buffer::into_float).collect())
}
