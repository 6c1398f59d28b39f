//! A mixture of experts inside a block: the router, and the linears of the experts that a token is given to.
//!
//! Tokens are gathered expert by expert, multiplied, and put back in the order of their slots.

use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_kernels::{Engine, Routed, RoutingOptions, Slots};
use gptq_spec::{Routing, Scoring};

use crate::Linear;

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
    let logits = B::matmul_nt(x, router.weight.clone()).cast(DType::F32);
    let logits = logits.into_data();
    let logits = logits.as_slice::<f32>().expect("the logits are f32");
    let options = RoutingOptions {
        top_k: how.top_k,
        sigmoid: how.scoring == Scoring::Sigmoid,
        renormalize: how.renormalize,
        scale: how.scale,
    };
    Routed::of(logits, how.experts, router.correction.as_deref(), options)
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

/// The linears of a tap of experts, as many of each as one takes an input, and the index of the first.
pub(crate) struct ExpertLinears<'a, B: Engine> {
    pub(crate) linears: &'a [Linear<B>],
    pub(crate) first: usize,
    pub(crate) experts: usize,
}

impl<B: Engine> ExpertLinears<'_, B> {
    /// The outputs `[tokens, top_k * out]` of each expert's linears, for `x [tokens, in]`. `observe` is shown each
    /// linear's index and output.
    pub(crate) fn dispatch(
        &self,
        x: Tensor<B, 2>,
        routed: &Routed,
        observe: &mut dyn FnMut(usize, &Tensor<B, 2>),
    ) -> Vec<Tensor<B, 2>> {
        let (device, top_k) = (x.device(), routed.top_k());
        let tokens = x.dims()[0];
        let slots = routed.slots(self.experts);
        let of_slots = slots.order.iter().map(|&slot| slot / top_k as u32);
        let x = B::embed(indices(of_slots, &device), x);
        let places = indices(slots.places().into_iter(), &device);
        let outputs = self.products(x, &slots, observe).into_iter();
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
        observe: &mut dyn FnMut(usize, &Tensor<B, 2>),
    ) -> Tensor<B, 2> {
        let (device, dtype, top_k) = (x.device(), x.dtype(), routed.top_k());
        let [tokens, width] = x.dims();
        let slots = routed.slots(self.experts);
        let x = x.reshape([tokens * top_k, width / top_k]);
        let x = B::embed(indices(slots.order.iter().copied(), &device), x);
        let y = self.products(x, &slots, observe).remove(0);
        let places = slots.places();
        let of_slot = |slot: usize| {
            let nth = |values: &[u32]| -> Vec<u32> {
                values.iter().skip(slot).step_by(top_k).copied().collect()
            };
            let rows = B::embed(indices(nth(&places).into_iter(), &device), y.clone());
            let weights: Vec<f32> = (routed.weights().iter().skip(slot).step_by(top_k))
                .copied()
                .collect();
            let weights = TensorData::new(weights, [tokens, 1]);
            let weights = Tensor::<B, 2>::from_data(weights, (&device, DType::F32));
            rows.cast(DType::F32) * weights
        };
        let sum = (1..top_k).fold(of_slot(0), |sum, slot| sum + of_slot(slot));
        sum.cast(dtype)
    }

    /// The outputs `[slots, out]` of each expert's linears, for `x [slots, in]` in the order of `slots`.
    fn products(
        &self,
        x: Tensor<B, 2>,
        slots: &Slots,
        observe: &mut dyn FnMut(usize, &Tensor<B, 2>),
    ) -> Vec<Tensor<B, 2>> {
        let each = self.linears.len() / self.experts;
        let mut outputs = vec![Vec::new(); each];
        for (expert, linears) in self.linears.chunks_exact(each).enumerate() {
            let n = slots.of(expert).len();
            if n == 0 {
                continue;
            }
            let own = x.clone().narrow(0, slots.starts[expert], n);
            for (at, (linear, outputs)) in linears.iter().zip(&mut outputs).enumerate() {
                let y = linear.forward(own.clone());
                observe(self.first + expert * each + at, &y);
                outputs.push(y);
            }
        }
        let outputs = outputs.into_iter();
        outputs.map(|outputs| Tensor::cat(outputs, 0)).collect()
    }
}
