//! Two models on the same questions.
//!
//! Only questions that one model answers rightly and the other does not tell them apart. If both are as good, each of these
//! falls to either with probability 1/2: McNemar's test, exact, is how likely a split at least as uneven is,
//! `p = min(1, 2 Σ_{k <= min(b, c)} C(b + c, k) / 2^(b + c))`.

use serde::{Deserialize, Serialize};

/// Answers of two models to the same questions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Questions that the first model answers rightly and the second does not.
    pub lost: usize,
    /// Questions that the second answers rightly and the first does not.
    pub won: usize,
    /// McNemar's p: how likely so uneven a split is between models that are equally good.
    pub p: f64,
}

impl Paired {
    /// Compares which answers of each are right, in the order of the questions.
    pub fn of(first: &[bool], second: &[bool]) -> Self {
        let count = |of: (bool, bool)| {
            let both = first.iter().copied().zip(second.iter().copied());
            both.filter(|it| *it == of).count()
        };
        let (lost, won) = (count((true, false)), count((false, true)));
        Paired {
            lost,
            won,
            p: mcnemar(lost, won),
        }
    }
}

fn mcnemar(b: usize, c: usize) -> f64 {
    let n = (b + c) as f64;
    // ln C(n, k) - n ln 2, from one k to the next: n may be in the thousands.
    let mut log = -n * std::f64::consts::LN_2;
    let mut sum = 0.0;
    for k in 0..=b.min(c) {
        sum += log.exp();
        let k = k as f64;
        log += ((n - k) / (k + 1.0)).ln();
    }
    (2.0 * sum).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_p_of_a_split_is_that_of_a_fair_coin() {
        // 2 (1 + 10 + 45) / 1024, and others by Python's comb.
        for (b, c, p) in [
            (8, 2, 0.109375),
            (2, 8, 0.109375),
            (0, 5, 0.0625),
            (3, 3, 1.0),
            (0, 0, 1.0),
            (40, 70, 0.005_447_429_5),
        ] {
            assert!(
                (mcnemar(b, c) - p).abs() < 1e-8,
                "{b} {c}: {}",
                mcnemar(b, c)
            );
        }
        assert!(mcnemar(5000, 5600) < 1e-6);
    }

    #[test]
    fn flips_are_counted_either_way() {
        let first = [true, true, false, false, true];
        let second = [true, false, true, false, false];
        let found = Paired::of(&first, &second);
        assert_eq!((found.lost, found.won), (2, 1));
        assert_eq!(found.p, 1.0);
    }
}
