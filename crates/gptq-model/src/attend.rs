//! Attention inside a block: rotary embedding, and scores over the window's tokens or those in a cache.

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, Scores};
use gptq_spec::{Attending, Attention, Rope};

use crate::rope::Tables;
use crate::{Cache, StretchLayout};

pub(crate) fn scores(how: &Attending) -> Scores {
    Scores {
        scale: how.scale,
        softcap: how.softcap,
        window: how.window,
    }
}

/// The rotary embedding, if it is over the halves of whole heads, as an engine rotates a token that joins the
/// cache.
pub(crate) fn joining(how: &Attending) -> Option<&Rope> {
    let rope = how.rope.as_ref();
    rope.filter(|rope| rope.dim == how.head_dim && !rope.interleaved)
}

/// Attention of `q`, `k` and `v`, `[tokens, features]` each, and over the tokens in `cache`, with rotary `tables`;
/// without a cache, `observe` is shown the rotated queries and keys.
pub(crate) fn attend<B: Engine>(
    tables: &Tables<B>,
    attention: &Attention,
    [q, k, v]: [Tensor<B, 2>; 3],
    windows: usize,
    cache: Option<&mut Cache<B>>,
    observe: &mut dyn FnMut([&Tensor<B, 4>; 2]),
) -> Tensor<B, 2> {
    let how = &attention.how;
    let tokens = q.dims()[0];
    let split =
        |x: Tensor<B, 2>, heads: usize| x.reshape([windows, tokens / windows, heads, how.head_dim]);
    let qkv = [
        split(q, attention.heads),
        split(k, attention.kv_heads),
        split(v, attention.kv_heads),
    ];
    let scores = scores(how);
    let attended = match cache.map(|cache| (cache.len(), cache)) {
        None => {
            let [q, k, v] = rotated(tables, how, qkv, 0);
            observe([&q, &k]);
            B::causal_attention(q, k, v, scores)
        }
        Some((0, cache)) => {
            let [q, k, v] = rotated(tables, how, qkv, 0);
            cache.push(k.clone(), v.clone());
            B::causal_attention(q, k, v, scores)
        }
        Some((start, cache)) if tokens == 1 => {
            let device = qkv[0].device();
            match joining(how) {
                Some(rope) => {
                    let (cos, sin) = tables.get(rope, start, 1, &device);
                    cache.attend_next(qkv, [cos, sin], scores)
                }
                None => {
                    // Nothing is left to rotate when it joins.
                    let (shape, options) = ([1, how.head_dim / 2], (&device, DType::F32));
                    let (cos, sin) = (Tensor::ones(shape, options), Tensor::zeros(shape, options));
                    cache.attend_next(rotated(tables, how, qkv, start), [cos, sin], scores)
                }
            }
        }
        Some((start, cache)) => {
            let [q, k, v] = rotated(tables, how, qkv, start);
            cache.push(k, v);
            B::cached_attention(q, cache.keys(), cache.values(), start, scores)
        }
    };
    attended.reshape([tokens, attention.heads * how.head_dim])
}

/// Attention of `q`, `k` and `v`, `[tokens, features]` each, of the stretches of `layout`, each over its own tokens and
/// those it follows. Stretches that begin a text go through attention together, others one by one over `cache`.
pub(crate) fn attend_stretches<B: Engine>(
    tables: &Tables<B>,
    attention: &Attention,
    [q, k, v]: [Tensor<B, 2>; 3],
    layout: &StretchLayout<B>,
    cache: &mut Cache<B>,
) -> Tensor<B, 2> {
    let (how, scores) = (&attention.how, scores(&attention.how));
    let ([tokens, width], kv_width) = (q.dims(), k.dims()[1]);
    let device = q.device();
    let heads = |x: Tensor<B, 2>| {
        let [tokens, width] = x.dims();
        x.reshape([1, tokens, width / how.head_dim, how.head_dim])
    };
    let [q, k] = match &how.rope {
        None => [q, k],
        Some(rope) => {
            let (cos, sin) = tables.get(rope, 0, layout.longest(), &device);
            let at_positions = |table: Tensor<B, 2>| table.select(0, layout.positions());
            let [q, k] = rotate(rope, [heads(q), heads(k)], [cos, sin].map(at_positions));
            [q.reshape([tokens, width]), k.reshape([tokens, kv_width])]
        }
    };
    let mut outputs = Vec::new();
    for windows in layout.windows() {
        let [count, len] = windows.shape();
        let gathered = [&q, &k, &v].map(|x| {
            let rows = B::embed(windows.rows(), x.clone());
            let heads = rows.dims()[1] / how.head_dim;
            rows.reshape([count, len, heads, how.head_dim])
        });
        let [q, k, v] = gathered;
        let attended = B::causal_attention(q, k, v, scores);
        outputs.push(attended.reshape([count * len, width]));
    }
    for step in layout.steps() {
        let part = |x: &Tensor<B, 2>| heads(x.clone().narrow(0, step.row, step.len));
        cache.truncate(step.start);
        cache.push(part(&k), part(&v));
        if step.start > 0 {
            let (keys, values) = (cache.keys(), cache.values());
            let attended = B::cached_attention(part(&q), keys, values, step.start, scores);
            outputs.push(attended.reshape([step.len, width]));
        }
    }
    B::embed(layout.order(), Tensor::cat(outputs, 0))
}

/// The gradients with respect to queries, keys and values of [`attend`] without a cache, `[tokens, features]` each, of
/// `rotated` queries and keys and of values, for that of what it gives, `d_out`.
pub(crate) fn gradients<B: Engine>(
    tables: &Tables<B>,
    attention: &Attention,
    rotated: [Tensor<B, 4>; 3],
    d_out: Tensor<B, 2>,
) -> [Tensor<B, 2>; 3] {
    let how = &attention.how;
    let [windows, seq, heads, dim] = rotated[0].dims();
    let d_out = d_out.reshape([windows, seq, heads * dim]);
    let [q, k, v] = B::attention_backward(rotated, d_out, scores(how));
    let [q, k] = match &how.rope {
        None => [q, k],
        Some(rope) => {
            // The transpose of a rotation is the one by the opposite angle.
            let (cos, sin) = tables.get(rope, 0, seq, &q.device());
            rotate(rope, [q, k], [cos, sin.mul_scalar(-1.0)])
        }
    };
    let joined = |x: Tensor<B, 4>| {
        let [_, _, heads, _] = x.dims();
        x.reshape([windows * seq, heads * dim])
    };
    [q, k, v].map(joined)
}

/// Queries, keys and values, `[windows, seq, heads, dim]` each, with the first two rotated for
/// positions from `start`.
fn rotated<B: Engine>(
    tables: &Tables<B>,
    how: &Attending,
    [q, k, v]: [Tensor<B, 4>; 3],
    start: usize,
) -> [Tensor<B, 4>; 3] {
    let Some(rope) = &how.rope else {
        return [q, k, v];
    };
    let (cos, sin) = tables.get(rope, start, q.dims()[1], &q.device());
    let [q, k] = rotate(rope, [q, k], [cos, sin]);
    [q, k, v]
}

/// Tensors `[windows, seq, heads, dim]` rotated by angles with these cosines and sines.
fn rotate<B: Engine>(
    rope: &Rope,
    xs: [Tensor<B, 4>; 2],
    [cos, sin]: [Tensor<B, 2>; 2],
) -> [Tensor<B, 4>; 2] {
    xs.map(|x| match rope.interleaved {
        false => B::rotary(x, cos.clone(), sin.clone()),
        true => B::rotary_interleaved(x, cos.clone(), sin.clone()),
    })
}
