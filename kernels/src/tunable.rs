//! A linear's codes and scales as parameters that follow a gradient.
//!
//! The weights are `w = s (c - zero)` with codes `c = clamp(round(u))` and scales `s = f16(s₀ (1 + a))`. `u`, one number
//! for each weight, begins as the one that was rounded to the code; `a`, one for each group of a row, begins at 0. Zero
//! points stay. Rounding passes the gradient on as it is (straight through): with `g = ∂L/∂w`,
//!
//! `∂L/∂a = s₀ Σ g (c - zero)` over the group, `∂L/∂u = g s`, or 0 where `u` lies beyond the codes.
//!
//! Both follow Adam (Kingma and Ba, 2015). `u` stays within a step of where it began, `a` within a half of zero.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_format::{Bits, QuantizedLinear};
use half::f16;

use crate::Codes;

/// Decay of Adam's mean gradient.
pub(crate) const FIRST: f32 = 0.9;
/// Decay of Adam's mean square.
pub(crate) const SECOND: f32 = 0.98;
/// Added to the square root of the mean square; gradients are far above it.
pub(crate) const EPSILON: f32 = 1e-12;
/// Largest distance of an unrounded code from where it began.
pub(crate) const REACH: f32 = 1.0;
/// Largest change of a scale, as a fraction of itself.
pub(crate) const STRETCH: f32 = 0.5;
/// Gradients beyond this, and those that are no numbers, count as 0: 16-bit products may overflow.
pub(crate) const MOST: f32 = 1e30;
/// The smallest positive f16.
pub(crate) const TINY: f32 = 5.960_464_5e-8;
/// The largest f16.
pub(crate) const LARGEST: f32 = 65_504.0;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TuningStep {
    /// Its number, from 1.
    pub number: usize,
    /// Learning rate of codes, in codes.
    pub code_rate: f32,
    /// Learning rate of scales, as a fraction of each.
    pub scale_rate: f32,
}

impl TuningStep {
    /// Returns the factors that make up for moments which begin at zero.
    pub(crate) fn corrections(&self) -> [f32; 2] {
        [FIRST, SECOND].map(|decay| (1.0 - decay.powi(self.number as i32)).recip())
    }
}

/// Parameters with the moments of their gradients. Weights are f32 `[out, in]`, columns in the order of their groups;
/// groups f32 `[out, groups]`.
#[derive(Debug)]
pub struct Tunable<B: Backend> {
    pub(crate) bits: Bits,
    pub(crate) g_idx: Vec<i32>,
    /// u8 `[groups, out]`, as in [`Codes`].
    pub(crate) zero_codes: Tensor<B, 2, Int>,
    /// Columns in the order of their groups, on the host and the device.
    pub(crate) order: Vec<u32>,
    pub(crate) columns: Tensor<B, 1, Int>,
    /// `u`, where it began, and its moments.
    pub(crate) unrounded: Tensor<B, 2>,
    pub(crate) start: Tensor<B, 2>,
    pub(crate) moments: [Tensor<B, 2>; 2],
    /// `s₀`, zero points, `a` and its moments.
    pub(crate) scales: Tensor<B, 2>,
    pub(crate) zeros: Tensor<B, 2>,
    pub(crate) stretch: Tensor<B, 2>,
    pub(crate) stretch_moments: [Tensor<B, 2>; 2],
}

impl<B: Backend> Tunable<B> {
    /// Begins with a solved linear: `unrounded [out, in]` are the numbers that were rounded to its codes.
    ///
    /// # Panics
    /// Shapes that differ, or groups of different sizes.
    pub fn new(codes: Codes<B>, unrounded: Tensor<B, 2>) -> Self {
        let [n_in, n_out] = codes.codes.dims();
        let [groups, _] = codes.scales.dims();
        assert_eq!(unrounded.dims(), [n_out, n_in], "a number for each code");
        let device = unrounded.device();
        let mut order: Vec<u32> = (0..n_in as u32).collect();
        order.sort_by_key(|&column| codes.g_idx[column as usize]);
        let size = n_in / groups;
        let whole =
            |(at, &column): (usize, &u32)| codes.g_idx[column as usize] as usize == at / size;
        assert!(order.iter().enumerate().all(whole), "groups of one size");
        let columns = indices(&order, &device);
        let unrounded = match in_order(&order) {
            true => unrounded,
            false => unrounded.select(1, columns.clone()),
        };
        let weights = || Tensor::zeros([n_out, n_in], (&device, DType::F32));
        let by_group = || Tensor::zeros([n_out, groups], (&device, DType::F32));
        let zeros = codes.zeros.clone().float().cast(DType::F32).transpose();
        Tunable {
            bits: codes.bits,
            g_idx: codes.g_idx,
            zero_codes: codes.zeros,
            order,
            columns,
            // A copy of its own, because an engine may write in place.
            start: unrounded.clone(),
            unrounded: unrounded + weights(),
            moments: [weights(), weights()],
            scales: codes.scales.cast(DType::F32).transpose() + by_group(),
            zeros: zeros + by_group(),
            stretch: by_group(),
            stretch_moments: [by_group(), by_group()],
        }
    }

    pub(crate) fn device(&self) -> B::Device {
        self.unrounded.device()
    }

    /// Returns the number of columns in each group.
    pub(crate) fn group_size(&self) -> usize {
        self.order.len() / self.scales.dims()[1]
    }

    /// Returns the scales, f32 `[out, groups]`, each a value of f16.
    pub(crate) fn scales(&self) -> Tensor<B, 2> {
        let scales = self.scales.clone() * self.stretch.clone().add_scalar(1.0);
        let size = scales.clone().abs().clamp(TINY, LARGEST);
        (size * scales.sign()).cast(DType::F16).cast(DType::F32)
    }

    /// Returns the codes, f32 `[out, in]`, columns in the order of their groups.
    fn codes(&self) -> Tensor<B, 2> {
        let most = f32::from(self.bits.max_code());
        self.unrounded.clone().round().clamp(0.0, most)
    }

    /// Takes a step along `gradient`, f32 `[out, in]`, and returns the weights after it, f32 `[out, in]`.
    pub(crate) fn step(&mut self, gradient: Tensor<B, 2>, step: TuningStep) -> Tensor<B, 2> {
        let [n_out, n_in] = gradient.dims();
        let (groups, size) = (self.scales.dims()[1], self.group_size());
        let device = gradient.device();
        let own = in_order(&self.order);
        let finite = gradient.clone().abs().lower_equal_elem(MOST);
        let gradient = gradient.zeros_like().mask_where(finite, gradient);
        let gradient = match own {
            true => gradient,
            false => gradient.select(1, self.columns.clone()),
        };
        let apart = |x: Tensor<B, 2>| x.reshape([n_out * groups, size]);
        let each = |x: Tensor<B, 2>| x.reshape([n_out * groups, 1]);
        let together = |x: Tensor<B, 2>| x.reshape([n_out, n_in]);
        let steps = apart(self.codes()) - each(self.zeros.clone());
        let pull = (apart(gradient.clone()) * steps).sum_dim(1);
        let pull = pull.reshape([n_out, groups]) * self.scales.clone();
        let moved = adam(&mut self.stretch_moments, pull, step).mul_scalar(step.scale_rate);
        self.stretch = (self.stretch.clone() - moved).clamp(-STRETCH, STRETCH);

        let scales = each(self.scales());
        let most = f32::from(self.bits.max_code()) + 0.5;
        let inside = self.unrounded.clone().lower_equal_elem(most).float();
        let above = self.unrounded.clone().greater_equal_elem(-0.5).float();
        let pull = together(apart(gradient) * scales.clone()) * (inside * above).cast(DType::F32);
        let moved = adam(&mut self.moments, pull, step).mul_scalar(step.code_rate);
        let most = self.start.clone().add_scalar(REACH);
        let least = self.start.clone().sub_scalar(REACH);
        self.unrounded = (self.unrounded.clone() - moved)
            .min_pair(most)
            .max_pair(least);

        let steps = apart(self.codes()) - each(self.zeros.clone());
        let weights = together(steps * scales);
        match own {
            true => weights,
            false => weights.select(1, indices(&self.back(), &device)),
        }
    }

    /// Returns the linear as it is now; by way of the host.
    pub(crate) fn on_host(&self) -> QuantizedLinear {
        let values = |tensor: Tensor<B, 2>| {
            let values = tensor.into_data().into_vec::<f32>();
            values.expect("parameters are f32")
        };
        let (n_out, n_in) = (self.unrounded.dims()[0], self.order.len());
        let groups = self.scales.dims()[1];
        let codes = values(self.codes());
        let back = self.back();
        let by_group = |values: Vec<f32>| {
            let at = move |i: usize| values[i % n_out * groups + i / n_out];
            (0..groups * n_out).map(at)
        };
        QuantizedLinear {
            bits: self.bits,
            in_features: n_in,
            out_features: n_out,
            codes: (0..n_in * n_out)
                .map(|i| codes[i % n_out * n_in + back[i / n_out] as usize] as u8)
                .collect(),
            scales: by_group(values(self.scales())).map(f16::from_f32).collect(),
            zeros: by_group(values(self.zeros.clone()))
                .map(|v| v as u8)
                .collect(),
            g_idx: self.g_idx.clone(),
        }
    }

    /// Returns the place of each column in the order of groups.
    pub(crate) fn back(&self) -> Vec<u32> {
        let mut back = vec![0; self.order.len()];
        for (at, &column) in self.order.iter().enumerate() {
            back[column as usize] = at as u32;
        }
        back
    }
}

/// True if columns lie in the order of their groups.
fn in_order(order: &[u32]) -> bool {
    order
        .iter()
        .enumerate()
        .all(|(at, &column)| at as u32 == column)
}

fn indices<B: Backend>(of: &[u32], device: &B::Device) -> Tensor<B, 1, Int> {
    let values: Vec<i32> = of.iter().map(|&at| at as i32).collect();
    let data = TensorData::new(values, [of.len()]);
    Tensor::from_data(data, (device, DType::I32))
}

/// Takes `gradient` into the moments and returns Adam's direction.
fn adam<B: Backend>(
    [first, second]: &mut [Tensor<B, 2>; 2],
    gradient: Tensor<B, 2>,
    step: TuningStep,
) -> Tensor<B, 2> {
    let [of_first, of_second] = step.corrections();
    *first = first.clone() * FIRST + gradient.clone() * (1.0 - FIRST);
    *second = second.clone() * SECOND + gradient.clone() * gradient * (1.0 - SECOND);
    let size = (second.clone() * of_second).sqrt().add_scalar(EPSILON);
    first.clone() * of_first / size
}

#[cfg(test)]
mod tests;
