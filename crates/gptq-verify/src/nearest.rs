//! Round-to-nearest quantization of dense weights with a branch's settings: the baseline, without
//! any method, that a branch is compared with.
//!
//! Symmetric: `scale = 2 max|w| / (2^b - 1)`, the zero point in the middle. Asymmetric: from the
//! minimum to the maximum, 0 included. Scales are rounded to f16, as they are stored.

use burn::tensor::{DType, Tensor};
use gptq_format::{Bits, GroupSize};
use gptq_kernels::Engine;

/// Quantization settings of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub bits: Bits,
    pub group_size: GroupSize,
    pub sym: bool,
}

/// Rounds `w [out, in]` to nearest, in its own dtype.
pub(crate) fn nearest<B: Engine>(w: Tensor<B, 2>, setting: Setting) -> Tensor<B, 2> {
    let [n_out, n_in] = w.dims();
    let columns = setting.group_size.columns(n_in).clamp(1, n_in.max(1));
    let dtype = w.dtype();
    let w = w.cast(DType::F32);
    let whole = n_in / columns * columns;
    let pieces = [(0..whole, columns), (whole..n_in, n_in - whole)];
    let rounded = pieces.into_iter().filter(|(range, _)| !range.is_empty());
    let rounded = rounded.map(|(range, columns)| {
        let width = range.len();
        let piece = w.clone().slice([0..n_out, range]);
        let groups = piece.reshape([n_out, width / columns, columns]);
        round(groups, setting).reshape([n_out, width])
    });
    Tensor::cat(rounded.collect(), 1).cast(dtype)
}

/// Rounds with groups along the last dimension.
fn round<B: Engine>(w: Tensor<B, 3>, setting: Setting) -> Tensor<B, 3> {
    let max_code = f64::from(setting.bits.max_code());
    let (low, high) = match setting.sym {
        true => {
            let high = w.clone().abs().max_dim(2);
            (high.clone().neg(), high)
        }
        false => (
            w.clone().min_dim(2).clamp_max(0.0),
            w.clone().max_dim(2).clamp_min(0.0),
        ),
    };
    let scale = ((high - low.clone()) / max_code)
        .cast(DType::F16)
        .cast(DType::F32);
    // Any scale represents a group of zeros, or of values that f16 rounds to zero.
    let nothing = scale.clone().equal_elem(0.0);
    let scale = scale.mask_fill(nothing, 1.0);
    let zero = match setting.sym {
        true => low.zeros_like() + f64::from(setting.bits.symmetric_zero()),
        false => (low.neg() / scale.clone()).round().clamp(0.0, max_code),
    };
    let codes = ((w / scale.clone()).round() + zero.clone()).clamp(0.0, max_code);
    (codes - zero) * scale
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;
    use gptq_kernels::Cpu;

    use super::*;

    fn rounded(values: &[f32], columns: i64, sym: bool) -> Vec<f32> {
        let data = TensorData::new(values.to_vec(), [1, values.len()]);
        let w = Tensor::<Cpu, 2>::from_data(data, (&Default::default(), DType::F32));
        let setting = Setting {
            bits: Bits::Four,
            group_size: match columns {
                -1 => GroupSize::Row,
                n => GroupSize::Columns(n as usize),
            },
            sym,
        };
        nearest(w, setting).into_data().iter().collect()
    }

    #[test]
    fn a_groups_largest_weight_sets_its_scale_and_a_short_last_group_has_its_own() {
        // Scale 2 * 7.5 / 15 = 1, codes -8 to 7; then 2 * 0.75 / 15 = 0.1, as f16 has it.
        let found = rounded(&[7.5, -7.5, 1.2, 0.4, 0.75, 0.32], 4, true);
        assert_eq!(found[..4], [7.0, -8.0, 1.0, 0.0]);
        let step = half(0.1);
        assert_eq!(found[4..], [7.0 * step, 3.0 * step]);
    }

    #[test]
    fn an_asymmetric_grid_goes_from_the_least_to_the_largest_and_zeros_stay() {
        // From -5 to 10: step 1, zero point 5.
        assert_eq!(
            rounded(&[-5.0, 10.0, 3.4, 0.0], -1, false),
            [-5.0, 10.0, 3.0, 0.0]
        );
        for sym in [true, false] {
            assert_eq!(rounded(&[0.0; 4], 2, sym), [0.0; 4]);
        }
    }

    fn half(value: f32) -> f32 {
        let one = Tensor::<Cpu, 1>::from_data([value], (&Default::default(), DType::F32));
        let there = one.cast(DType::F16).cast(DType::F32).into_data();
        there.iter::<f32>().next().unwrap()
    }
}
