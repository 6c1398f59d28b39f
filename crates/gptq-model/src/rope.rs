//! Rotary tables: `angle(position, i) = position * w_i` for `i` in `0..dim / 2`, where
//! `w_i = theta^(-2i / dim)` or that as [`RopeScaling`](gptq_spec::RopeScaling) stretches it; some kinds also scale the
//! cosines and sines.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{DType, Tensor, TensorData};
use gptq_kernels::Engine;
use gptq_spec::Rope;

/// Embeddings that a model's blocks have between them, at most, without making tables again.
const KINDS: usize = 2;

/// The last tables asked for, of each embedding; blocks ask for the same ones, one after the other. Clones share
/// them.
#[derive(Clone, Debug)]
pub(crate) struct Tables<B: Engine>(Arc<Mutex<Vec<Held<B>>>>);

#[derive(Clone, Debug)]
struct Held<B: Engine> {
    rope: Rope,
    /// First position and number of positions.
    at: (usize, usize),
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
}

impl<B: Engine> Default for Tables<B> {
    fn default() -> Self {
        Tables(Arc::default())
    }
}

impl<B: Engine> Tables<B> {
    /// `(cos, sin)`, f32 `[seq, dim / 2]`, for the positions from `start`.
    pub(crate) fn get(
        &self,
        rope: &Rope,
        start: usize,
        seq: usize,
        device: &B::Device,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (start, seq);
        let held = all.iter().find(|held| held.rope == *rope && held.at == at);
        if let Some(held) = held {
            return (held.cos.clone(), held.sin.clone());
        }
        all.retain(|held| held.rope != *rope);
        if all.len() == KINDS {
            all.remove(0);
        }
        let (cos, sin) = tables(rope, at, device);
        let rope = rope.clone();
        all.push(Held {
            rope,
            at,
            cos: cos.clone(),
            sin: sin.clone(),
        });
        (cos, sin)
    }
}

/// `(cos, sin)`, f32 `[seq, dim / 2]`, for the positions from `start`.
fn tables<B: Engine>(
    rope: &Rope,
    (start, seq): (usize, usize),
    device: &B::Device,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let [cos, sin] = values(rope, (start, seq)).map(|values| {
        let values = TensorData::new(values, [seq, rope.dim / 2]);
        Tensor::from_data(values, (device, DType::F32))
    });
    (cos, sin)
}

/// Cosines and sines, `dim / 2` for each of the positions from `start`.
///
/// Frequencies and angles are rounded to f32 one after the other, as Transformers does: at position
/// 4096 an unrounded angle would differ from the trained model's by more than an f32 ulp.
pub(crate) fn values(rope: &Rope, (start, seq): (usize, usize)) -> [Vec<f32>; 2] {
    let frequencies = rope.scaling.frequencies(rope.theta, rope.dim, start + seq);
    let factor = rope.scaling.attention_factor() as f32;
    let table = |f: fn(f64) -> f64| {
        (start..start + seq)
            .flat_map(|p| frequencies.iter().map(move |w| f64::from(p as f32 * w)))
            .map(|angle| f(angle) as f32 * factor)
            .collect()
    };
    [table(f64::cos), table(f64::sin)]
}
