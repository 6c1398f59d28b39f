//! Every family's forward in 16 bits on a CUDA device. Without one the test prints that it was skipped and passes.

use gptq_kernels::{Device, Engine, Work};

use super::tests::{Golden, fixtures, root};
use super::*;
use crate::Decoder;

/// Logits' distance from Transformers' in f32, relative to their size, and how many greedy tokens are its own.
struct Compared(String);

impl Work for Compared {
    type Output = (f64, usize);

    fn run<B: Engine>(self, device: B::Device) -> (f64, usize) {
        let dir = format!("golden/families/{}", self.0);
        let golden = Golden::read(&format!("{dir}/logits.safetensors"));
        let dir = root(&dir);
        let model = Model::<B>::open(&dir, &device).unwrap();
        // Its weights and states have these fixtures' sizes, which f16 holds; a real one of the family is in bf16.
        let windows = &golden.windows;
        let mut flow = model
            .embed(windows, windows.len(), model.dtype())
            .unwrap()
            .remove(0);
        for layer in 0..model.config().layers {
            flow = model.block(layer).unwrap().forward(flow);
        }
        let logits = model.head().unwrap().logits(flow.residual);
        let found: Vec<f32> = logits.into_data().to_vec().unwrap();
        let vocabulary = model.config().vocabulary;
        let (mut error, mut size) = (0.0, 0.0);
        let mut expected = golden.logits.iter();
        for window in 0..windows.len() {
            for &position in &golden.positions {
                let at = (window * windows[0].len() + position) * vocabulary;
                for (a, b) in found[at..at + vocabulary].iter().zip(&mut expected) {
                    error += f64::from(a - b).powi(2);
                    size += f64::from(*b).powi(2);
                }
            }
        }

        let greedy: serde_json::Value = gptq_format::read_json(&dir.join("greedy.json")).unwrap();
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(greedy[key].clone()).unwrap();
        let (mut context, tokens) = (ids("prompt"), ids("tokens"));
        let mut decoder = Decoder::load(&model).unwrap();
        let mut same = 0;
        for &token in &tokens {
            let logits = decoder.next_logits(&context).unwrap();
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            same += usize::from(best == Some(token as usize));
            context.push(token);
        }
        (f64::sqrt(error / size), same)
    }
}

#[test]
fn every_family_gives_the_logits_of_transformers_on_a_device() {
    if Device::Cuda(0).resolve().is_err() {
        println!("skipped: no CUDA device");
        return;
    }
    let mut wrong = Vec::new();
    for fixture in fixtures() {
        let (error, same) = Device::Cuda(0).run(Compared(fixture.clone())).unwrap();
        println!("{fixture}: {error:.2e}, {same} of 48 tokens");
        // Transformers' own f16 forward differs by up to 0.35 of logits of size 3.5 in single ones.
        if error.is_nan() || error > 0.02 || same < 46 {
            wrong.push(fixture);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
