//! Finds, counts and clamps values that a 16-bit float cannot hold, with Burn's own operations on
//! any backend.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use gptq_format::Half;

/// Values of a matrix that are not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// Row of the first, in row-major order.
    pub row: usize,
    /// Its column.
    pub column: usize,
    /// Number of values.
    pub count: usize,
    /// True if one of them is NaN: an infinity may come from a number that was too large, a NaN
    /// does not.
    pub nan: bool,
}

/// Replaces every number of `x` beyond the range of `half`, infinities included, by the nearest in
/// range, and returns their number. NaN is unchanged.
pub(crate) fn clamp<B: Backend>(x: Tensor<B, 2>, half: Half) -> (Tensor<B, 2>, usize) {
    let over = x.clone().abs().greater_elem(half.largest());
    let count = over.clone().int().sum().into_data();
    let count = count.iter::<i64>().next().unwrap_or(0) as usize;
    match count {
        0 => (x, 0),
        _ => {
            let bound = x.clone().sign().mul_scalar(half.largest());
            (x.mask_where(over, bound), count)
        }
    }
}

/// Finds values of `x` that are not finite. Transfers it to the host.
pub(crate) fn not_finite<B: Backend>(x: Tensor<B, 2>) -> Option<NotFinite> {
    let [_, columns] = x.dims();
    let values = x.cast(DType::F32).into_data();
    let bad = values
        .iter::<f32>()
        .enumerate()
        .filter(|(_, v)| !v.is_finite());
    bad.fold(None, |found, (at, value)| {
        let mut found = found.unwrap_or(NotFinite {
            row: at / columns,
            column: at % columns,
            count: 0,
            nan: false,
        });
        found.count += 1;
        found.nan |= value.is_nan();
        Some(found)
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::{Cpu, Engine};

    fn tensor(values: &[f32], dtype: DType) -> Tensor<Cpu, 2> {
        let data = TensorData::new(values.to_vec(), [2, values.len() / 2]);
        let tensor: Tensor<Cpu, 2> = Tensor::from_data(data, (&Default::default(), DType::F32));
        tensor.cast(dtype)
    }

    #[test]
    fn what_f16_cannot_hold_is_clamped_and_counted_and_nan_stays() {
        for dtype in [DType::F32, DType::F16] {
            let values = [
                1.0,
                -7e4,
                f32::INFINITY,
                f32::NAN,
                65504.0,
                f32::NEG_INFINITY,
            ];
            let (clamped, count) = Cpu::clamp(tensor(&values, dtype), Half::F16);
            assert_eq!(count, 3, "{dtype:?}");
            let found: Vec<f32> = clamped.into_data().iter::<f32>().collect();
            assert_eq!(found[..3], [1.0, -65504.0, 65504.0]);
            assert!(found[3].is_nan());
            assert_eq!(found[4..], [65504.0, -65504.0]);
        }
        let (same, count) = Cpu::clamp(tensor(&[0.0, -3.5], DType::F32), Half::F16);
        assert_eq!(count, 0);
        assert_eq!(
            same.into_data().iter::<f32>().collect::<Vec<_>>(),
            [0.0, -3.5]
        );
    }

    #[test]
    fn bf16_holds_all_but_the_infinities() {
        for dtype in [DType::F32, DType::BF16] {
            let values = [1.0, -7e4, f32::INFINITY, f32::NAN, 3e38, f32::NEG_INFINITY];
            let (clamped, count) = Cpu::clamp(tensor(&values, dtype), Half::Bf16);
            assert_eq!(count, 2, "{dtype:?}");
            let found: Vec<f32> = clamped.into_data().iter::<f32>().collect();
            let largest = Half::Bf16.largest() as f32;
            assert_eq!([found[2], found[5]], [largest, -largest]);
            assert!(found[3].is_nan() && (found[1] + 7e4).abs() < 256.0);
        }
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_named_and_all_are_counted() {
        let values = [1.0, 2.0, 3.0, 4.0, f32::INFINITY, f32::NAN];
        let found = Cpu::not_finite(tensor(&values, DType::F16));
        let expected = NotFinite {
            row: 1,
            column: 1,
            count: 2,
            nan: true,
        };
        assert_eq!(found, Some(expected));
        assert_eq!(Cpu::not_finite(tensor(&values[..4], DType::F32)), None);
        let found = Cpu::not_finite(tensor(&[0.0, f32::INFINITY], DType::F32)).unwrap();
        assert!(!found.nan);
    }
}
