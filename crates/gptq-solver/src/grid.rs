//! A group's quantisation grid: `w_hat = scale * (code - zero)`.

use crate::{Real, Settings};

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
    /// The grid that just spans `weights`.
    ///
    /// Symmetric: `scale = 2 max|w| / (2^b - 1)`, `zero = 2^(b-1)`. Asymmetric: from the minimum to
    /// the maximum, 0 included. A group of zeros gets the grid of ±1.
    pub fn fit(weights: impl Iterator<Item = T>, settings: &Settings) -> Grid<T> {
        let (mut low, mut high) = (T::zero(), T::zero());
        for w in weights {
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
            f16_scales: true,
        }
    }

    #[test]
    fn the_largest_weight_of_a_symmetric_group_is_a_tie_and_rounds_to_even() {
        let weights = [0.75f64, -0.3, 0.1];
        let grid = Grid::fit(weights.into_iter(), &Settings { f16_scales: false, ..settings(true) });
        assert_eq!(grid.scale, 1.5 / 15.0);
        assert_eq!(grid.round(0.75).0, 15.0); // 7.5 rounds to 8, +8 = 16, clamped
        assert_eq!(grid.round(-0.75).0, 0.0); // -7.5 rounds to -8
        assert_eq!(grid.round(0.25).0, 10.0); // 2.5 rounds to 2
    }

    #[test]
    fn an_asymmetric_grid_includes_zero() {
        let grid = Grid::fit([0.5f64, 1.5].into_iter(), &settings(false));
        assert_eq!(grid.zero, 0.0);
        assert_eq!(grid.round(0.0), (0.0, 0.0));
        let grid = Grid::fit([-1.0f64, 0.5].into_iter(), &settings(false));
        assert_eq!(grid.zero, 10.0);
    }

    #[test]
    fn zeros_and_vanishing_weights_keep_a_positive_scale() {
        for weights in [[0.0f64; 2], [1e-30, -1e-30]] {
            let grid = Grid::fit(weights.into_iter(), &settings(true));
            assert!(grid.scale > 0.0);
            assert_eq!(grid.round(weights[0]).1, 0.0);
        }
    }
}
