//! The gradients of causal attention with grouped heads, by recomputation of the weights.
//!
//! For a block of queries Q of one window and the keys K and values V that they see, with `D` the gradient of the
//! output:
//!
//! ```text
//! P = softmax(scores(Q Kᵀ))      dV += Pᵀ D         dP = D Vᵀ
//! dS = P (dP - Σ P dP) score'    dQ = scale dS K    dK += scale dSᵀ Q
//! ```
//!
//! The products are cuBLAS's, for all key heads of some windows in one call: the query heads that share a key head are
//! rows of one matrix, `[seq * shared, dim]`, so that its sums are over them too. Between them `score_gradients` of
//! `backward.cu` makes P and dS of the f32 products; both are rounded to f16 or bf16. dK and dV are summed over the
//! blocks in f32, in the order of the queries. Softmax, mask and softcap are those of [`Scores`].

use std::ops::Range;

use burn::tensor::{DType, Tensor};
use cudarc::driver::{result::memset_d8_async, sys::CUfunction};

use super::{
    Cuda,
    backward::{kernel, threads},
    blas::{Element, Matrices, MatrixAt, products},
    buffer::{self, Buffer},
    context::refused,
    error::Error,
    nvrtc::{Launch, launch},
    stream::{Libraries, on_stream_later},
};
use crate::Scores;

const NAME: &str = "attention_backward";
/// Queries per block. The four score matrices of a window take `12 * heads * BLOCK * seq` bytes.
const BLOCK: usize = 256;
/// Bytes of the score matrices of windows that are taken together; one may take more.
const SCRATCH: usize = 256 << 20;

/// Sizes of an attention.
#[derive(Clone, Copy)]
struct AttentionSizes {
    seq: usize,
    kv_heads: usize,
    /// Query heads of a key head.
    shared: usize,
    dim: usize,
    element: Element,
}

/// The gradients of causal attention with respect to `q` `[windows, seq, heads, head_dim]`, `k` and `v` `[windows,
/// seq, kv_heads, head_dim]`, for that of its output, `d_out` `[windows, seq, heads * head_dim]`: all f16 or all
/// bf16, in the shapes of `q`, `k` and `v`.
///
/// # Errors
///
/// Other dtypes, shapes that do not fit, a kernel that does not compile or launch, or a cuBLAS failure.
pub fn attention_backward(
    [q, k, v]: [Tensor<Cuda, 4>; 3],
    d_out: Tensor<Cuda, 3>,
    scores: Scores,
) -> Result<[Tensor<Cuda, 4>; 3], Error> {
    let [windows, seq, heads, dim] = q.dims();
    let kv_heads = k.dims()[2];
    if k.dims() != [windows, seq, kv_heads, dim]
        || v.dims() != k.dims()
        || d_out.dims() != [windows, seq, heads * dim]
        || kv_heads == 0
        || !heads.is_multiple_of(kv_heads)
        // A grid's second dimension.
        || kv_heads > 65_535
        || scores.window == Some(0)
    {
        return Err(Error::Shape {
            operation: NAME,
            reason: format!(
                "q {:?}, k {:?}, v {:?}, d_out {:?}, {scores:?}",
                q.dims(),
                k.dims(),
                v.dims(),
                d_out.dims()
            ),
        });
    }
    let shared = heads / kv_heads;
    // [windows, kv_heads, seq, shared, dim]: the query heads of a key head are rows of one matrix.
    let by_head = |x: Tensor<Cuda, 4>| x.swap_dims(1, 2);
    let grouped = [windows, seq, kv_heads, shared * dim];
    let q = buffer::half(NAME, "q", by_head(q.reshape(grouped)))?;
    let dtype = q.dtype;
    let d_out = buffer::float(NAME, "d_out", by_head(d_out.reshape(grouped)), dtype)?;
    let k = buffer::float(NAME, "k", by_head(k), dtype)?;
    let v = buffer::float(NAME, "v", by_head(v), dtype)?;
    let d_q = buffer::empty(&q, [windows, kv_heads, seq, shared * dim], dtype);
    let sums = [(); 2].map(|()| buffer::empty(&q, [windows, kv_heads, seq, dim], DType::F32));
    let rows = BLOCK.min(seq) * shared;
    let scores_of_one = 12 * kv_heads * rows * pitch(seq);
    let together = (SCRATCH / scores_of_one.max(1)).clamp(1, windows.max(1));
    // A grid's second dimension.
    let together = together.min(65_535 / kv_heads);
    let scratch = |dtype| buffer::empty(&q, [together * kv_heads, rows, pitch(seq)], dtype);
    let wide = [(); 2].map(|()| scratch(DType::F32));
    let narrow = [(); 2].map(|()| scratch(dtype));
    let sizes = AttentionSizes {
        seq,
        kv_heads,
        shared,
        dim,
        element: Element::of(dtype),
    };
    if windows * seq * heads * dim > 0 {
        let buffers: [&Buffer; 11] = [
            &q, &k, &v, &d_out, &d_q, &sums[0], &sums[1], &wide[0], &wide[1], &narrow[0],
            &narrow[1],
        ];
        on_stream_later(&buffers, move |libraries, pointers| {
            let kernel = kernel(libraries.device, dtype, "score_gradients")?;
            for &sum in &pointers[5..7] {
                let bytes = windows * seq * kv_heads * dim * size_of::<f32>();
                // SAFETY: the buffer was made with this many bytes.
                unsafe { memset_d8_async(sum, 0, bytes, libraries.stream) }
                    .map_err(refused("cuMemsetD8Async"))?;
            }
            for first in (0..windows).step_by(together) {
                let own = first..windows.min(first + together);
                for start in (0..seq).step_by(BLOCK) {
                    // SAFETY: the buffers have the shapes above, and those that are written are new.
                    unsafe {
                        block(
                            libraries,
                            kernel,
                            pointers,
                            sizes,
                            scores,
                            own.clone(),
                            start,
                        )?;
                    }
                }
            }
            Ok(())
        })?;
    }
    let d_q = buffer::into_float::<4>(d_q);
    let d_q = by_head(d_q).reshape([windows, seq, heads, dim]);
    let [d_k, d_v] = sums.map(|sum| by_head(buffer::into_float::<4>(sum)).cast(dtype));
    Ok([d_q, d_k, d_v])
}

/// Elements from a row of scores to the next one: a multiple of 8, so that each begins at a whole 16 bytes.
fn pitch(keys: usize) -> usize {
    keys.next_multiple_of(8)
}

/// One block of queries, of the windows `windows`.
///
/// # Safety
///
/// The pointers are those of q, k, v, d_out, d_q, the sums of d_k and d_v, and two score matrices in f32 and two in
/// the elements' type, of the sizes above; only the first four may be shared.
unsafe fn block(
    libraries: &Libraries,
    kernel: CUfunction,
    pointers: &[u64],
    sizes: AttentionSizes,
    scores: Scores,
    windows: Range<usize>,
    start: usize,
) -> Result<(), Error> {
    let AttentionSizes {
        seq,
        kv_heads,
        shared,
        dim,
        element,
    } = sizes;
    let end = (start + BLOCK).min(seq);
    let first = scores.first_key(start);
    let (rows, keys) = ((end - start) * shared, end - first);
    let (head, count) = (windows.start * kv_heads, windows.len() * kv_heads);
    let stride = pitch(keys);
    let queries = |at: usize| Matrices {
        first: MatrixAt::at(
            pointers[at],
            (head * seq + start) * shared * dim,
            dim,
            element,
        ),
        step: seq * shared * dim,
    };
    let seen = |at: usize, element| Matrices {
        first: MatrixAt::at(pointers[at], (head * seq + first) * dim, dim, element),
        step: seq * dim,
    };
    let matrix = |at: usize, element| Matrices {
        first: MatrixAt::at(pointers[at], 0, stride, element),
        step: rows * stride,
    };
    let (q, d_out, d_q) = (queries(0), queries(3), queries(4));
    let (k, v) = (seen(1, element), seen(2, element));
    let (d_k, d_v) = (seen(5, Element::F32), seen(6, Element::F32));
    let (product, d_weights) = (matrix(7, Element::F32), matrix(8, Element::F32));
    let (weights, d_scores) = (matrix(9, element), matrix(10, element));
    let scale = scores.scale(dim) as f32;
    let multiply = |sizes, alpha, factors, beta, to| {
        // SAFETY: rows `start..end` of queries, `first..end` of keys and the first `rows` by `stride` of each score
        // matrix lie inside their buffers.
        unsafe { products(libraries, count, sizes, alpha, factors, beta, to) }
    };
    multiply([rows, keys, dim], 1.0, [q, k.t()], 0.0, product)?;
    multiply([rows, keys, dim], 1.0, [d_out, v.t()], 0.0, d_weights)?;
    let mut matrices = [pointers[7], pointers[8], pointers[9], pointers[10]];
    let sees = scores.window.filter(|&window| window < seq).unwrap_or(0);
    let mut integers = [start, first, keys, stride, shared, sees].map(|it| it as i32);
    let mut floats = [scale, scores.softcap.unwrap_or(0.0) as f32];
    let mut parameters = Vec::with_capacity(12);
    parameters.extend(matrices.iter_mut().map(|it| (&raw mut *it).cast()));
    parameters.extend(integers.iter_mut().map(|it| (&raw mut *it).cast()));
    parameters.extend(floats.iter_mut().map(|it| (&raw mut *it).cast()));
    let size = Launch {
        blocks: (rows as u32, count as u32, 1),
        threads: threads(keys),
        shared: 0,
    };
    // SAFETY: the parameters are those of the kernel's signature and outlive the call; each block of the grid has
    // its own row of the four matrices.
    unsafe { launch(libraries, kernel, size, &mut parameters)? };
    multiply([keys, dim, rows], 1.0, [weights.t(), d_out], 1.0, d_v)?;
    multiply([rows, dim, keys], scale, [d_scores, k], 0.0, d_q)?;
    multiply([keys, dim, rows], scale, [d_scores.t(), q], 1.0, d_k)
}
