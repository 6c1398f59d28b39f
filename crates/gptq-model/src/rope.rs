//! Rotary tables: `angle(position, i) = position * w_i` for `i` in `0..dim / 2`, where
//! `w_i = theta^(-2i / dim)` or that as [`RopeScaling`](crate::RopeScaling) stretches it.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{DType, Tensor, TensorData};
use gptq_kernels::Engine;
use gptq_spec::Rope;

/// The last tables asked for; blocks ask for the same ones, one after the other. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Tables<B: Engine>(Arc<Mutex<Option<Held<B>>>>);

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
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (start, seq);
        let same = |held: &Held<B>| held.rope == *rope && held.at == at;
        if !last.as_ref().is_some_and(same) {
            let (cos, sin) = tables(rope, at, device);
            *last = Some(Held {
                rope: *rope,
                at,
                cos,
                sin,
            });
        }
        let held = last.as_ref().expect("just filled");
        (held.cos.clone(), held.sin.clone())
    }
}

/// `(cos, sin)`, f32 `[seq, dim / 2]`, for the positions from `start`.
///
/// Frequencies and angles are rounded to f32 one after the other, as Transformers does: at position
/// 4096 an unrounded angle would differ from the trained model's by more than an f32 ulp.
fn tables<B: Engine>(
    rope: &Rope,
    (start, seq): (usize, usize),
    device: &B::Device,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let half = rope.dim / 2;
    let frequency = |i: usize| {
        let exponent = 2.0 * i as f64 / rope.dim as f64;
        let w = rope.theta.powf(-exponent) as f32;
        rope.scaling.apply(w)
    };
    let frequencies: Vec<f32> = (0..half).map(frequency).collect();
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = (start..start + seq)
            .flat_map(|p| frequencies.iter().map(move |w| f64::from(p as f32 * w)))
            .map(|angle| f(angle) as f32)
            .collect();
        Tensor::from_data(TensorData::new(values, [seq, half]), (device, DType::F32))
    };
    (table(f64::cos), table(f64::sin))
}
