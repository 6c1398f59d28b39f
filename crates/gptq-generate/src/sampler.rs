//! Choice of a token from logits.
//!
//! Applied in Transformers' order: repetition penalty, temperature, top-k, top-p, then a draw from
//! the `softmax` of what is left. Logits are f32, probabilities f64.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::GenerateError;

/// Method of choosing the next token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TokenChoice {
    /// The most likely token; of equals, the one with the lowest id.
    Greedy,
    /// A seeded draw.
    Sample {
        /// Divisor of the logits; positive.
        temperature: f32,
        /// Number of most likely tokens to keep; 0 for all.
        top_k: usize,
        /// Keep the most likely tokens that together reach this probability; in (0, 1].
        top_p: f32,
        /// Seed of the draw.
        seed: u64,
    },
}

/// Chooses tokens; the same seed and logits give the same tokens.
#[derive(Clone, Debug)]
pub struct Sampler {
    choice: TokenChoice,
    repetition_penalty: f32,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// Errors if a setting is out of range.
    pub fn new(choice: TokenChoice, repetition_penalty: f32) -> Result<Self, GenerateError> {
        let need = |ok: bool, name, value, valid| match ok {
            true => Ok(()),
            false => Err(GenerateError::Setting { name, value, valid }),
        };
        let positive = |x: f32| x.is_finite() && x > 0.0;
        need(
            positive(repetition_penalty),
            "repetition_penalty",
            repetition_penalty,
            "a positive number; 1 for none",
        )?;
        let mut seed_of = 0;
        if let TokenChoice::Sample {
            temperature,
            top_p,
            seed,
            ..
        } = choice
        {
            need(
                positive(temperature),
                "temperature",
                temperature,
                "a positive number; use greedy to choose the most likely token each time",
            )?;
            let fraction = top_p > 0.0 && top_p <= 1.0;
            need(fraction, "top_p", top_p, "above 0 and at most 1")?;
            seed_of = seed;
        }
        Ok(Sampler {
            choice,
            repetition_penalty,
            rng: ChaCha8Rng::seed_from_u64(seed_of),
        })
    }

    /// Returns the token that follows `context`, given its `logits` `[vocabulary]`, all finite.
    pub fn next(&mut self, mut logits: Vec<f32>, context: &[u32]) -> u32 {
        self.penalise(&mut logits, context);
        match self.choice {
            TokenChoice::Greedy => most_likely(&logits),
            TokenChoice::Sample {
                temperature,
                top_k,
                top_p,
                ..
            } => {
                let kept = distribution(&logits, temperature, top_k, top_p);
                // 53 random bits: a fraction below 1 that f64 holds exactly.
                let draw = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
                pick(&kept, draw)
            }
        }
    }

    /// Makes tokens of the context less likely: divides a positive logit by the penalty, multiplies
    /// a negative one.
    fn penalise(&self, logits: &mut [f32], context: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut seen = context.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for token in seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = match *logit < 0.0 {
                    true => *logit * self.repetition_penalty,
                    false => *logit / self.repetition_penalty,
                };
            }
        }
    }
}

fn most_likely(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (1..logits.len()).fold(0, better) as u32
}

/// Returns the tokens to draw from, the most likely first, with probabilities that sum to 1.
fn distribution(logits: &[f32], temperature: f32, top_k: usize, top_p: f32) -> Vec<(u32, f64)> {
    let mut tokens: Vec<(u32, f32)> = (0..).zip(logits.iter().map(|l| l / temperature)).collect();
    let descending = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if (1..tokens.len()).contains(&top_k) {
        let kth = tokens.select_nth_unstable_by(top_k - 1, descending).1.1;
        // Tokens equal to the last one kept stay too, as in Transformers.
        tokens.retain(|&(_, logit)| logit >= kth);
    }
    tokens.sort_unstable_by(descending);
    let largest = tokens[0].1;
    let mut kept: Vec<(u32, f64)> = tokens
        .into_iter()
        .map(|(token, logit)| (token, f64::from(logit - largest).exp()))
        .collect();
    normalise(&mut kept);
    if top_p < 1.0 {
        // The token that makes the sum reach top_p is the last one kept.
        let mut sum = 0.0;
        let reached = kept.iter().position(|(_, p)| {
            sum += p;
            sum >= f64::from(top_p)
        });
        kept.truncate(reached.map_or(kept.len(), |last| last + 1));
        normalise(&mut kept);
    }
    kept
}

fn normalise(tokens: &mut [(u32, f64)]) {
    let total: f64 = tokens.iter().map(|(_, p)| p).sum();
    tokens.iter_mut().for_each(|(_, p)| *p /= total);
}

/// Returns the token whose share of the unit interval holds `draw`, in [0, 1).
fn pick(tokens: &[(u32, f64)], draw: f64) -> u32 {
    let mut sum = 0.0;
    let hit = tokens.iter().find(|(_, p)| {
        sum += p;
        draw < sum
    });
    // A sum that rounds to just below 1 selects the last token.
    hit.unwrap_or(&tokens[tokens.len() - 1]).0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits whose softmax is 0.5, 0.25, 0.125, 0.125 for tokens 2, 0, 3, 1.
    fn halves() -> Vec<f32> {
        [0.25f32, 0.125, 0.5, 0.125].map(f32::ln).to_vec()
    }

    fn close(found: Vec<(u32, f64)>, expected: &[(u32, f64)]) {
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (a, b) in found.iter().zip(expected) {
            // The logits are f32, so their exponentials agree to a few ulps of f32.
            assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-6, "{found:?}");
        }
    }

    #[test]
    fn plain_sampling_draws_from_the_softmax() {
        let all = [(2, 0.5), (0, 0.25), (1, 0.125), (3, 0.125)];
        close(distribution(&halves(), 1.0, 0, 1.0), &all);
    }

    #[test]
    fn temperature_raises_probabilities_to_a_power() {
        // At temperature 1/2 they are squared: 16 : 4 : 1 : 1 over 22.
        let squared = [(2, 16.0), (0, 4.0), (1, 1.0), (3, 1.0)].map(|(t, p)| (t, p / 22.0));
        close(distribution(&halves(), 0.5, 0, 1.0), &squared);
    }

    #[test]
    fn top_k_keeps_the_k_most_likely_and_ties_with_the_last() {
        let two = [(2, 2.0 / 3.0), (0, 1.0 / 3.0)];
        close(distribution(&halves(), 1.0, 2, 1.0), &two);
        assert_eq!(distribution(&halves(), 1.0, 3, 1.0).len(), 4);
        assert_eq!(distribution(&halves(), 1.0, 99, 1.0).len(), 4);
    }

    #[test]
    fn top_p_keeps_the_fewest_that_reach_it() {
        let two = [(2, 2.0 / 3.0), (0, 1.0 / 3.0)];
        close(distribution(&halves(), 1.0, 0, 0.6), &two);
        close(distribution(&halves(), 1.0, 0, 0.1), &[(2, 1.0)]);
        assert_eq!(distribution(&halves(), 1.0, 0, 0.8).len(), 3);
    }

    #[test]
    fn top_p_counts_what_temperature_and_top_k_left() {
        // Squared and cut to two: 0.8 and 0.2, of which 0.75 needs only the first.
        close(distribution(&halves(), 0.5, 2, 0.75), &[(2, 1.0)]);
        assert_eq!(distribution(&halves(), 0.5, 2, 0.85).len(), 2);
    }

    #[test]
    fn the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() {
        let sampler = Sampler::new(TokenChoice::Greedy, 2.0).unwrap();
        let mut logits = vec![4.0, -3.0, 1.0, -1.0];
        sampler.penalise(&mut logits, &[0, 1, 1, 99]);
        assert_eq!(logits, [2.0, -6.0, 1.0, -1.0]);
        assert_eq!(sampler.clone().next(vec![1.5, 1.0], &[0]), 1);
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(TokenChoice::Greedy, 1.0).unwrap();
        assert_eq!(sampler.next(vec![0.0, 3.0, 3.0, -1.0], &[]), 1);
    }

    #[test]
    fn draws_follow_the_distribution_and_the_seed() {
        let draw = |seed| {
            let choice = TokenChoice::Sample {
                temperature: 1.0,
                top_k: 0,
                top_p: 1.0,
                seed,
            };
            let mut sampler = Sampler::new(choice, 1.0).unwrap();
            let next = move |_| sampler.next(halves(), &[]);
            (0..4000).map(next).collect::<Vec<u32>>()
        };
        let tokens = draw(7);
        assert_eq!(tokens, draw(7));
        assert_ne!(tokens, draw(8));
        let share = |t| tokens.iter().filter(|&&x| x == t).count() as f64 / 4000.0;
        // Four standard deviations of a share: 4 sqrt(p (1 - p) / 4000) <= 0.032.
        for (token, p) in [(2, 0.5), (0, 0.25), (1, 0.125), (3, 0.125)] {
            assert!(
                (share(token) - p).abs() < 0.032,
                "{token}: {}",
                share(token)
            );
        }
        let probabilities = [(5, 0.25), (6, 0.75)];
        assert_eq!(
            [0.0, 0.2499, 0.25, 0.9999].map(|d| pick(&probabilities, d)),
            [5, 5, 6, 6]
        );
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let sample = |temperature, top_p| TokenChoice::Sample {
            temperature,
            top_k: 0,
            top_p,
            seed: 0,
        };
        for (choice, penalty, word) in [
            (sample(0.0, 0.9), 1.0, "temperature"),
            (sample(f32::NAN, 0.9), 1.0, "temperature"),
            (sample(1.0, 0.0), 1.0, "top_p"),
            (sample(1.0, 1.5), 1.0, "top_p"),
            (TokenChoice::Greedy, 0.0, "repetition_penalty"),
        ] {
            let error = Sampler::new(choice, penalty).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
