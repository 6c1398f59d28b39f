//! A mixture of experts inside a block: the router, and the linears of the experts that a token is given to.
//!
//! Tokens are gathered expert by expert, multiplied, and put back in the order of their slots.

use std::ops::Range;

use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_kernels::{Engine, Routed, RoutingOptions};
use gptq_spec::{Routing, Scoring};

use crate::linear::{Linear, forward_each};

/// A matrix of a block that is not quantized.
#[derive(Clone, Debug)]
pub(crate) struct BlockMatrix<B: Engine> {
    /// `[out, in]`.
    pub(crate) weight: Tensor<B, 2>,
    /// Summands of the scores, for the choice alone.
    pub(crate) correction: Option<Vec<f32>>,
}

/// Chooses experts for the rows of `x [tokens, features]`.
pub(crate) fn route<B: Engine>(x: Tensor<B, 2>, router: &BlockMatrix<B>, how: &Routing) -> Routed {
    let logits = B::matmul_nt(x, router.weight.clone());
    let options = RoutingOptions {
        top_k: how.top_k,
        sigmoid: how.scoring == Scoring::Sigmoid,
        renormalize: how.renormalize,
        scale: how.scale,
    };
    B::route(logits, router.correction.as_deref(), options)
}

/// Indices on a device.
pub(crate) fn indices<B: Engine>(
    indices: impl Iterator<Item = u32>,
    device: &B::Device,
) -> Tensor<B, 1, Int> {
    let indices: Vec<i32> = indices.map(|it| it as i32).collect();
    let n = indices.len();
    Tensor::from_data(TensorData::new(indices, [n]), (device, DType::I32))
}

/// The outputs `[slots, out]` of a linear of every expert, one expert after the other.
#[derive(Clone, Debug)]
pub struct ExpertOutputs<B: Engine> {
    /// The outputs.
    pub outputs: Tensor<B, 2>,
    /// Each expert's linear, by its index in the block, and its rows; none for an expert without tokens.
    pub runs: Vec<(usize, Range<usize>)>,
}

/// The linears of a tap of experts, as many of each as one takes an input, and the index of the first.
pub(crate) struct ExpertLinears<'a, B: Engine> {
    pub(crate) linears: &'a [Linear<B>],
    pub(crate) first: usize,
    pub(crate) experts: usize,
}

impl<B: Engine> ExpertLinears<'_, B> {
    /// The outputs `[tokens, top_k * out]` of each expert's linears, for `x [tokens, in]`, which `observe` is shown
    /// as they come.
    pub(crate) fn dispatch(
        &self,
        x: Tensor<B, 2>,
        routed: &Routed,
        observe: &mut dyn FnMut(ExpertOutputs<B>),
    ) -> Vec<Tensor<B, 2>> {
        let (device, top_k) = (x.device(), routed.top_k());
        let tokens = x.dims()[0];
        let slots = routed.slots();
        let of_slots = slots.order.iter().map(|&slot| slot / top_k as u32);
        let x = B::embed(indices(of_slots, &device), x);
        let places = indices(slots.places().into_iter(), &device);
        let outputs = self.products(x, routed, observe).into_iter();
        let in_slots = outputs.map(|y| {
            let width = y.dims()[1];
            B::embed(places.clone(), y).reshape([tokens, top_k * width])
        });
        in_slots.collect()
    }

    /// The sum over a token's slots of their experts' outputs, with the choice's weights, `[tokens, out]` for `x
    /// [tokens, top_k * in]`.
    pub(crate) fn combine(
        &self,
        x: Tensor<B, 2>,
        routed: &Routed,
        observe: &mut dyn FnMut(ExpertOutputs<B>),
    ) -> Tensor<B, 2> {
        let (device, top_k) = (x.device(), routed.top_k());
        let [tokens, width] = x.dims();
        let x = x.reshape([tokens * top_k, width / top_k]);
        let x = B::embed(indices(routed.slots().order.iter().copied(), &device), x);
        let y = self.products(x, routed, observe).remove(0);
        B::combine(y, routed)
    }

    /// The outputs `[slots, out]` of each expert's linears, for `x [slots, in]` in the order of experts.
    fn products(
        &self,
        x: Tensor<B, 2>,
        routed: &Routed,
        observe: &mut dyn FnMut(ExpertOutputs<B>),
    ) -> Vec<Tensor<B, 2>> {
        let each = self.linears.len() / self.experts;
        let starts = &routed.slots().starts;
        let outputs = (0..each).map(|at| {
            let given = (0..self.experts).filter(|&it| starts[it] < starts[it + 1]);
            let runs = given.map(|expert| {
                let linear = expert * each + at;
                (linear, starts[expert]..starts[expert + 1])
            });
            let runs: Vec<_> = runs.collect();
            let linears = runs
                .iter()
                .map(|(linear, rows)| (&self.linears[*linear], rows.clone()));
            let outputs = forward_each(&linears.collect::<Vec<_>>(), x.clone());
            let runs = runs
                .into_iter()
                .map(|(linear, rows)| (self.first + linear, rows));
            observe(ExpertOutputs {
                outputs: outputs.clone(),
                runs: runs.collect(),
            });
            outputs
        });
        outputs.collect()
    }
}
