//! A group's quantisation grid: `w_hat = scale * (code - zero)`.

use crate::{Real, Settings};

/// Ranges tried by the search, relative to the one that just spans the group: narrower ones clip
/// outliers for the sake of the rest; wider ones put the largest weight on a code instead of half a
/// step past the last.
pub const SCALE_FACTORS: [f64; 32] = {
    let mut factors = [0.0; 32];
    let mut i = 0;
    while i < 32 {
        factors[i] = 0.7 + 0.0125 * i as f64; // 0.7 to 1.0875
        i += 1;
    }
    factors
};

/// Scale and zero point of one group of one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid<T> {
    /// Step between neighbouring codes; positive.
    pub scale: T,
    /// The code of 0, an integer.
    pub zero: T,
    /// The largest code.
    pub max_code: T,
}

impl<T: Real> Grid<T> {
    /// The grid for `weights`, a group's `(weight, cost)` pairs: `cost` is what a squared rounding
    /// error of that weight costs, relative to the group's others.
    ///
    /// Symmetric: `scale = 2 max|w| / (2^b - 1)`, `zero = 2^(b-1)`. Asymmetric: from the minimum to
    /// the maximum, 0 included. A group of zeros gets the grid of ±1. With
    /// [`Settings::scale_search`], the range is then multiplied by the one of [`SCALE_FACTORS`] whose
    /// grid loses least.
    pub fn fit(weights: impl Iterator<Item = (T, T)> + Clone, settings: &Settings) -> Grid<T> {
        let (mut low, mut high) = (T::zero(), T::zero());
        for (w, _) in weights.clone() {
            low = low.min(w);
            high = high.max(w);
        }
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
            return plain;
        }
        let mut best = (plain.loss(weights.clone()), plain);
        for factor in SCALE_FACTORS.map(T::of) {
            let grid = Grid::spanning(low * factor, high * factor, settings);
            let loss = grid.loss(weights.clone());
            if loss < best.0 {
                best = (loss, grid);
            }
        }
        best.1
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

    /// What rounding `weights` on this grid costs.
    fn loss(&self, weights: impl Iterator<Item = (T, T)>) -> T {
        weights.fold(T::zero(), |sum, (w, cost)| {
            let error = w - self.round(w).1;
            sum + cost * error * error
        })
    }

    /// The code nearest to `w`, ties to even before the zero point is added, and what it stands for.
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
        let grid = Grid::fit(
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
        let grid = Grid::fit([(0.5f64, 1.0), (1.5, 1.0)].into_iter(), &settings(false));
        assert_eq!(grid.zero, 0.0);
        assert_eq!(grid.round(0.0), (0.0, 0.0));
        let grid = Grid::fit([(-1.0f64, 1.0), (0.5, 1.0)].into_iter(), &settings(false));
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
                let plain = Grid::fit(weights.clone(), &settings(sym)).loss(weights.clone());
                let found = Grid::fit(weights.clone(), &searched).loss(weights.clone());
                assert!(found <= plain, "{found} over {plain}");
            }
        }
    }

    #[test]
    fn zeros_and_vanishing_weights_keep_a_positive_scale() {
        for weights in [[0.0f64; 2], [1e-30, -1e-30]] {
            let grid = Grid::fit(weights.map(|w| (w, 1.0)).into_iter(), &settings(true));
            assert!(grid.scale > 0.0);
            assert_eq!(grid.round(weights[0]).1, 0.0);
        }
    }
}
