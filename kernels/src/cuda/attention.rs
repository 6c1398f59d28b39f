//! Causal attention with grouped heads, `softmax(q·kᵀ / sqrt(head_dim)) · v`, or with other [`Scores`].
//!
//! A block of query rows walks over the keys with a running maximum and sum, so no score matrix is ever stored
//! (FlashAttention-2: Dao, 2023). f16 or bf16 operands, f32 sums; the probabilities are rounded to the same before they
//! meet the values. There are two kernels in CUDA C++, compiled by NVRTC at first use for each head dimension, type and
//! kind of scores, so that those without a window or softcap do not pay for them: one for every card
//! (`attention_mma.rs`), and one for Hopper's matrix instructions (`attention_wgmma.rs`).

use std::f32::consts::LOG2_E;

use burn::tensor::{DType, Tensor};

use super::{
    Cuda,
    attention_kind::{AttentionSizes, Kind, NAME, Scales},
    attention_mma, attention_wgmma, buffer,
    error::Error,
    kernel_cache::compute_capability,
    stream::on_stream_later,
};
use crate::Scores;

/// Causal attention of `q` `[windows, seq, heads, head_dim]` over `k` and `v` `[windows, seq, kv_heads,
/// head_dim]`: `[windows, seq, heads * head_dim]`, all f16 or all bf16.
///
/// Query head `h` reads key head `h / (heads / kv_heads)`. The head dimension is a multiple
/// of 16, at most 256. Needs compute capability 8.0.
///
/// # Errors
///
/// Other dtypes, shapes that do not fit, or a kernel that does not compile or launch.
pub fn causal_attention(
    q: Tensor<Cuda, 4>,
    k: Tensor<Cuda, 4>,
    v: Tensor<Cuda, 4>,
    scores: Scores,
) -> Result<Tensor<Cuda, 3>, Error> {
    let [windows, seq, heads, head_dim] = q.dims();
    let kv_heads = k.dims()[2];
    if k.dims() != [windows, seq, kv_heads, head_dim]
        || v.dims() != k.dims()
        || kv_heads == 0
        || !heads.is_multiple_of(kv_heads)
        || !head_dim.is_multiple_of(16)
        || !(16..=256).contains(&head_dim)
        // A grid's second and third dimension.
        || heads > 65_535
        || windows > 65_535
        || scores.window == Some(0)
    {
        return Err(Error::Shape {
            operation: NAME,
            reason: format!(
                "q {:?}, k {:?}, v {:?}, {scores:?}",
                q.dims(),
                k.dims(),
                v.dims()
            ),
        });
    }
    let q = buffer::half(NAME, "q", q)?;
    let dtype = q.dtype;
    let k = buffer::float(NAME, "k", k, dtype)?;
    let v = buffer::float(NAME, "v", v, dtype)?;
    let out = buffer::empty(&q, [windows, seq, heads * head_dim], dtype);
    if windows == 0 || seq == 0 {
        return Ok(buffer::into_float(out));
    }
    let counter = buffer::empty(&q, [1], DType::I32);
    let sizes = AttentionSizes {
        windows,
        seq,
        heads,
        kv_heads,
    };
    on_stream_later(&[&q, &k, &v, &out, &counter], move |libraries, pointers| {
        // A window that hides nothing is none.
        let window = scores.window.filter(|&window| window < seq);
        let kind = Kind {
            device: libraries.device,
            head_dim,
            dtype,
            window: window.is_some(),
            softcap: scores.softcap.is_some(),
        };
        let plain = (head_dim as f32).sqrt().recip();
        let scale = scores.scale.map_or(plain, |scale| scale as f32);
        let cap = scores.softcap.map_or(scale, |cap| cap as f32);
        let scales = Scales {
            scale_log2: cap * LOG2_E,
            sees: window.map(|window| window as i32),
            cap_log2: scores.softcap.map(|_| 2.0 * LOG2_E * scale / cap),
        };
        let [q, k, v, out, counter] = [0, 1, 2, 3, 4].map(|at| pointers[at]);
        if compute_capability(libraries.device)? == (9, 0) && attention_wgmma::takes(head_dim) {
            attention_wgmma::run(libraries, kind, [q, k, v, out], counter, sizes, scales)
        } else {
            attention_mma::run(libraries, kind, [q, k, v, out], sizes, scales)
        }
    })?;
    Ok(buffer::into_float(out))
}
