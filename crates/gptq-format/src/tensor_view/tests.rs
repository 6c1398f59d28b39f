//! Views of storages built by hand.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::*;

/// Views the `[4, 6]` numbers 0..24 with `shape` and `strides`.
fn view<'a>(storage: &'a [u8], shape: &'a [usize], strides: &'a [usize]) -> TensorView<'a> {
    TensorView {
        name: "x",
        dtype: Dtype::F32,
        shape,
        strides: Some(strides),
        storage,
    }
}

fn numbers() -> Vec<u8> {
    (0..24).flat_map(|v| (v as f32).to_le_bytes()).collect()
}

#[test]
fn strided_views_are_gathered_in_row_major_order() {
    let storage = numbers();
    let transposed = view(&storage, &[6, 4], &[1, 6]);
    let expected: Vec<f32> = (0..24).map(|i| (i % 4 * 6 + i / 4) as f32).collect();
    let mut out = vec![0; 24];
    transposed.halves_into(Half::F16, &mut out).unwrap();
    assert_eq!(out.reinterpret_cast::<f16>().to_f32_vec(), expected);
    transposed.halves_into(Half::Bf16, &mut out).unwrap();
    assert_eq!(out.reinterpret_cast::<bf16>().to_f32_vec(), expected);
    let bytes: Vec<u8> = expected.iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(&*transposed.bytes(), bytes);

    let expanded = view(&storage[4..12], &[3, 2], &[0, 1]);
    let mut out = vec![0; 6];
    expanded.halves_into(Half::F16, &mut out).unwrap();
    let out = out.reinterpret_cast::<f16>().to_f32_vec();
    assert_eq!(out, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
}

#[test]
fn equal_numbers_are_equal_in_any_type_and_order() {
    let storage = numbers();
    let halves: Vec<u8> = (0..24)
        .flat_map(|v| bf16::from_f32(v as f32).to_le_bytes())
        .collect();
    let wide = view(&storage, &[4, 6], &[6, 1]);
    let narrow = TensorView {
        dtype: Dtype::BF16,
        strides: None,
        storage: &halves,
        ..wide
    };
    let turned = TensorView {
        strides: Some(&[1, 4]),
        ..wide
    };
    assert!(wide.same_values(&narrow) && narrow.same_values(&wide));
    assert!(!turned.same_values(&wide) && !narrow.same_values(&turned));
    assert!(!wide.is_zero() && view(&storage[..4], &[3], &[0]).is_zero());
    let minus = (-0.0f32).to_le_bytes();
    assert!(view(&minus, &[1], &[1]).is_zero());
}

#[test]
fn walking_may_start_anywhere() {
    let (shape, strides) = ([2, 3, 4], [1, 8, 2]);
    let all: Vec<usize> = offsets(&shape, &strides, 0).take(24).collect();
    for first in 0..24 {
        let rest: Vec<usize> = offsets(&shape, &strides, first).take(24 - first).collect();
        assert_eq!(rest, all[first..], "{first}");
    }
}

#[test]
fn flaws_are_counted_over_all_pieces() {
    let n = 2 * PIECE + 5;
    let mut values = vec![1f32; n];
    for at in [7, PIECE + 1, n - 1] {
        values[at] = 7e4;
    }
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let mut tensor = TensorView {
        name: "x",
        dtype: Dtype::F32,
        shape: &[n],
        strides: None,
        storage: &bytes,
    };
    let mut out = vec![0; n];
    assert!(matches!(
        tensor.halves_into(Half::F16, &mut out),
        Err(FormatError::Overflow {
            first: 7,
            count: 3,
            ..
        })
    ));
    for step in [1000, PIECE, n, 3 * n] {
        let refused = tensor.each_halves(Half::F16, step, |_, _| Ok::<_, FormatError>(()));
        assert!(matches!(
            refused,
            Err(FormatError::Overflow {
                first: 7,
                count: 3,
                ..
            })
        ));
        let (mut pieces, mut whole) = (Vec::new(), vec![0; n]);
        let take = |first, piece: &[u16]| {
            assert_eq!(first, pieces.len());
            assert!(piece.len() <= step);
            pieces.extend_from_slice(piece);
            Ok::<_, FormatError>(())
        };
        tensor.each_halves(Half::Bf16, step, take).unwrap();
        tensor.halves_into(Half::Bf16, &mut whole).unwrap();
        assert!(pieces == whole, "{step}");
    }
    tensor.halves_into(Half::Bf16, &mut out).unwrap();
    assert_eq!(out[7], bf16::from_f32(7e4).to_bits());
    let mut bytes = bytes.clone();
    bytes[4 * PIECE..4 * PIECE + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    tensor.storage = &bytes;
    assert!(matches!(
        tensor.halves_into(Half::F16, &mut out),
        Err(FormatError::NonFinite { count: 1, .. })
    ));
}

#[test]
fn every_float_becomes_either_half() {
    let values = [1.0f32, -3.0e-3, 65504.0, 1.0e-20];
    let views: [(Dtype, Vec<u8>); 3] = [
        (
            Dtype::F32,
            values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ),
        (
            Dtype::BF16,
            (values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())).collect(),
        ),
        (
            Dtype::F16,
            (values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())).collect(),
        ),
    ];
    for (dtype, storage) in &views {
        let tensor = TensorView {
            name: "x",
            dtype: *dtype,
            shape: &[4],
            strides: None,
            storage,
        };
        let stored = |v: f32| match dtype {
            Dtype::F16 => f16::from_f32(v).to_f32(),
            Dtype::BF16 => bf16::from_f32(v).to_f32(),
            _ => v,
        };
        let mut out = [0; 4];
        tensor.halves_into(Half::Bf16, &mut out).unwrap();
        assert_eq!(out, values.map(|v| bf16::from_f32(stored(v)).to_bits()));
        // 65504 rounds up to 2^16 in bf16, which f16 cannot hold.
        match tensor.halves_into(Half::F16, &mut out) {
            Ok(()) => assert_eq!(out, values.map(|v| f16::from_f32(stored(v)).to_bits())),
            Err(error) => {
                assert_eq!(*dtype, Dtype::BF16);
                let error = error.to_string();
                assert!(error.contains("too large for f16 (over 65504)"), "{error}");
                assert!(error.contains("element 2; dtype = \"bf16\""), "{error}");
            }
        }
    }
    let storage = f32::MAX.to_le_bytes();
    let tensor = TensorView {
        name: "x",
        dtype: Dtype::F32,
        shape: &[1],
        strides: None,
        storage: &storage,
    };
    let error = tensor.halves_into(Half::Bf16, &mut [0]).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("too large for bf16 (over 3.39e38)"),
        "{error}"
    );
    assert!(!error.contains("dtype"), "{error}");
}
