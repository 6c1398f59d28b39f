//! Choice of experts for each token, and the order in which experts take their tokens.
//!
//! A *slot* is an expert of a token: slot `j` of token `t` is number `t top_k + j`.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use rayon::prelude::*;

/// The rule by which a router's logits become a choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoutingOptions {
    /// Experts that a token is given to.
    pub top_k: usize,
    /// True for scores `1 / (1 + exp(-logit))`, false for their softmax.
    pub sigmoid: bool,
    /// True if the weights of a token's experts are divided by their sum.
    pub renormalize: bool,
    /// Factor of the weights.
    pub scale: f64,
}

/// A choice of experts for some tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Routed {
    top_k: usize,
    /// Expert by slot.
    experts: Vec<u32>,
    /// Weight by slot.
    weights: Vec<f32>,
    slots: Slots,
}

/// The slots of each expert, ascending, one expert after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    /// Slot numbers.
    pub order: Vec<u32>,
    /// The first of each expert's slots; in the end their number.
    pub starts: Vec<usize>,
}

/// Keeps a sum of weights from being zero, as in Transformers.
pub(crate) const LEAST: f32 = 1e-20;

impl Routed {
    /// Chooses from `logits`, one row of `experts` for each token, the `top_k` of the best scores, of which
    /// `correction` is a summand for the choice alone; of equal ones the first.
    ///
    /// # Panics
    /// There are fewer experts than a token is to have.
    pub fn of(
        logits: &[f32],
        experts: usize,
        correction: Option<&[f32]>,
        how: RoutingOptions,
    ) -> Routed {
        assert!((1..=experts).contains(&how.top_k), "no more than there are");
        let tokens = logits.len() / experts;
        let mut chosen = vec![0; tokens * how.top_k];
        let mut weights = vec![0.0; tokens * how.top_k];
        let rows = logits.par_chunks_exact(experts);
        let rows = rows.zip(chosen.par_chunks_exact_mut(how.top_k));
        let rows = rows.zip(weights.par_chunks_exact_mut(how.top_k));
        rows.with_min_len(64)
            .for_each(|((logits, chosen), weights)| {
                choose(logits, correction, how, chosen, weights)
            });
        Routed::new(how.top_k, chosen, weights, experts)
    }

    /// A choice of the expert, of `count`, and the weight of each slot.
    pub(crate) fn new(top_k: usize, experts: Vec<u32>, weights: Vec<f32>, count: usize) -> Routed {
        Routed {
            top_k,
            slots: Slots::new(&experts, count),
            experts,
            weights,
        }
    }

    /// Returns the number of tokens.
    pub fn tokens(&self) -> usize {
        self.experts.len() / self.top_k
    }

    /// Returns the number of experts of a token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Returns the expert of each slot.
    pub fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// Returns the weight of each slot.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Returns the slots by the expert that they belong to.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }
}

impl Slots {
    /// Sorts the slots whose experts, of `count`, are given.
    fn new(experts: &[u32], count: usize) -> Slots {
        let mut starts = vec![0; count + 1];
        for &expert in experts {
            starts[expert as usize + 1] += 1;
        }
        for expert in 0..count {
            starts[expert + 1] += starts[expert];
        }
        let mut next = starts.clone();
        let mut order = vec![0; experts.len()];
        for (slot, &expert) in experts.iter().enumerate() {
            let place = &mut next[expert as usize];
            order[*place] = slot as u32;
            *place += 1;
        }
        Slots { order, starts }
    }

    /// Returns the slots of an expert.
    pub fn of(&self, expert: usize) -> &[u32] {
        &self.order[self.starts[expert]..self.starts[expert + 1]]
    }

    /// Returns for each slot its place in the order.
    pub fn places(&self) -> Vec<u32> {
        let mut places = vec![0; self.order.len()];
        for (place, &slot) in self.order.iter().enumerate() {
            places[slot as usize] = place as u32;
        }
        places
    }
}

/// Chooses for one token.
fn choose(
    logits: &[f32],
    correction: Option<&[f32]>,
    how: RoutingOptions,
    chosen: &mut [u32],
    weights: &mut [f32],
) {
    let scores: Vec<f32> = match how.sigmoid {
        true => logits.iter().map(|&it| 1.0 / (1.0 + (-it).exp())).collect(),
        false => {
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let parts: Vec<f32> = logits.iter().map(|&it| (it - largest).exp()).collect();
            let sum: f32 = parts.iter().sum();
            parts.iter().map(|&it| it / sum).collect()
        }
    };
    let mut ranks = scores.clone();
    if let Some(correction) = correction {
        ranks
            .iter_mut()
            .zip(correction)
            .for_each(|(rank, it)| *rank += it);
    }
    for (chosen, weight) in chosen.iter_mut().zip(weights.iter_mut()) {
        let mut best = None;
        for (at, rank) in ranks.iter().enumerate() {
            // Of what is not a number nothing is greater, and nothing less.
            if best.is_none_or(|best: usize| *rank > ranks[best]) && *rank > f32::NEG_INFINITY {
                best = Some(at);
            }
        }
        // Without a number left to compare, the first that are not taken.
        let taken = |at: &usize| ranks[*at] != f32::NEG_INFINITY;
        let best = best
            .or_else(|| (0..ranks.len()).find(taken))
            .unwrap_or_default();
        *chosen = best as u32;
        *weight = scores[best];
        ranks[best] = f32::NEG_INFINITY;
    }
    let sum = match how.renormalize {
        true => weights.iter().sum::<f32>() + LEAST,
        false => 1.0,
    };
    weights
        .iter_mut()
        .for_each(|it| *it *= how.scale as f32 / sum);
}

/// The default of [`Engine::combine`](crate::Engine::combine).
pub(crate) fn combine<B: Backend>(y: Tensor<B, 2>, routed: &Routed) -> Tensor<B, 2> {
    let (device, dtype, top_k) = (y.device(), y.dtype(), routed.top_k());
    let tokens = routed.tokens();
    let places = routed.slots().places();
    let of_slot = |slot: usize| {
        let places: Vec<i32> = nth(&places, slot, top_k).map(|it| it as i32).collect();
        let places = TensorData::new(places, [tokens]);
        let places = Tensor::<B, 1, Int>::from_data(places, (&device, DType::I32));
        let weights: Vec<f32> = nth(routed.weights(), slot, top_k).collect();
        let weights = TensorData::new(weights, [tokens, 1]);
        let weights = Tensor::<B, 2>::from_data(weights, (&device, DType::F32));
        y.clone().select(0, places).cast(DType::F32) * weights
    };
    let sum = (1..top_k).fold(of_slot(0), |sum, slot| sum + of_slot(slot));
    sum.cast(dtype)
}

/// The values of slot `slot` of each token.
fn nth<T: Copy>(values: &[T], slot: usize, top_k: usize) -> impl Iterator<Item = T> {
    values.iter().skip(slot).step_by(top_k).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOFTMAX: RoutingOptions = RoutingOptions {
        top_k: 2,
        sigmoid: false,
        renormalize: false,
        scale: 1.0,
    };

    fn close(found: &[f32], expected: &[f32]) {
        let pairs = found.iter().zip(expected);
        assert!(
            pairs.clone().all(|(a, b)| (a - b).abs() < 1e-6),
            "{found:?}"
        );
        assert_eq!(found.len(), expected.len());
    }

    #[test]
    fn softmax_scores_are_over_all_experts_and_renormalised_over_the_chosen() {
        let logits = [1f32, 3.0, 2.0, 0.0].map(|it: f32| it.ln_1p());
        // Scores 2, 4, 3 and 1 of 10.
        let routed = Routed::of(&logits, 4, None, SOFTMAX);
        assert_eq!(routed.experts(), [1, 2]);
        close(routed.weights(), &[0.4, 0.3]);
        let how = RoutingOptions {
            renormalize: true,
            scale: 2.0,
            ..SOFTMAX
        };
        close(
            Routed::of(&logits, 4, None, how).weights(),
            &[8.0 / 7.0, 6.0 / 7.0],
        );
    }

    #[test]
    fn a_correction_changes_the_choice_and_not_the_weights() {
        let how = RoutingOptions {
            sigmoid: true,
            ..SOFTMAX
        };
        let logits = [0.0, 0.0, 1f32.exp(), -10.0];
        let correction = [0.0, 0.0, 0.0, 5.0];
        let routed = Routed::of(&logits, 4, Some(&correction), how);
        assert_eq!(routed.experts(), [3, 2]);
        let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
        close(routed.weights(), &[sigmoid(-10.0), sigmoid(1f32.exp())]);
    }

    #[test]
    fn equal_scores_and_numbers_that_are_none_choose_different_experts() {
        for value in [0.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let routed = Routed::of(
                &[value; 4],
                4,
                None,
                RoutingOptions {
                    top_k: 4,
                    ..SOFTMAX
                },
            );
            let mut found = routed.experts().to_vec();
            found.sort();
            assert_eq!(found, [0, 1, 2, 3], "{value}");
        }
        assert_eq!(Routed::of(&[0.5; 4], 4, None, SOFTMAX).experts(), [0, 1]);
    }

    #[test]
    fn experts_take_their_slots_in_order() {
        let logits = [0.0, 2.0, 1.0, 1.0, 0.0, 2.0, 2.0, 1.0, 0.0];
        let routed = Routed::of(&logits, 3, None, SOFTMAX);
        assert_eq!(routed.experts(), [1, 2, 2, 0, 0, 1]);
        let slots = routed.slots();
        assert_eq!(slots.order, [3, 4, 0, 5, 1, 2]);
        assert_eq!(
            [slots.of(0), slots.of(1), slots.of(2)],
            [[3, 4], [0, 5], [1, 2]]
        );
        assert_eq!(slots.places(), [2, 4, 5, 0, 1, 3]);
    }
}
