//! Reverse passes against Burn's autodiff of the forward operations.

use burn::tensor::{DType, Tensor, TensorData};
use burn_autodiff::Autodiff;
use gptq_format::Half;

use super::*;
use crate::cuda::testing::{Random, distance};
use crate::{Cpu, Engine};

type Differentiated = Autodiff<Cpu>;

/// Only the forward operations' defaults are called.
impl Engine for Differentiated {
    fn compute(half: Half) -> DType {
        Cpu::compute(half)
    }

    fn state_half(half: Half, wide: bool) -> Half {
        Cpu::state_half(half, wide)
    }
}

/// Two f32 programs of a few hundred additions each: sqrt(300) 2^-24 is 1e-6 of a sum, and a row's projection takes
/// numbers of the same size off each other.
const TOLERANCE: f64 = 1e-5;

/// Normal numbers around `mean`, for autodiff to follow.
fn normal<const D: usize>(
    random: &mut Random,
    shape: [usize; D],
    mean: f64,
) -> Tensor<Differentiated, D> {
    let count = shape.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|_| (mean + random.normal()) as f32)
        .collect();
    let data = TensorData::new(values, shape);
    Tensor::from_data(data, (&Default::default(), DType::F32)).require_grad()
}

fn values<const D: usize>(x: Tensor<Cpu, D>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

fn assert_close<const D: usize>(label: &str, found: Tensor<Cpu, D>, expected: Tensor<Cpu, D>) {
    assert_eq!(found.dims(), expected.dims(), "{label}");
    let expected = values(expected);
    assert!(expected.iter().any(|&it| it != 0.0), "{label}: no gradient");
    let off = distance(&values(found), &expected);
    assert!(off < TOLERANCE, "{label}: {off}");
}

#[test]
fn the_gradient_of_a_linear_is_a_product_with_its_weight_or_its_input() {
    let mut random = Random(7);
    let (x, w, dy) = (
        normal(&mut random, [37, 24], 0.0),
        normal(&mut random, [19, 24], 0.0),
        normal(&mut random, [37, 19], 0.0),
    );
    let y = Differentiated::matmul_nt(x.clone(), w.clone());
    let gradients = (y * dy.clone()).sum().backward();
    let (x_of, w_of) = (x.grad(&gradients).unwrap(), w.grad(&gradients).unwrap());
    let (x, w, dy) = (x.inner(), w.inner(), dy.inner());
    assert_close("x", Cpu::matmul_nn(dy.clone(), w), x_of);
    assert_close("w", Cpu::matmul_tn(dy, x), w_of);
}

#[test]
fn the_gradient_of_each_norm_is_that_of_autodiff() {
    let mut random = Random(7);
    let plain = NormOptions {
        eps: 1e-2,
        ..NormOptions::default()
    };
    let plus_one = NormOptions {
        offset: 1.0,
        ..plain
    };
    let centred = NormOptions {
        centred: true,
        ..plain
    };
    type Forward =
        fn(Tensor<Differentiated, 2>, Tensor<Differentiated, 1>, f64) -> Tensor<Differentiated, 2>;
    let forwards: [(&str, NormOptions, Forward); 4] = [
        ("rms", plain, Differentiated::rms_norm),
        ("rms in f32", plain, |x, w, eps| {
            Differentiated::rms_norm_f32(x, w, eps, 0.0)
        }),
        ("rms plus one", plus_one, |x, w, eps| {
            Differentiated::rms_norm_f32(x, w, eps, 1.0)
        }),
        ("centred", centred, Differentiated::centred_norm),
    ];
    for (label, options, forward) in forwards {
        // Off the middle, so that taking the mean off matters.
        let (x, dy) = (
            normal(&mut random, [9, 31], 0.5),
            normal(&mut random, [9, 31], 0.5),
        );
        let w = normal(&mut random, [31], 1.0);
        let y = forward(x.clone(), w.clone(), options.eps);
        let gradients = (y * dy.clone()).sum().backward();
        let expected = x.grad(&gradients).unwrap();
        let found = Cpu::norm_backward(x.inner(), w.inner(), dy.inner(), options);
        assert_close(label, found, expected);
    }
}

#[test]
fn the_gradients_of_gates_are_those_of_autodiff() {
    let mut random = Random(7);
    for gelu in [false, true] {
        let [gate, up, dy] = [(); 3].map(|()| normal(&mut random, [13, 29], 0.3));
        let gate = Tensor::from_inner(gate.inner() * 2.0).require_grad();
        let y = match gelu {
            false => Differentiated::swiglu(gate.clone(), up.clone()),
            true => Differentiated::geglu(gate.clone(), up.clone()),
        };
        let gradients = (y * dy.clone()).sum().backward();
        let expected = [&gate, &up].map(|it| it.grad(&gradients).unwrap());
        let [gate, up, dy] = [gate, up, dy].map(Tensor::inner);
        let found = match gelu {
            false => Cpu::swiglu_backward(gate, up, dy),
            true => Cpu::geglu_backward(gate, up, dy),
        };
        for (found, expected) in found.into_iter().zip(expected) {
            assert_close(if gelu { "geglu" } else { "swiglu" }, found, expected);
        }
    }
}

#[test]
fn the_gradients_of_attention_are_those_of_autodiff() {
    let mut random = Random(7);
    let plain = Scores::default();
    let all = Scores {
        scale: Some(0.4),
        softcap: Some(3.0),
        window: Some(5),
    };
    let softcap = Scores {
        softcap: Some(2.0),
        ..plain
    };
    let window = Scores {
        window: Some(300),
        ..plain
    };
    for ([windows, seq, heads, kv_heads, dim], scores) in [
        ([2, 17, 4, 2, 8], plain),
        ([2, 17, 4, 2, 8], all),
        ([1, 23, 3, 1, 4], softcap),
        ([1, 1, 2, 2, 4], plain),
        // More than one block of queries, and keys that a later block does not see.
        ([1, 600, 2, 1, 4], plain),
        ([1, 600, 2, 1, 4], window),
        ([1, 600, 2, 2, 4], all),
    ] {
        let q = normal(&mut random, [windows, seq, heads, dim], 0.0);
        let k = normal(&mut random, [windows, seq, kv_heads, dim], 0.0);
        let v = normal(&mut random, [windows, seq, kv_heads, dim], 0.2);
        let d_out = normal(&mut random, [windows, seq, heads * dim], 0.0);
        let out = Differentiated::causal_attention(q.clone(), k.clone(), v.clone(), scores);
        let gradients = (out * d_out.clone()).sum().backward();
        let expected = [&q, &k, &v].map(|it| it.grad(&gradients).unwrap());
        let qkv = [q, k, v].map(Tensor::inner);
        let found = Cpu::attention_backward(qkv, d_out.inner(), scores);
        for (at, (found, expected)) in found.into_iter().zip(expected).enumerate() {
            // Of one key, neither its product nor the query's matters.
            if seq > 1 || at == 2 {
                let label = format!("{at} of {windows} {seq} {heads}/{kv_heads} {scores:?}");
                assert_close(&label, found, expected);
            }
        }
    }
}

#[test]
fn the_gradient_of_a_rotation_is_the_rotation_back() {
    let mut random = Random(7);
    for (dim, half) in [(8, 4), (8, 3)] {
        for interleaved in [false, true] {
            let forward = |x, cos, sin| match interleaved {
                false => Differentiated::rotary(x, cos, sin),
                true => Differentiated::rotary_interleaved(x, cos, sin),
            };
            let (x, dy) = (
                normal(&mut random, [2, 5, 3, dim], 0.0),
                normal(&mut random, [2, 5, 3, dim], 0.0),
            );
            let angles = normal(&mut random, [5, half], 0.0).inner();
            let (cos, sin) = (angles.clone().cos() * 1.3, angles.sin() * 1.3);
            let constant = |x: &Tensor<Cpu, 2>| Tensor::from_inner(x.clone());
            let y = forward(x.clone(), constant(&cos), constant(&sin));
            let gradients = (y * dy.clone()).sum().backward();
            let (dy, back) = (dy.inner(), sin.mul_scalar(-1.0));
            let found = match interleaved {
                false => Cpu::rotary(dy, cos, back),
                true => Cpu::rotary_interleaved(dy, cos, back),
            };
            let label = format!("{dim} {half} {interleaved}");
            assert_close(&label, found, x.grad(&gradients).unwrap());
        }
    }
}
