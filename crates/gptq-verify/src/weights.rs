//! Compares a branch's weights with the dense model's, group by group, to find wrong scales.
//!
//! The gain of a group is `⟨ŵ, w⟩ / ⟨w, w⟩`, `w` the dense weights of one output in the group and
//! `ŵ` the branch's. Rounding and error compensation leave it near 1, unless the group's weights
//! are among the smallest of their linear layer; a scale that is twice too large doubles it.

use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_kernels::Engine;

/// Groups with outlying gains in one linear layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Strange {
    pub module: String,
    pub groups: usize,
    /// The group with the largest deviation.
    pub group: usize,
    pub output: usize,
    pub gain: f64,
    /// Median gain of the linear layer.
    pub usual: f64,
}

/// Returns sums over each output's groups of `columns` inputs, `[out, groups]`: `⟨ŵ, w⟩` and `⟨w,
/// w⟩`. `g_idx` holds the group of each input; the last group may be smaller.
pub(crate) fn sums<B: Engine>(
    dense: Tensor<B, 2>,
    found: Tensor<B, 2>,
    g_idx: &[i32],
    columns: usize,
) -> [Vec<f32>; 2] {
    let [n_out, n_in] = dense.dims();
    let columns = columns.clamp(1, n_in.max(1));
    let device = dense.device();
    let mut order: Vec<(i32, i32)> = (0..).zip(g_idx).map(|(at, &g)| (g, at)).collect();
    let in_order = order.is_sorted();
    order.sort_unstable();
    let order: Vec<i32> = order.into_iter().map(|(_, at)| at).collect();
    let order = TensorData::new(order, [g_idx.len()]);
    let order = Tensor::<B, 1, Int>::from_data(order, (&device, DType::I32));
    let (dense, found) = (dense.cast(DType::F32), found.cast(DType::F32));
    [dense.clone() * found, dense.clone() * dense].map(|products| {
        let products = match in_order {
            true => products,
            false => products.select(1, order.clone()),
        };
        let whole = n_in / columns * columns;
        let pieces = [(0..whole, columns), (whole..n_in, n_in - whole)];
        let pieces = pieces.into_iter().filter(|(range, _)| !range.is_empty());
        let sums = pieces.map(|(range, columns)| {
            let groups = range.len() / columns;
            let piece = products.clone().slice([0..n_out, range]);
            let sums = piece.reshape([n_out, groups, columns]).sum_dim(2);
            sums.reshape([n_out, groups])
        });
        let sums = Tensor::cat(sums.collect(), 1);
        sums.into_data().iter().collect()
    })
}

/// A gain is an outlier if it is at least this many standard deviations, and at least this far,
/// from its layer's median. In sound 4-bit branches in groups of 64 no gain is further off than
/// 0.08 in medi-tiny, and 0.29 in SmolLM2-135M with the presets that search scales.
const DEVIATIONS: f64 = 10.0;
const FAR: f64 = 0.4;
/// Up to two groups of a linear layer, or one in this many, may have any gain: in SmolLM2-135M,
/// with `autogptq` or at 2 bits, up to ten of 13 824 are up to three times as long as their weights
/// or point the other way, all of them of one output. A damaged file shows in whole rows or columns
/// of groups.
const FEW: usize = 1000;
/// Groups with less than this fraction of their layer's mean energy are ignored: compensation of
/// errors elsewhere may change them by more than their own norm.
const LEAST: f64 = 0.2;

/// Returns the outlying groups of `module`, given `sums` from [`sums`].
pub(crate) fn strange(
    module: String,
    [dots, squares]: [Vec<f32>; 2],
    groups: usize,
) -> Option<Strange> {
    let energy: f64 = squares.iter().map(|&s| f64::from(s)).sum();
    let least = LEAST * energy / squares.len() as f64;
    let gains = dots.iter().zip(&squares).enumerate();
    let gains: Vec<(usize, f64)> = gains
        .map(|(at, (&dot, &square))| (at, f64::from(dot), f64::from(square)))
        .filter(|&(_, _, square)| square > 0.0 && square >= least)
        .map(|(at, dot, square)| (at, dot / square))
        .collect();
    let usual = median(gains.iter().map(|&(_, gain)| gain).collect())?;
    // Weights in another basis than the dense ones cannot be compared with them.
    if !(0.5..=2.0).contains(&usual) {
        return None;
    }
    let deviation = median(
        (gains.iter())
            .map(|(_, gain)| (gain - usual).abs())
            .collect(),
    )?;
    // The median deviation of a normal distribution is 0.6745 standard deviations.
    let most = FAR.max(DEVIATIONS * deviation / 0.6745);
    let few = (gains.len() / FEW).max(2);
    let out = gains
        .into_iter()
        .filter(|(_, gain)| (gain - usual).abs() > most);
    let out: Vec<(usize, f64)> = out.collect();
    let distance = |gain: f64| (gain - usual).abs();
    let &(at, gain) = (out.iter()).max_by(|a, b| distance(a.1).total_cmp(&distance(b.1)))?;
    if out.len() <= few {
        return None;
    }
    Some(Strange {
        module,
        groups: out.len(),
        group: at % groups.max(1),
        output: at / groups.max(1),
        gain,
        usual,
    })
}

/// Returns the median; `None` for no values.
fn median(mut values: Vec<f64>) -> Option<f64> {
    let middle = values.len() / 2;
    if values.is_empty() {
        return None;
    }
    let (_, middle, _) = values.select_nth_unstable_by(middle, f64::total_cmp);
    Some(*middle)
}

#[cfg(test)]
mod tests {
    use gptq_kernels::Cpu;

    use super::*;

    fn tensor(values: Vec<f32>, shape: [usize; 2]) -> Tensor<Cpu, 2> {
        Tensor::from_data(
            TensorData::new(values, shape),
            (&Default::default(), DType::F32),
        )
    }

    #[test]
    fn sums_go_by_the_group_that_g_idx_gives_a_column() {
        let w = tensor(vec![1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 2.0, 1.0], [2, 4]);
        let found = tensor(vec![1.0, 2.0, 3.0, 8.0, 1.0, 5.0, 2.0, 1.0], [2, 4]);
        let [dots, squares] = sums(w.clone(), found.clone(), &[0, 1, 0, 1], 2);
        assert_eq!(dots, [10.0, 36.0, 3.0, 1.0]);
        assert_eq!(squares, [10.0, 20.0, 5.0, 1.0]);
        // Three columns and one, in order.
        let [dots, squares] = sums(w, found, &[0, 0, 0, 1], 3);
        assert_eq!(dots, [14.0, 32.0, 3.0, 1.0]);
        assert_eq!(squares, [14.0, 16.0, 5.0, 1.0]);
    }

    /// Gains of 20 outputs with 3 groups each, of unit length, near 0.95.
    fn gains(change: impl Fn(usize, f32) -> f32) -> Option<Strange> {
        let dots = (0..60).map(|i| change(i, 0.95 + 0.01 * ((i * 7 % 11) as f32 - 5.0) / 5.0));
        strange("m".into(), [dots.collect(), vec![1.0; 60]], 3)
    }

    #[test]
    fn scales_that_are_twice_too_large_or_too_small_are_named() {
        assert_eq!(gains(|_, gain| gain), None);
        let single = |factor: f32| gains(|i, gain| if i == 31 { factor * gain } else { gain });
        // A sound branch may have one such group, from compensation of errors elsewhere.
        assert_eq!([single(2.0), single(0.5)], [None, None]);
        for factor in [2.0, 0.5] {
            let group = gains(|i, gain| if i % 3 == 2 { factor * gain } else { gain }).unwrap();
            assert_eq!((group.groups, group.group), (20, 2));
        }
        // A common factor is not an outlier: the block's error shows it.
        assert_eq!(gains(|_, gain| 1.5 * gain), None);
        // Weights in another basis.
        assert_eq!(gains(|i, _| if i == 31 { 1.0 } else { 0.0 }), None);
    }

    #[test]
    fn the_smallest_groups_may_have_any_gain() {
        let mut squares = vec![1.0; 60];
        squares[31] = 0.01;
        squares[32] = 0.0;
        let mut dots = vec![0.95; 60];
        dots[31] = 0.1;
        dots[32] = 0.1;
        assert_eq!(strange("m".into(), [dots, squares], 3), None);
        assert_eq!(strange("m".into(), [vec![], vec![]], 3), None);
    }
}
