//! Numbers of the CPU's tensors as slices, and loops over them as vector instructions.
//!
//! Loops that read and write f32 by additions and products are compiled for the processor's vectors by the crate `pulp`;
//! sums have as many lanes on every processor, so that bits do not depend on it.
//!
//! The exponential is `2^n p(r)` for `x = n ln 2 + r` with Taylor's polynomial of degree 6 for `|r| <= ln 2 / 2`: its
//! remainder is `(ln 2 / 2)^7 / 7! = 1.2e-7`, one unit in the last place of f32.

use burn::tensor::{DType, Tensor, TensorData};
use burn_flex::FlexTensor;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::Cpu;

/// Lanes of a sum or maximum over a row.
const LANES: usize = 16;
/// Numbers that are converted as one piece.
const PIECE: usize = 1 << 14;

/// The numbers of a tensor, in the order of its indices.
pub(crate) struct Floats(FlexTensor);

impl Floats {
    /// Takes a tensor, which is copied only if it does not lie in order.
    pub(crate) fn of<const D: usize>(tensor: Tensor<Cpu, D>) -> Self {
        Floats(tensor.into_primitive().tensor().to_contiguous())
    }

    /// Returns the numbers of a tensor of f32.
    pub(crate) fn values(&self) -> &[f32] {
        self.0.storage()
    }
}

/// `x` in another type, rounded to the nearest, ties to even.
pub(crate) fn cast<const D: usize>(x: Tensor<Cpu, D>, dtype: DType) -> Tensor<Cpu, D> {
    let (shape, device) = (x.shape(), x.device());
    macro_rules! converted {
        ($from:ty, $to:ty, $convert:expr) => {{
            let x = Floats::of(x);
            let from = x.0.storage::<$from>();
            let mut to = vec![<$to>::default(); from.len()];
            let pieces = to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE));
            pieces.for_each($convert);
            Tensor::from_data(TensorData::new(to, shape), (&device, dtype))
        }};
    }
    match (x.dtype(), dtype) {
        (DType::F32, DType::F16) => {
            converted!(f32, f16, |(to, from)| to.convert_from_f32_slice(from))
        }
        (DType::F32, DType::BF16) => {
            converted!(f32, bf16, |(to, from)| to.convert_from_f32_slice(from))
        }
        (DType::F16, DType::F32) => {
            converted!(f16, f32, |(to, from)| from.convert_to_f32_slice(to))
        }
        (DType::BF16, DType::F32) => {
            converted!(bf16, f32, |(to, from)| from.convert_to_f32_slice(to))
        }
        _ => x.cast(dtype),
    }
}

/// Replaces the numbers of a row, of which there is at least one, by `exp(x - max x)`, and returns their sum.
pub(crate) fn softmax(row: &mut [f32]) -> f32 {
    Arch::new().dispatch(Softmax(row))
}

struct Softmax<'a>(&'a mut [f32]);

impl WithSimd for Softmax<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _simd: S) -> f32 {
        let row = self.0;
        let mut highest = [f32::NEG_INFINITY; LANES];
        let mut runs = row.chunks_exact(LANES);
        for run in &mut runs {
            for (high, &x) in highest.iter_mut().zip(run) {
                *high = if x > *high { x } else { *high };
            }
        }
        let rest = runs.remainder().iter();
        let high = highest.iter().chain(rest).copied();
        let high = high.fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });

        let mut sums = [0.0; LANES];
        let mut runs = row.chunks_exact_mut(LANES);
        for run in &mut runs {
            for (sum, x) in sums.iter_mut().zip(run) {
                *x = exp(*x - high);
                *sum += *x;
            }
        }
        let rest = runs.into_remainder();
        for (sum, x) in sums.iter_mut().zip(rest) {
            *x = exp(*x - high);
            *sum += *x;
        }
        sums.iter().sum()
    }
}

/// `exp(x)` for `x <= 0`: 0 below -87, the logarithm of the least normal number. A NaN stays.
#[inline(always)]
fn exp(x: f32) -> f32 {
    /// Adding it leaves no bits after the binary point.
    const WHOLE: f32 = 12_582_912.0;
    // ln 2 in two parts, of which the first has so few bits that its product with n is exact.
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    /// `1 / k!`.
    const P: [f32; 7] = [
        1.0,
        1.0,
        1.0 / 2.0,
        1.0 / 6.0,
        1.0 / 24.0,
        1.0 / 120.0,
        1.0 / 720.0,
    ];
    let bounded = if x < -87.0 { -87.0 } else { x };
    let n = bounded * std::f32::consts::LOG2_E + WHOLE - WHOLE;
    let r = bounded - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = P[6];
    for k in (0..6).rev() {
        p = p * r + P[k];
    }
    let power = f32::from_bits(((n as i32 + 127) as u32) << 23);
    if x < -87.0 { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_right_to_two_units_in_the_last_place() {
        let mut x = 0.0_f32;
        while x > -86.9 {
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            let error = (found - expected).abs() / expected / f64::from(f32::EPSILON);
            assert!(error < 2.0, "exp({x}) is {found}, not {expected}: {error}");
            x = x * 1.001 - 1e-4;
        }
        assert_eq!(
            [exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)],
            [1.0, 0.0, 0.0]
        );
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn a_softmax_of_any_length_sums_to_what_it_returns() {
        for length in [1, 2, 15, 16, 17, 100, 1024] {
            let row: Vec<f32> = (0..length).map(|i| (i * 37 % 101) as f32 / 7.0).collect();
            let high = row.iter().copied().fold(f32::MIN, f32::max);
            let mut found = row.clone();
            let sum = softmax(&mut found);
            let all: f64 = row.iter().map(|x| f64::from(x - high).exp()).sum();
            assert!((f64::from(sum) / all - 1.0).abs() < 1e-6, "{length}");
            for (x, found) in row.iter().zip(found) {
                let expected = f64::from(x - high).exp();
                assert!((f64::from(found) - expected).abs() <= 2.5e-7 * expected);
            }
        }
        let mut lost = [1.0, f32::NAN, 2.0];
        assert!(softmax(&mut lost).is_nan(), "a NaN does not go unseen");
    }

    /// True if `bits` are those of the number nearest to `x` in a type whose numbers `value` gives, even if there are two.
    fn nearest(x: f32, bits: u16, value: impl Fn(u16) -> f32) -> bool {
        let distance = |bits: u16| (f64::from(value(bits)) - f64::from(x)).abs();
        let own = distance(bits);
        let neighbours = [bits.wrapping_sub(1), bits.wrapping_add(1)].map(distance);
        let tie = neighbours.contains(&own);
        // The neighbours of zeros and of the largest numbers have another sign, or are none.
        neighbours.iter().all(|it| it.is_nan() || own <= *it) && (!tie || bits.is_multiple_of(2))
    }

    #[test]
    fn casts_round_to_the_nearest_ties_to_even_and_back_without_loss() {
        let values: Vec<f32> = (0..70_000)
            .map(|i| f32::from_bits(i * 61_357).clamp(-6e4, 6e4))
            .filter(|x| !x.is_nan())
            .chain([1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.0 / 2048.0])
            .chain([65_519.9, 1e-8, -3e-8, 0.0, -0.0])
            .collect();
        let length = values.len();
        let x: Tensor<Cpu, 1> = Tensor::from_data(
            TensorData::new(values.clone(), [length]),
            &Default::default(),
        );
        let in_f16 = cast(x.clone(), DType::F16);
        let in_bf16 = cast(x.clone(), DType::BF16);
        let f16s = in_f16.to_data().into_vec::<f16>().unwrap();
        let bf16s = in_bf16.to_data().into_vec::<bf16>().unwrap();
        for (&x, (a, b)) in values.iter().zip(f16s.iter().zip(&bf16s)) {
            let f16_value = |bits| f16::from_bits(bits).to_f32();
            let bf16_value = |bits| bf16::from_bits(bits).to_f32();
            assert!(nearest(x, a.to_bits(), f16_value), "{x} is not {a}");
            assert!(nearest(x, b.to_bits(), bf16_value), "{x} is not {b}");
        }
        let back = |x| cast(x, DType::F32).into_data().into_vec::<f32>().unwrap();
        let exact: Vec<f32> = f16s.iter().map(|it| it.to_f32()).collect();
        assert_eq!(back(in_f16), exact);
        let exact: Vec<f32> = bf16s.iter().map(|it| it.to_f32()).collect();
        assert_eq!(back(in_bf16), exact);
        assert_eq!(cast(x.clone(), DType::F32).into_data(), x.into_data());
    }

    #[test]
    fn what_f16_cannot_hold_becomes_an_infinity_and_a_nan_stays() {
        let data = TensorData::new(vec![65_520.0_f32, -1e9, f32::NAN], [3]);
        let x: Tensor<Cpu, 1> = Tensor::from_data(data, &Default::default());
        let found = cast(x, DType::F16).into_data().into_vec::<f16>().unwrap();
        assert_eq!(found[..2], [f16::INFINITY, f16::NEG_INFINITY]);
        assert!(found[2].is_nan());
    }
}
