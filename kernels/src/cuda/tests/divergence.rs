//! Losses, divergence and its gradient, compared with the default on the host.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::cuda::{
    Cuda, Device,
    testing::{Random, device, tensor_f32, values},
};
use crate::{Cpu, Engine};

fn on_host(values: &[f32], shape: [usize; 2]) -> Tensor<Cpu, 2> {
    let data = TensorData::new(values.to_vec(), shape);
    Tensor::from_data(data, (&Default::default(), DType::F32))
}

fn targets<B: Engine>(ids: &[i32], device: &B::Device) -> Tensor<B, 1, Int> {
    let data = TensorData::new(ids.to_vec(), [ids.len()]);
    Tensor::from_data(data, (device, DType::I32))
}

fn floats(x: Tensor<Cpu, 2>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

fn near(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = (found - expected).abs();
        assert!(off <= tolerance, "{at}: {found} for {expected}");
    }
}

#[test]
fn losses_divergence_and_gradient_are_those_of_the_host() {
    let Some(device): Option<Device> = device() else {
        return;
    };
    let mut random = Random(77);
    for [rows, columns] in [[1, 5], [3, 512], [7, 4097], [70_000, 33], [5, 152_064]] {
        let n = rows * columns;
        let mut logits: Vec<f32> = (0..n).map(|_| random.normal() as f32 * 6.0).collect();
        let reference: Vec<f32> = logits
            .iter()
            .map(|&v| v + random.normal() as f32 * 0.5)
            .collect();
        // Two of a row's are the largest: the first counts.
        let most = logits[..columns].iter().copied().fold(f32::MIN, f32::max);
        logits[columns - 1] = most;
        let ids: Vec<i32> = (0..rows)
            .map(|_| (random.next() % columns as u64) as i32)
            .collect();
        let shape = [rows, columns];
        let host = [on_host(&logits, shape), on_host(&reference, shape)];
        let here = [&logits, &reference].map(|it| tensor_f32(it, shape, &device));
        let [a, b] = host.clone();
        let expected = floats(Cpu::compare_logits(
            a,
            b,
            targets(&ids, &Default::default()),
        ));
        let [a, b] = here.clone();
        let found = values(Cuda::compare_logits(a, b, targets(&ids, &device)));
        // f32 sums of a row in another order; losses are below 64.
        near(&found, &expected, 2e-4);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let [a, b] = host.clone();
            let [sums, gradient] = Cpu::divergence_gradient(a, b, 16.0, DType::F32);
            let [a, b] = here.clone();
            let [own_sums, own] = Cuda::divergence_gradient(a, b, 16.0, dtype);
            assert_eq!(own.dtype(), dtype);
            near(&values(own_sums), &floats(sums), 2e-4);
            // Values of at most 16, rounded once.
            let rounding = match dtype {
                DType::F32 => 16.0 * 2e-5,
                DType::F16 => 16.0 * 2f64.powi(-11),
                _ => 16.0 * 2f64.powi(-8),
            };
            near(&values(own), &floats(gradient), rounding + 1e-4);
        }
    }
}

#[test]
fn a_row_that_is_no_number_gives_no_number_and_leaves_the_others() {
    let Some(device): Option<Device> = device() else {
        return;
    };
    let mut logits = vec![0.5_f32; 3 * 700];
    logits[700 + 650] = f32::NAN;
    let reference = tensor_f32(&vec![0.25; 3 * 700], [3, 700], &device);
    let logits = tensor_f32(&logits, [3, 700], &device);
    let found = values(Cuda::compare_logits(
        logits,
        reference,
        targets(&[1, 2, 3], &device),
    ));
    assert!(found[4].is_nan() && found[6].is_nan(), "{found:?}");
    for row in [0, 2] {
        assert!((found[row * 4] - 700f64.ln()).abs() < 1e-4);
        assert!(found[row * 4 + 2].abs() < 1e-5);
    }
}
