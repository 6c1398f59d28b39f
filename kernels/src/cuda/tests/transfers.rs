//! Transfers of values to the device and back, and operations without a kernel of their own, in
//! both 16-bit types.

use burn::tensor::{Element, Tensor};
use gptq_format::Half;
use half::{bf16, f16};

use crate::cuda::{
    Cuda,
    testing::{Random, device, distance, rounding, tensor, values, wide},
};
use crate::{Engine, HostBuffer, Scores, dtype};

#[test]
fn bits_come_back_from_the_device_as_they_went() {
    let Some(device) = device() else { return };
    for half in [Half::F16, Half::Bf16] {
        // Finite in either type.
        let bits: Vec<u16> = (0..1000).map(|i| 0x3c00 + i % 0x300).collect();
        let mut pinned = Cuda::host_buffer(bits.len(), half, &device);
        pinned.bits_mut().copy_from_slice(&bits);
        for buffer in [pinned, HostBuffer::pageable(bits.clone(), half)] {
            let x: Tensor<Cuda, 2> = Cuda::upload(&buffer, 37, [31, 17], &device);
            assert_eq!(x.dtype(), dtype(half));
            let back = Cuda::download(x);
            assert_eq!(back.half(), half);
            assert_eq!(back.bits(), &bits[37..37 + 31 * 17]);
        }
    }
}

#[test]
fn numbers_out_of_range_are_clamped_on_the_device() {
    let Some(device) = device() else { return };
    let large = [
        bf16::INFINITY,
        bf16::from_f32(-7e4),
        bf16::ONE,
        bf16::NEG_INFINITY,
    ];
    let x = tensor(&large, [2, 2], &device);
    let (clamped, count) = Cuda::clamp(x, Half::Bf16);
    let largest = Half::Bf16.largest();
    assert_eq!(count, 2);
    assert_eq!(
        values(clamped),
        [largest, wide(large[1]), 1.0, -largest],
        "only what is infinite"
    );
}

#[test]
fn a_token_after_a_cache_attends_as_the_last_of_a_window() {
    cached_of::<f16>();
    cached_of::<bf16>();
}

fn cached_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(15);
    let (seq, heads, kv_heads, dim) = (33, 4, 2, 64);
    let q = random.halves::<E>(seq * heads * dim, 1.0);
    let [k, v] = [(); 2].map(|()| random.halves::<E>(seq * kv_heads * dim, 1.0));
    let q = tensor::<E, 4>(&q, [1, seq, heads, dim], &device);
    let [k, v] = [k, v].map(|x| tensor::<E, 4>(&x, [1, seq, kv_heads, dim], &device));
    let whole = Cuda::causal_attention(q.clone(), k.clone(), v.clone(), Scores::default());
    let expected = values(whole.narrow(1, seq - 1, 1));
    let held = |x: Tensor<Cuda, 4>| x.squeeze_dim::<3>(0).swap_dims(0, 1);
    let last = q.narrow(1, seq - 1, 1);
    let found = Cuda::cached_attention(last, held(k), held(v), seq - 1, Scores::default());
    // Scores, of deviation 1 and rarely over 4, are rounded on one side, and so are their queries:
    // at most 4 roundings from each, and the probabilities' and the outputs' own, all at random
    // signs.
    let found = distance(&values(found), &expected);
    assert!(found < 8.0 * rounding::<E>(), "{found}");
}
