//! Rotary tables: `angle(position, i) = position * theta^(-2i / dim)` for `i` in `0..dim / 2`.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{DType, Tensor, TensorData};
use gptq_kernels::Engine;

use crate::ModelConfig;

/// The last tables asked for; a run asks for one length, over and over. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Tables<B: Engine>(Arc<Mutex<Option<Held<B>>>>);

#[derive(Clone, Debug)]
struct Held<B: Engine> {
    seq: usize,
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
}

impl<B: Engine> Default for Tables<B> {
    fn default() -> Self {
        Tables(Arc::default())
    }
}

impl<B: Engine> Tables<B> {
    /// `(cos, sin)`, f32 `[seq, head_dim / 2]`.
    pub(crate) fn get(
        &self,
        config: &ModelConfig,
        seq: usize,
        device: &B::Device,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref().is_none_or(|held| held.seq != seq) {
            let (cos, sin) = tables(config, seq, device);
            *last = Some(Held { seq, cos, sin });
        }
        let held = last.as_ref().expect("just filled");
        (held.cos.clone(), held.sin.clone())
    }
}

/// `(cos, sin)`, f32 `[seq, head_dim / 2]`.
///
/// Frequencies and angles are rounded to f32 one after the other, as Transformers does: at position
/// 4096 an unrounded angle would differ from the trained model's by more than an f32 ulp.
fn tables<B: Engine>(
    config: &ModelConfig,
    seq: usize,
    device: &B::Device,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let half = config.head_dim / 2;
    let frequency = |i: usize| {
        let exponent = 2.0 * i as f64 / config.head_dim as f64;
        config.rope_theta.powf(-exponent) as f32
    };
    let frequencies: Vec<f32> = (0..half).map(frequency).collect();
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = (0..seq)
            .flat_map(|p| frequencies.iter().map(move |w| f64::from(p as f32 * w)))
            .map(|angle| f(angle) as f32)
            .collect();
        Tensor::from_data(TensorData::new(values, [seq, half]), (device, DType::F32))
    };
    (table(f64::cos), table(f64::sin))
}
