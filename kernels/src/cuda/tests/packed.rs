//! Products with packed weights, compared with the dequantized weights in f64.

use burn::tensor::Element;
use gptq_format::{Bits, QuantizedLinear};
use half::{bf16, f16};

use crate::cuda::{
    Cuda, packed_linear, resident,
    testing::{Random, device, distance, rounding, tensor, values, wide},
};
use crate::{Codes, Engine};

/// Makes a layer of random codes, zero points and scales; with `act_order` a group's columns are
/// scattered.
pub(super) fn layer(
    [columns, rows]: [usize; 2],
    bits: Bits,
    group: usize,
    act_order: bool,
    random: &mut Random,
) -> QuantizedLinear {
    let codes = 1 << bits.get();
    let mut below = |limit: usize, count: usize| -> Vec<usize> {
        (0..count)
            .map(|_| (random.next() % limit as u64) as usize)
            .collect()
    };
    let groups = columns / group;
    let mut g_idx: Vec<i32> = (0..columns).map(|i| (i / group) as i32).collect();
    if act_order {
        for (at, other) in below(columns, columns).into_iter().enumerate() {
            g_idx.swap(at, other);
        }
    }
    let bytes = |values: Vec<usize>| values.into_iter().map(|v| v as u8).collect();
    QuantizedLinear {
        bits,
        in_features: columns,
        out_features: rows,
        codes: bytes(below(codes, columns * rows)),
        zeros: bytes(below(codes, groups * rows)),
        scales: random.halves(groups * rows, 0.01),
        g_idx,
    }
}

#[test]
fn packed_weights_multiply_as_the_weights_they_stand_for() {
    packed_of::<f16>();
    packed_of::<bf16>();
}

fn packed_of<E: Element>() {
    // Each output is rounded once; the dense path rounds each weight as well. Sums are f32.
    let close = 2.0 * rounding::<E>();
    let Some(device) = device() else { return };
    let mut random = Random(71);
    for (shape, group) in [
        ([128, 32], 32),
        ([256, 96], 64),
        ([4096, 64], 128),
        ([11008, 32], 128),
        ([11008, 64], 11008),
        ([640, 4096], 640),
        ([8288, 64], 32),
    ] {
        for bits in Bits::ALL {
            for act_order in [false, true] {
                let layer = layer(shape, bits, group, act_order, &mut random);
                let packed = layer.pack();
                let weight = resident(&packed, &device).unwrap();
                assert_eq!(weight.download(), packed);
                let [columns, rows] = shape;
                let dense = layer.dequantize();
                for tokens in [1, 3] {
                    let x = random.halves::<E>(tokens * columns, 1.0);
                    let found = packed_linear(tensor(&x, [tokens, columns], &device), &weight);
                    let mut expected = Vec::with_capacity(tokens * rows);
                    for x in x.chunks(columns) {
                        for w in dense.chunks(columns) {
                            let products = x.iter().zip(w).map(|(x, w)| wide(*x) * f64::from(*w));
                            expected.push(products.sum::<f64>());
                        }
                    }
                    let off = distance(&values(found.unwrap()), &expected);
                    let label = format!("{shape:?} {bits:?} {group} {act_order} {tokens}");
                    assert!(off < close, "{label}: {off}");
                }
            }
        }
    }
}

/// Zero points from 0 to the highest code among them.
#[test]
fn codes_that_are_packed_arrive_as_they_were() {
    let Some(device) = device() else { return };
    let mut random = Random(73);
    for (shape, group) in [([32, 32], 32), ([128, 96], 64), ([11008, 160], 128)] {
        for bits in Bits::ALL {
            let layer = layer(shape, bits, group, true, &mut random);
            let packed = Cuda::pack(Codes::upload(layer.clone(), &device)).wait();
            assert_eq!(packed, layer.pack(), "{shape:?} {bits:?} {group}");
        }
    }
}

#[test]
fn an_input_of_another_width_is_refused() {
    let Some(device) = device() else { return };
    let mut random = Random(72);
    let layer = layer([128, 32], Bits::Four, 32, false, &mut random);
    let weight = resident(&layer.pack(), &device).unwrap();
    let x = tensor(&random.halves::<f16>(64, 1.0), [1, 64], &device);
    assert!(packed_linear(x, &weight).is_err());
}
