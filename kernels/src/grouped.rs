//! Operations on consecutive rows of a matrix, of which each run has a matrix of its own: the experts' tokens.
//!
//! `starts` holds the first row of each run and, in the end, the number of rows; a run may be empty.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::{Engine, Routed};

/// The default of [`Engine::matmul_nt_each`].
pub(crate) fn matmul_nt_each<B: Engine>(
    x: Tensor<B, 2>,
    starts: &[usize],
    weights: Vec<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let runs = starts.windows(2).zip(weights);
    let products = runs.filter(|(run, _)| run[0] < run[1]).map(|(run, w)| {
        let rows = x.clone().narrow(0, run[0], run[1] - run[0]);
        B::matmul_nt(rows, w)
    });
    Tensor::cat(products.collect(), 0)
}

/// The default of [`Engine::gram_add_each`].
pub(crate) fn gram_add_each<B: Engine>(
    grams: Vec<Tensor<B, 2>>,
    x: Tensor<B, 2>,
    starts: &[usize],
) -> Vec<Tensor<B, 2>> {
    let runs = starts.windows(2).zip(grams);
    let sums = runs.map(|(run, gram)| match run[1] - run[0] {
        0 => gram,
        rows => B::gram_add(gram, x.clone().narrow(0, run[0], rows)),
    });
    sums.collect()
}

/// The default of [`Engine::cross_add_each`].
pub(crate) fn cross_add_each<B: Engine>(
    crosses: Vec<Tensor<B, 2>>,
    pair: [Tensor<B, 2>; 2],
    x: Tensor<B, 2>,
    starts: &[usize],
) -> Vec<Tensor<B, 2>> {
    let runs = starts.windows(2).zip(crosses);
    let sums = runs.map(|(run, cross)| {
        let rows = |x: &Tensor<B, 2>| x.clone().narrow(0, run[0], run[1] - run[0]);
        match run[0] == run[1] {
            true => cross,
            false => B::cross_add(cross, [rows(&pair[0]), rows(&pair[1])], rows(&x)),
        }
    });
    sums.collect()
}

/// The default of [`Engine::combine`].
pub(crate) fn combine<B: Engine>(y: Tensor<B, 2>, routed: &Routed) -> Tensor<B, 2> {
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
        B::embed(places, y.clone()).cast(DType::F32) * weights
    };
    let sum = (1..top_k).fold(of_slot(0), |sum, slot| sum + of_slot(slot));
    sum.cast(dtype)
}

/// The values of slot `slot` of each token.
fn nth<T: Copy>(values: &[T], slot: usize, top_k: usize) -> impl Iterator<Item = T> {
    values.iter().skip(slot).step_by(top_k).copied()
}
