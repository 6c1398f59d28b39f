//! Quantization grid of a group: `w_hat = scale * (code - zero)`.

use crate::{Real, Settings};

/// Ranges tried by the scale search, relative to the plain one, which is last.
///
/// Narrower ranges clip outliers in favor of the other weights. A symmetric grid has one code more
/// below zero than above: the search mirrors the grid (its scale is negative, which the format
/// allows) if the largest weight is positive, so that this code is used, and tries 0.65 to 1.025
/// times the scale that represents the largest weight exactly, `max|w| / 2^(b-1)`. Asymmetric
/// ranges go from 0.7 to 1.075.
pub fn scale_factors(settings: &Settings) -> [f64; 32] {
    let codes = f64::from(settings.bits.max_code()) + 1.0;
    let (first, unit) = match settings.sym {
        true => (0.65, (codes - 1.0) / codes),
        false => (0.7, 1.0),
    };
    let mut factors = [1.0; 32];
    for (i, factor) in factors[..31].iter_mut().enumerate() {
        *factor = (first + 0.0125 * i as f64) * unit;
    }
    factors
}

/// Scale and zero point of one group of one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid<T> {
    /// Step between neighbouring codes; negative if the grid is mirrored.
    pub scale: T,
    /// Zero point: the code of 0, an integer.
    pub zero: T,
    /// The largest code.
    pub max_code: T,
}

impl<T: Real> Grid<T> {
    /// Fits the grid for `weights`, a group's `(weight, cost)` pairs: `cost` is the loss of a
    /// squared rounding error of that weight, relative to the other weights of the group.
    ///
    /// Symmetric: `scale = 2 max|w| / (2^b - 1)`, `zero = 2^(b-1)`. Asymmetric: from the minimum to
    /// the maximum, 0 included. A group of zeros gets the grid of ±1. With
    /// [`Settings::scale_search`], the range is then multiplied by the one of [`scale_factors`]
    /// whose grid has the least loss; the plain grid wins ties. The second value is the reduction
    /// of the loss relative to the plain grid.
    pub fn fit(weights: impl Iterator<Item = (T, T)> + Clone, settings: &Settings) -> (Grid<T>, T) {
        let (mut low, mut high) = (T::zero(), T::zero());
        for (w, _) in weights.clone() {
            low = low.min(w);
            high = high.max(w);
        }
        let turned = settings.sym && high > -low;
        if settings.sym {
            high = high.max(-low);
            low = -high;
        }
        if low == high {
            low = -T::one();
            high = T::one();
        }
        let plain = Grid::spanning(low, high, settings);
        if !settings.scale_search {
            return (plain, T::zero());
        }
        let plain_loss = plain.loss(weights.clone());
        let mut best = (plain_loss, plain);
        let [factors @ .., _] = scale_factors(settings).map(T::of);
        for factor in factors {
            let mut grid = Grid::spanning(low * factor, high * factor, settings);
            if turned {
                grid.scale = -grid.scale;
            }
            let loss = grid.loss(weights.clone());
            if loss < best.0 {
                best = (loss, grid);
            }
        }
        (best.1, plain_loss - best.0)
    }

    fn spanning(low: T, high: T, settings: &Settings) -> Grid<T> {
        let max_code = T::of(f64::from(settings.bits.max_code()));
        let mut scale = (high - low) / max_code;
        if settings.f16_scales {
            scale = scale.to_scale();
        }
        let zero = match settings.sym {
            true => T::of(f64::from(settings.bits.symmetric_zero())),
            false => (-low / scale).round_ties_even().min(max_code),
        };
        Grid {
            scale,
            zero,
            max_code,
        }
    }

    /// Returns the loss of rounding `weights` on this grid.
    fn loss(&self, weights: impl Iterator<Item = (T, T)>) -> T {
        weights.fold(T::zero(), |sum, (w, cost)| {
            let error = w - self.round(w).1;
            sum + cost * error * error
        })
    }

    /// Returns the code nearest to `w` (ties to even before the zero point is added) and its value.
    pub fn round(&self, w: T) -> (T, T) {
        let code = ((w / self.scale).round_ties_even() + self.zero)
            .max(T::zero())
            .min(self.max_code);
        (code, self.scale * (code - self.zero))
    }
}

#[cfg(test)]
mod tests {
    use gptq_format::{Bits, GroupSize};

    use super::*;

    fn settings(sym: bool) -> Settings {
        Settings {
            bits: Bits::Four,
            group_size: GroupSize::Row,
            sym,
            static_groups: false,
            scale_search: false,
            f16_scales: true,
            refine: 0,
        }
    }

    #[test]
    fn the_largest_weight_of_a_symmetric_group_is_a_tie_and_rounds_to_even() {
        let weights = [0.75f64, -0.3, 0.1];
        let (grid, _) = Grid::fit(
            weights.map(|w| (w, 1.0)).into_iter(),
            &Settings {
                f16_scales: false,
                ..settings(true)
            },
        );
        assert_eq!(grid.scale, 1.5 / 15.0);
        assert_eq!(grid.round(0.75).0, 15.0); // 7.5 rounds to 8, +8 = 16, clamped
        assert_eq!(grid.round(-0.75).0, 0.0); // -7.5 rounds to -8
        assert_eq!(grid.round(0.25).0, 10.0); // 2.5 rounds to 2
    }

    #[test]
    fn an_asymmetric_grid_includes_zero() {
        let (grid, _) = Grid::fit([(0.5f64, 1.0), (1.5, 1.0)].into_iter(), &settings(false));
        assert_eq!(grid.zero, 0.0);
        assert_eq!(grid.round(0.0), (0.0, 0.0));
        let (grid, _) = Grid::fit([(-1.0f64, 1.0), (0.5, 1.0)].into_iter(), &settings(false));
        assert_eq!(grid.zero, 10.0);
    }

    #[test]
    fn a_searched_grid_never_costs_more_than_the_plain_one() {
        for seed in 0..50u32 {
            let weights = (0..32u32).map(|i| {
                let x = f64::from(i.wrapping_mul(2654435761).wrapping_add(seed * 97) % 1000)
                    / 500.0
                    - 1.0;
                (x * x * x, 1.0 + f64::from(i))
            });
            for sym in [true, false] {
                let searched = Settings {
                    scale_search: true,
                    ..settings(sym)
                };
                let (plain, nothing) = Grid::fit(weights.clone(), &settings(sym));
                let (found, gained) = Grid::fit(weights.clone(), &searched);
                let [plain, found] = [plain, found].map(|grid| grid.loss(weights.clone()));
                assert!(found <= plain, "{found} over {plain}");
                assert_eq!((nothing, gained), (0.0, plain - found));
            }
        }
    }

    #[test]
    fn a_searched_symmetric_grid_is_turned_towards_its_largest_weight() {
        for sign in [1.0f64, -1.0] {
            // Only a code of ±8 steps of 1/8 represents all three.
            let weights = [1.0, -0.875, 0.125].map(|w| (sign * w, 1.0));
            let searched = Settings {
                scale_search: true,
                ..settings(true)
            };
            let (grid, _) = Grid::fit(weights.into_iter(), &searched);
            assert_eq!(grid.scale, -sign / 8.0);
            assert_eq!(
                weights.map(|(w, _)| grid.round(w)).map(|(code, _)| code),
                [0.0, 15.0, 7.0]
            );
            assert_eq!(grid.loss(weights.into_iter()), 0.0);
        }
    }

    #[test]
    fn zeros_and_vanishing_weights_keep_a_positive_scale() {
        for weights in [[0.0f64; 2], [1e-30, -1e-30]] {
            let (grid, _) = Grid::fit(weights.map(|w| (w, 1.0)).into_iter(), &settings(true));
            assert!(grid.scale > 0.0);
            assert_eq!(grid.round(weights[0]).1, 0.0);
        }
    }
}
