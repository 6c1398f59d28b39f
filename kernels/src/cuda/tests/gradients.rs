//! Reverse passes, against the defaults in f32 on the CPU.

use burn::tensor::{DType, Element, Tensor, TensorData};
use half::{bf16, f16};

use crate::cuda::{
    Cuda, Device, attention_backward, geglu_backward, input_gradient, norm_backward,
    swiglu_backward,
    testing::{Random, device, distance, rounding, tensor, values, wide},
    weight_gradient,
};
use crate::{Cpu, Engine, NormOptions, Scores};

/// The same f16 or bf16 values on the device and, as f32, on the CPU.
fn both<E: Element, const D: usize>(
    random: &mut Random,
    shape: [usize; D],
    [mean, deviation]: [f64; 2],
    device: &Device,
) -> (Tensor<Cuda, D>, Tensor<Cpu, D>) {
    let count = shape.iter().product();
    let value = |_| E::from_elem(mean + deviation * random.normal());
    let halves: Vec<E> = (0..count).map(value).collect();
    let wide: Vec<f32> = halves.iter().map(|it| wide(*it) as f32).collect();
    let data = TensorData::new(wide, shape);
    let host = Tensor::from_data(data, (&Default::default(), DType::F32));
    (tensor(&halves, shape, device), host)
}

fn off<const D: usize>(found: Tensor<Cuda, D>, expected: Tensor<Cpu, D>) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let expected: Vec<f64> = expected.into_data().iter::<f64>().collect();
    distance(&values(found), &expected)
}

#[test]
fn a_linears_gradients_are_products_with_its_weight_and_its_input() {
    linear_of::<f16>();
    linear_of::<bf16>();
}

fn linear_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(31);
    // The last has more tokens than one product takes.
    for (tokens, inside, out) in [(1, 1, 1), (31, 127, 240), (127, 240, 31), (16_500, 40, 24)] {
        let (dy, host_dy) = both::<E, 2>(&mut random, [tokens, out], [0.0, 1.0], &device);
        let (x, host_x) = both::<E, 2>(&mut random, [tokens, inside], [0.0, 1.0], &device);
        let (w, host_w) = both::<E, 2>(&mut random, [out, inside], [0.0, 0.05], &device);
        let label = format!("{tokens} x {inside} x {out}");
        let dx = input_gradient(dy.clone(), w).unwrap();
        assert_eq!(dx.dtype(), E::dtype());
        let off_x = off(dx, Cpu::matmul_nn(host_dy.clone(), host_w));
        // The output is rounded once.
        assert!(off_x < rounding::<E>(), "{label}: {off_x}");
        let dw = weight_gradient(dy, x).unwrap();
        assert_eq!(dw.dtype(), DType::F32);
        let off_w = off(dw, Cpu::matmul_tn(host_dy, host_x));
        // As for a Gram matrix: `tokens` additions in f32, each off by at most 2^-23 of the running sum (tensor cores
        // may truncate).
        let bound = tokens as f64 * 2.0_f64.powi(-23);
        assert!(off_w < bound, "{label}: {off_w} over {bound}");
    }
}

#[test]
fn the_gradient_of_a_norm_is_without_the_part_along_its_output() {
    norms::<f16>();
    norms::<bf16>();
}

fn norms<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(32);
    for (offset, centred) in [(0.0, false), (1.0, false), (0.0, true)] {
        for (rows, len) in [(1, 2), (3, 31), (5, 257), (70_000, 16), (2, 240), (7, 4096)] {
            let norm = NormOptions {
                eps: 1e-2,
                offset,
                centred,
            };
            // Off the middle.
            let (x, host_x) = both::<E, 2>(&mut random, [rows, len], [1.0, 3.0], &device);
            let (w, host_w) = both::<E, 1>(&mut random, [len], [0.5, 1.0], &device);
            let (dy, host_dy) = both::<E, 2>(&mut random, [rows, len], [0.5, 1.0], &device);
            let found = norm_backward(x, w, dy, norm).unwrap();
            let off = off(found, Cpu::norm_backward(host_x, host_w, host_dy, norm));
            // The output is rounded once; of two numbers without their mean little is left, at which f32's rounding
            // shows.
            assert!(
                off < 1.1 * rounding::<E>(),
                "{rows} x {len}, {norm:?}: {off}"
            );
        }
    }
}

#[test]
fn the_gradients_of_gates_are_those_of_both_factors() {
    gates::<f16>();
    gates::<bf16>();
}

fn gates<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(33);
    // Fewer elements than a thread takes, an odd number, a whole number of vectors.
    for shape in [[1, 1], [31, 127], [3, 240]] {
        let (gate, host_gate) = both::<E, 2>(&mut random, shape, [0.0, 4.0], &device);
        let (up, host_up) = both::<E, 2>(&mut random, shape, [0.0, 1.0], &device);
        let (dy, host_dy) = both::<E, 2>(&mut random, shape, [0.0, 1.0], &device);
        let hosts = || (host_gate.clone(), host_up.clone(), host_dy.clone());
        let silu = swiglu_backward(gate.clone(), up.clone(), dy.clone()).unwrap();
        let (g, u, d) = hosts();
        let expected_silu = Cpu::swiglu_backward(g, u, d);
        let gelu = geglu_backward(gate, up, dy).unwrap();
        let (g, u, d) = hosts();
        let expected_gelu = Cpu::geglu_backward(g, u, d);
        let found = silu.into_iter().chain(gelu);
        let expected = expected_silu.into_iter().chain(expected_gelu);
        for (at, (found, expected)) in found.zip(expected).enumerate() {
            let off = off(found, expected);
            assert!(off < rounding::<E>(), "{at} of {shape:?}: {off}");
        }
    }
}

fn window(window: usize) -> Scores {
    Scores {
        window: Some(window),
        ..Scores::default()
    }
}

#[test]
fn the_gradients_of_attention_are_those_of_the_default_with_grouped_heads() {
    for shape in [
        [1, 1, 1, 1, 16],
        [2, 31, 4, 2, 64],
        [1, 127, 3, 1, 128],
        [2, 240, 2, 2, 80],
        [1, 300, 6, 2, 32],
        // Three blocks of queries.
        [2, 600, 4, 2, 64],
        [1, 129, 1, 1, 256],
        [1, 33, 3, 3, 20],
    ] {
        attention_of::<f16>(shape, Scores::default());
        attention_of::<bf16>(shape, Scores::default());
    }
}

#[test]
fn the_gradients_of_attention_stay_in_a_window_and_pass_bounded_scores() {
    for how in [
        window(1),
        window(63),
        window(256),
        window(257),
        window(1000),
        Scores {
            scale: Some(0.31),
            ..Scores::default()
        },
        Scores {
            softcap: Some(3.0),
            ..Scores::default()
        },
        Scores {
            scale: Some(0.2),
            softcap: Some(5.0),
            window: Some(70),
        },
    ] {
        attention_of::<f16>([1, 600, 4, 2, 32], how);
        attention_of::<bf16>([2, 300, 2, 1, 64], how);
    }
}

/// The gradients of attention of `[windows, seq, heads, kv_heads, dim]`.
fn attention_of<E: Element>(shape: [usize; 5], how: Scores) {
    let Some(device) = device() else { return };
    let mut random = Random(34);
    let [windows, seq, heads, kv_heads, dim] = shape;
    // Scores with a standard deviation of about 4, as for the forward pass.
    let of_heads = |heads| [windows, seq, heads, dim];
    let (q, host_q) = both::<E, 4>(&mut random, of_heads(heads), [0.0, 2.0], &device);
    let (k, host_k) = both::<E, 4>(&mut random, of_heads(kv_heads), [0.0, 2.0], &device);
    let (v, host_v) = both::<E, 4>(&mut random, of_heads(kv_heads), [0.0, 1.0], &device);
    let whole = [windows, seq, heads * dim];
    let (d_out, host_d_out) = both::<E, 3>(&mut random, whole, [0.0, 1.0], &device);
    let again = attention_backward([q.clone(), k.clone(), v.clone()], d_out.clone(), how).unwrap();
    let found = attention_backward([q, k, v], d_out, how).unwrap();
    let expected = Cpu::attention_backward([host_q, host_k, host_v], host_d_out, how);
    let size = |x: &Tensor<Cpu, 4>| x.clone().abs().max().into_scalar();
    let most = size(&expected[2]);
    for (at, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        let label = format!("{at} of {shape:?} {how:?}");
        assert_eq!(found.dtype(), E::dtype(), "{label}");
        assert_eq!(values(found.clone()), values(again[at].clone()), "{label}");
        if size(&expected) > 1e-3 * most {
            // Weights and gradients of scores are rounded once, and so is the output.
            let off = off(found, expected);
            assert!(off < 2.0 * rounding::<E>(), "{label}: {off}");
        } else {
            // Of one key, the weight is 1 whatever the query: both are 0 but for f32's rounding.
            let left = found.abs().max().into_scalar();
            assert!(wide(left) < 1e-2, "{label}: {left}");
        }
    }
}

#[test]
fn gradients_of_other_shapes_are_refused() {
    let Some(device) = device() else { return };
    let mut random = Random(35);
    let mut half = |shape| both::<f16, 2>(&mut random, shape, [0.0, 1.0], &device).0;
    let (x, w, dy) = (half([4, 32]), half([16, 32]), half([4, 24]));
    assert!(input_gradient(dy.clone(), w).is_err());
    assert!(weight_gradient(half([5, 24]), x.clone()).is_err());
    assert!(weight_gradient(half([0, 24]), half([0, 32])).is_err());
    assert!(swiglu_backward(x.clone(), x.clone(), dy.clone()).is_err());
    let weight = half([1, 32]).reshape([32]);
    assert!(norm_backward(x, weight, dy, NormOptions::default()).is_err());
}
