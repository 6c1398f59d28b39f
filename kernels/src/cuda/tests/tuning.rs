//! Steps of tuning, compared with the default on the host.

use burn::tensor::{DType, Element, Tensor, TensorData};
use gptq_format::{Bits, QuantizedLinear};
use half::{bf16, f16};

use crate::cuda::{
    Cuda, Device,
    testing::{Random, device, rounding, tensor_f32, values},
};
use crate::{Codes, Cpu, Engine, Tunable, TuningStep};

/// Makes a linear whose groups lie in order or scattered, and unrounded codes.
fn linear(
    [n_out, n_in]: [usize; 2],
    size: usize,
    bits: Bits,
    scattered: bool,
    random: &mut Random,
) -> (QuantizedLinear, Vec<f32>) {
    let most = f64::from(bits.max_code());
    let unrounded: Vec<f32> = (0..n_out * n_in)
        .map(|_| (random.uniform() * (most + 0.98) - 0.49) as f32)
        .collect();
    let groups = n_in / size;
    let g_idx = |column: usize| match scattered {
        true => column % groups,
        false => column / size,
    };
    let code = |i: usize| unrounded[i % n_out * n_in + i / n_out].round_ties_even() as u8;
    let linear = QuantizedLinear {
        bits,
        in_features: n_in,
        out_features: n_out,
        codes: (0..n_in * n_out).map(code).collect(),
        scales: (random.halves::<f16>(groups * n_out, 0.01).into_iter())
            .map(|scale| if scale == f16::ZERO { f16::ONE } else { scale })
            .collect(),
        zeros: (0..groups * n_out)
            .map(|_| (random.next() % (most as u64 + 1)) as u8)
            .collect(),
        g_idx: (0..n_in).map(|column| g_idx(column) as i32).collect(),
    };
    (linear, unrounded)
}

#[test]
fn steps_are_those_of_the_host() {
    steps_of::<f16>();
    steps_of::<bf16>();
}

fn steps_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(31);
    for (shape, size, bits, scattered) in [
        ([32, 64], 32, Bits::Four, false),
        ([96, 160], 32, Bits::Two, true),
        ([33, 96], 96, Bits::Eight, false),
        ([64, 256], 128, Bits::Three, true),
    ] {
        let [n_out, n_in] = shape;
        let (linear, unrounded) = linear(shape, size, bits, scattered, &mut random);
        let host_codes = Codes::upload(linear.clone(), &Default::default());
        let data = TensorData::new(unrounded.clone(), shape);
        let on_host = Tensor::from_data(data, (&Default::default(), DType::F32));
        let mut host: Tunable<Cpu> = Tunable::new(host_codes, on_host);
        let here = Codes::upload(linear, &device);
        let mut here: Tunable<Cuda> = Tunable::new(here, tensor_f32(&unrounded, shape, &device));
        for number in 1..=5 {
            let mut gradient: Vec<f32> =
                (0..n_out * n_in).map(|_| random.normal() as f32).collect();
            gradient[number] = f32::NAN;
            let step = TuningStep {
                number,
                code_rate: 0.13,
                scale_rate: 0.021,
            };
            let data = TensorData::new(gradient.clone(), shape);
            let of_host = Tensor::from_data(data, (&Default::default(), DType::F32));
            let expected = Cpu::tune(&mut host, of_host, step, DType::F32);
            let expected: Vec<f64> = expected.into_data().iter::<f64>().collect();
            let of_here = tensor_f32(&gradient, shape, &device);
            let weights = values(Cuda::tune(&mut here, of_here, step, E::dtype()));
            // Sums of a group's pull are taken in another order: the scale may be the neighbouring f16, and a number
            // that lies on a tie may be rounded the other way.
            let near = |(a, b): &(&f64, &f64)| (*a - *b).abs() <= 2.0 * rounding::<E>() * b.abs();
            let same = weights.iter().zip(&expected).filter(near).count();
            assert!(
                same as f64 >= 0.999 * expected.len() as f64,
                "{shape:?} {number}: {same}"
            );
        }
        let (found, expected) = (Cuda::tuned(&here).download(), Cpu::tuned(&host).download());
        assert_eq!(
            (&found.zeros, &found.g_idx),
            (&expected.zeros, &expected.g_idx)
        );
        let same = found
            .codes
            .iter()
            .zip(&expected.codes)
            .filter(|(a, b)| a == b);
        assert!(
            same.count() as f64 >= 0.999 * expected.codes.len() as f64,
            "{shape:?}"
        );
        for (found, expected) in found.scales.iter().zip(&expected.scales) {
            let off = (found.to_f64() - expected.to_f64()).abs();
            assert!(
                off <= 2.0 * rounding::<f16>() * expected.to_f64().abs(),
                "{shape:?}"
            );
        }
    }
}

#[test]
fn without_a_rate_the_linear_stays_as_it_is_on_the_device() {
    let Some(device) = device() else { return };
    let device: Device = device;
    let (linear, unrounded) = linear([32, 64], 32, Bits::Three, true, &mut Random(5));
    let codes = Codes::upload(linear.clone(), &device);
    let mut tunable: Tunable<Cuda> = Tunable::new(codes, tensor_f32(&unrounded, [32, 64], &device));
    let gradient = tensor_f32(&[1.0; 32 * 64], [32, 64], &device);
    let step = TuningStep {
        number: 1,
        code_rate: 0.0,
        scale_rate: 0.0,
    };
    let weights = Cuda::tune(&mut tunable, gradient, step, DType::F16);
    let expected: Vec<f64> = (linear.dequantize().iter())
        .map(|&w| f16::from_f32(w).to_f64())
        .collect();
    assert_eq!(values(weights), expected);
    assert_eq!(Cuda::tuned(&tunable).download(), linear);
}
