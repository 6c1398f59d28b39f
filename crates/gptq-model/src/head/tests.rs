//! The gradient of a divergence, against central differences, for every family's head.

use std::fs;
use std::path::PathBuf;

use gptq_kernels::Cpu;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::Model;

const TOKENS: usize = 12;

fn fixtures() -> Vec<PathBuf> {
    let families = [env!("CARGO_MANIFEST_DIR"), "../../tests/golden/families"];
    let entries = fs::read_dir(families.iter().collect::<PathBuf>()).unwrap();
    let dirs = entries.map(|entry| entry.unwrap().path());
    let mut dirs: Vec<_> = dirs
        .filter(|dir| dir.join("model.safetensors").exists())
        .collect();
    dirs.sort();
    dirs
}

fn states(seed: u64, hidden: usize, size: f32) -> Tensor<Cpu, 2> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..TOKENS * hidden)
        .map(|_| rng.random_range(-size..size))
        .collect();
    let data = TensorData::new(values, [TOKENS, hidden]);
    Tensor::from_data(data, (&Default::default(), DType::F32))
}

fn sum(x: Tensor<Cpu, 2>) -> f64 {
    x.into_data().iter::<f64>().sum()
}

#[test]
fn the_gradient_of_the_divergence_is_that_of_central_differences_for_every_familys_head() {
    /// Step along a direction as long as the states: its square, 6e-5, times a third derivative is left out.
    const STEP: f64 = 1.0 / 128.0;
    for dir in fixtures() {
        let model = Model::<Cpu>::open(&dir, &Default::default()).unwrap();
        let head = model.head().unwrap();
        let hidden = model.config().hidden_size;
        let (own, right) = (states(1, hidden, 1.0), states(2, hidden, 1.0));
        let right = own.clone() + right * 0.5;
        let (total, gradient) = head.divergence_gradient(own.clone(), right.clone());
        let alone = sum(head.divergence(own.clone(), right.clone()));
        assert!(
            (sum(total) - alone).abs() <= 1e-6 * alone,
            "{}",
            dir.display()
        );
        // Along the gradient and a random direction of the same length, so that the slope is no small difference.
        let noise = states(3, hidden, 1.0);
        let length = |x: &Tensor<Cpu, 2>| sum(x.clone() * x.clone()).sqrt();
        let unit = |x: Tensor<Cpu, 2>| x.clone() / length(&x);
        let direction = unit(unit(gradient.clone()) + unit(noise)) * length(&own);
        let at = |step: f64| {
            let moved = own.clone() + direction.clone() * step;
            sum(head.divergence(moved, right.clone()))
        };
        let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        let found = sum(gradient * direction) / f64::from(GRADIENT_SCALE);
        let off = (found - slope).abs() / slope.abs();
        assert!(off < 5e-3, "{}: {found} for {slope}", dir.display());
    }
}

#[test]
fn equal_predictions_have_no_divergence_and_no_gradient() {
    let dir = &fixtures()[0];
    let model = Model::<Cpu>::open(dir, &Default::default()).unwrap();
    let head = model.head().unwrap();
    let own = states(4, model.config().hidden_size, 1.0);
    let (total, gradient) = head.divergence_gradient(own.clone(), own);
    assert!(sum(total).abs() < 1e-6);
    assert!(sum(gradient.abs()) < 1e-6);
}
