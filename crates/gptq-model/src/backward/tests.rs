//! Gradients of every family's blocks, against central differences of the forward pass, and on a device against the
//! CPU.

use std::fs;
use std::path::PathBuf;

use burn::tensor::{DType, TensorData};
use gptq_kernels::{Cpu, Device, Work};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::{Block, Model};

/// The directories of the tiny models in `golden/families`.
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

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn host<B: Engine>(x: Tensor<B, 2>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn rms(x: &[f64]) -> f64 {
    (dot(x, x) / x.len() as f64).sqrt()
}

/// The states before the first block, of two windows longer than the fixtures' sliding windows of 24.
fn start<B: Engine>(model: &Model<B>) -> Flow<B> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let vocabulary = model.config().vocabulary as u32;
    let window = |_| (0..40).map(|_| rng.random_range(0..vocabulary)).collect();
    let windows: Vec<Vec<u32>> = (0..2).map(window).collect();
    let mut flows = model.embed(&windows, 2, model.dtype()).unwrap();
    flows.remove(0)
}

/// Step along a direction as large as the weights. A central difference leaves out its square, 6e-5, times a
/// third derivative of about the first's size; the outputs' rounding, 1e-6 (ten sums of a hundred products, one
/// after the other), is divided by it: 1e-4.
const STEP: f64 = 1.0 / 128.0;

/// Those two errors, for curved families (bounded scores, sharp softmax) ten times as much: 1e-3 at most was
/// found, 3e-5 in the middle. A term left out of a gradient changes it by its own size.
const TOLERANCE: f64 = 2e-3;

#[test]
fn the_gradients_of_every_family_are_those_of_central_differences() {
    for dir in fixtures() {
        let model = Model::<Cpu>::open(&dir, &Default::default()).unwrap();
        let mut flow = start(&model);
        for layer in 0..model.config().layers {
            let block = model.block(layer).unwrap();
            if block.spec().has_experts() {
                flow = block.forward(flow);
                continue;
            }
            let label = format!("{}, block {layer}", dir.display());
            let count = block.linears.len();
            let alone = (0..count).map(|linear| linear..linear + 1);
            for linears in alone.chain(std::iter::once(0..count)) {
                let off = off_differences(&block, &flow, linears.clone());
                let names: Vec<_> = linears.map(|it| &block.spec().linears()[it].name).collect();
                assert!(off < TOLERANCE, "{label}, {names:?}: {off}");
            }
            flow = block.forward(flow);
        }
    }
}

/// Returns how far the derivative of a loss along a random direction of these linears' weights, by the gradients,
/// is from that by differences, relative to it.
fn off_differences(block: &Block<Cpu>, flow: &Flow<Cpu>, linears: std::ops::Range<usize>) -> f64 {
    let direction = |linear: usize| {
        let weight = block.linears[linear].weight.dense(DType::F32);
        let shape = weight.dims();
        let size = 1.7 * rms(&host(weight));
        let values = random(100 + linear as u64, shape.iter().product());
        let data = TensorData::new(values, shape);
        Tensor::<Cpu, 2>::from_data(data, (&flow.residual.device(), DType::F32)) * size
    };
    let end = |step: f64| {
        let mut moved = block.clone();
        for linear in linears.clone() {
            let weight = block.linears[linear].weight.dense(DType::F32);
            moved.set_weight(linear, weight + direction(linear) * step);
        }
        host(moved.forward(flow.clone()).residual)
    };
    let pairs = end(STEP).into_iter().zip(end(-STEP));
    let change: Vec<f64> = pairs.map(|(a, b)| (a - b) / (2.0 * STEP)).collect();
    // A linear loss, whose gradient is as much along the change as not, so that the derivative is no difference of
    // large numbers.
    let noise = random(99, change.len()).into_iter();
    let size = 1.7 * rms(&change);
    let slope = change.iter().zip(noise);
    let slope: Vec<f32> = slope
        .map(|(change, noise)| (change + size * f64::from(noise)) as f32)
        .collect();
    let gradients = block.weight_gradients(flow.clone(), |end| {
        let data = TensorData::new(slope.clone(), end.dims());
        Tensor::from_data(data, (&end.device(), DType::F32))
    });
    let found: f64 = linears
        .map(|linear| dot(&host(gradients[linear].clone()), &host(direction(linear))))
        .sum();
    let slope: Vec<f64> = slope.into_iter().map(f64::from).collect();
    let expected = dot(&slope, &change);
    (found - expected).abs() / expected.abs()
}

/// The gradients of every linear of every block of a model, each block on what the ones before it give.
struct OfBlocks<'a>(&'a PathBuf);

impl Work for OfBlocks<'_> {
    type Output = Vec<(String, Vec<f64>)>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let model = Model::<B>::open(self.0, &device).unwrap();
        let mut flow = start(&model);
        let mut all = Vec::new();
        for layer in 0..model.config().layers {
            let block = model.block(layer).unwrap();
            if block.spec().has_experts() {
                flow = block.forward(flow);
                continue;
            }
            let gradients = block.weight_gradients(flow.clone(), |end| {
                let data = TensorData::new(random(5, end.dims().iter().product()), end.dims());
                Tensor::<B, 2>::from_data(data, (&end.device(), DType::F32)).cast(end.dtype())
            });
            for (linear, gradient) in block.spec().linears().iter().zip(gradients) {
                assert_eq!(gradient.dtype(), DType::F32);
                assert_eq!(gradient.dims(), [linear.out_features, linear.in_features]);
                all.push((linear.module(layer), host(gradient)));
            }
            flow = block.forward(flow);
        }
        all
    }
}

#[test]
fn the_gradients_of_every_family_on_a_device_are_those_of_the_cpu() {
    if Device::Cuda(0).resolve().is_err() {
        println!("skipped: no CUDA device");
        return;
    }
    for dir in fixtures() {
        let [found, expected] = [Device::Cuda(0), Device::Cpu].map(|device| {
            let device = device.resolve().unwrap();
            device.run(OfBlocks(&dir)).unwrap()
        });
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            let pairs = found.iter().zip(expected);
            let difference: Vec<f64> = pairs.map(|(a, b)| a - b).collect();
            let off = rms(&difference) / rms(expected);
            // States and gradients are rounded to f16, 2^-11, about twenty times on the way through three blocks
            // and back, and a sharp softmax multiplies such errors by its scores, up to ten.
            assert!(off < 3e-2, "{}, {name}: {off}", dir.display());
        }
    }
}

#[test]
fn the_same_gradients_come_twice() {
    let dir = &fixtures()[0];
    let devices = [Device::Cpu, Device::Cuda(0)];
    for device in devices.iter().filter_map(|device| device.resolve().ok()) {
        let [once, again] = [(); 2].map(|()| device.run(OfBlocks(dir)).unwrap());
        assert!(once == again);
    }
}
