//! Choice of experts for tokens, and the sum of their outputs for each.
//!
//! Routing takes one plane a token: each unit holds the ranks of every 32nd expert, and the best one is found and taken
//! out as often as a token has experts. What is no number ranks below every number, and of equal ranks the first wins.

use burn::tensor::{DType, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};

use super::{
    Cuda,
    buffer::{self, array},
    error::Error,
};
use crate::{Routed, RoutingOptions};

const PLANE: usize = 32;
/// Tokens per cube in routing.
const PLANES: usize = 8;
/// Units per token in the sum.
const UNITS: u32 = 128;
/// The most experts whose ranks a plane holds, in registers.
const MOST: usize = 1024;
/// Below every rank of an expert that is left; a rank below this counts as it.
const LEAST: f32 = f32::MIN;
/// Keeps a sum of weights from being zero, as in `experts.rs`.
const TINY: f32 = crate::experts::LEAST;

/// `chosen[t, j]` and `weights[t, j]` for the `top_k` of the greatest `score + correction`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn route_kernel<F: Float>(
    logits: &Array<F>,
    correction: &Array<f32>,
    chosen: &mut Array<u32>,
    weights: &mut Array<f32>,
    tokens: u32,
    experts: u32,
    scale: f32,
    #[comptime] each: usize,
    #[comptime] top_k: usize,
    #[comptime] sigmoid: bool,
    #[comptime] renormalize: bool,
    #[comptime] corrected: bool,
    #[define(F)] _dtype: StorageType,
) {
    let lane = UNIT_POS_X as usize;
    let token = CUBE_POS_X as usize * PLANES + UNIT_POS_Y as usize;
    let experts = experts as usize;
    if token < tokens as usize {
        let none = f32::new(-1.0) / f32::new(0.0);
        let mut score = Array::<f32>::new(each);
        let mut rank = Array::<f32>::new(each);
        let mut largest = none;
        #[unroll]
        for i in 0..each {
            let expert = i * PLANE + lane;
            score[i] = none;
            if expert < experts {
                score[i] = f32::cast_from(logits[token * experts + expert]);
            }
            largest = largest.max(score[i]);
        }
        if comptime!(sigmoid) {
            #[unroll]
            for i in 0..each {
                score[i] = 1.0 / (1.0 + (-score[i]).exp());
            }
        } else {
            let largest = plane_max(largest);
            let mut sum = f32::new(0.0);
            #[unroll]
            for i in 0..each {
                // Zero past the last expert.
                score[i] = (score[i] - largest).exp();
                if i * PLANE + lane < experts {
                    sum += score[i];
                }
            }
            let sum = plane_sum(sum);
            #[unroll]
            for i in 0..each {
                score[i] /= sum;
            }
        }
        #[unroll]
        for i in 0..each {
            let expert = i * PLANE + lane;
            rank[i] = none;
            if expert < experts {
                let mut own = score[i];
                if comptime!(corrected) {
                    own += correction[expert];
                }
                rank[i] = select(own >= LEAST, own, f32::new(LEAST));
            }
        }
        let mut total = f32::new(0.0);
        let mut own = f32::new(0.0);
        for slot in 0..top_k {
            let mut best = none;
            // Above every expert's number, which f32 holds.
            let mut at = f32::new(16_777_216.0);
            #[unroll]
            for i in 0..each {
                if rank[i] > best {
                    best = rank[i];
                    at = f32::cast_from((i * PLANE + lane) as u32);
                }
            }
            let top = plane_max(best);
            let first = plane_min(select(best == top, at, f32::new(16_777_216.0)));
            let expert = u32::cast_from(first) as usize;
            let mut weight = f32::new(0.0);
            #[unroll]
            for i in 0..each {
                if i * PLANE + lane == expert {
                    weight = score[i];
                    rank[i] = none;
                }
            }
            let weight = plane_sum(weight);
            total += weight;
            if slot % PLANE == lane {
                own = weight;
            }
            if lane == 0 {
                chosen[token * top_k + slot] = expert as u32;
            }
            // All weights of a plane's units at a time.
            if slot % PLANE == PLANE - 1 || slot == top_k - 1 {
                let at = slot / PLANE * PLANE + lane;
                if at <= slot {
                    weights[token * top_k + at] = own;
                }
            }
        }
        let mut factor = scale;
        if comptime!(renormalize) {
            factor = scale / (total + TINY);
        }
        let mut at = lane;
        while at < top_k {
            weights[token * top_k + at] *= factor;
            at += PLANE;
        }
    }
}

/// `out[t] = Σ_j weights[t, j] y[places[t, j]]`, one cube per token.
#[cube(launch_unchecked)]
fn combine_kernel<F: Float, N: Size>(
    y: &Array<Vector<F, N>>,
    places: &Array<u32>,
    weights: &Array<f32>,
    out: &mut Array<Vector<F, N>>,
    vectors: u32,
    top_k: u32,
    #[define(F)] _dtype: StorageType,
) {
    let vectors = vectors as usize;
    let token = CUBE_POS_X as usize;
    let top_k = top_k as usize;
    let mut at = UNIT_POS as usize;
    while at < vectors {
        let mut sum = Vector::<f32, N>::new(0.0);
        for slot in 0..top_k {
            let weight = weights[token * top_k + slot];
            let row = places[token * top_k + slot] as usize;
            sum +=
                Vector::<f32, N>::cast_from(y[row * vectors + at]) * Vector::<f32, N>::new(weight);
        }
        out[token * vectors + at] = Vector::<F, N>::cast_from(sum);
        at += UNITS as usize;
    }
}

/// Chooses experts by `logits`, f16 or bf16 `[tokens, experts]`; waits for the device.
///
/// # Errors
///
/// Other dtypes, more experts than 1024, or fewer than a token is to have.
pub fn route(
    logits: Tensor<Cuda, 2>,
    correction: Option<&[f32]>,
    how: RoutingOptions,
) -> Result<Routed, Error> {
    let [tokens, experts] = logits.dims();
    if !(how.top_k..=MOST).contains(&experts) || correction.is_some_and(|it| it.len() != experts) {
        return Err(Error::Shape {
            operation: "route",
            reason: format!("{} of {experts} experts a token", how.top_k),
        });
    }
    let logits = buffer::half("route", "logits", logits)?;
    let chosen = buffer::empty(&logits, [tokens * how.top_k], DType::U32);
    let weights = buffer::empty(&logits, [tokens * how.top_k], DType::F32);
    let corrections = buffer::upload(&logits, correction.unwrap_or(&[0.0]), DType::F32);
    if tokens == 0 {
        return Ok(Routed::new(how.top_k, Vec::new(), Vec::new(), experts));
    }
    // SAFETY: tokens and experts stay below the logits' shape, slots below the outputs' length; a correction is
    // read where there is one, for each expert.
    unsafe {
        route_kernel::launch_unchecked::<CudaRuntime>(
            &logits.client,
            CubeCount::new_1d(tokens.div_ceil(PLANES) as u32),
            CubeDim::new_2d(PLANE as u32, PLANES as u32),
            array(&logits),
            array(&corrections),
            array(&chosen),
            array(&weights),
            tokens as u32,
            experts as u32,
            how.scale as f32,
            experts.div_ceil(PLANE),
            how.top_k,
            how.sigmoid,
            how.renormalize,
            correction.is_some(),
            logits.dtype.into(),
        );
    }
    let chosen = buffer::download(&chosen)?;
    let weights = buffer::download(&weights)?;
    Ok(Routed::new(how.top_k, chosen, weights, experts))
}

/// Sums the outputs `y`, f16 or bf16 `[slots, out]`, one expert after the other, of each token's experts: `[tokens,
/// out]`, in f32 and rounded once.
///
/// # Errors
///
/// Other dtypes, or another number of rows than of slots.
pub fn combine(y: Tensor<Cuda, 2>, routed: &Routed) -> Result<Tensor<Cuda, 2>, Error> {
    let [slots, features] = y.dims();
    let (tokens, top_k) = (routed.tokens(), routed.top_k());
    if slots != tokens * top_k {
        return Err(Error::Shape {
            operation: "combine",
            reason: format!("{slots} rows for {top_k} experts of {tokens} tokens"),
        });
    }
    let y = buffer::half("combine", "y", y)?;
    let out = buffer::empty(&y, [tokens, features], y.dtype);
    let lanes = buffer::vector_size(features, y.dtype);
    let places = buffer::upload(&y, &routed.slots().places(), DType::U32);
    let weights = buffer::upload(&y, routed.weights(), DType::F32);
    if tokens > 0 {
        // SAFETY: one cube per token; places are rows of y, one for each slot.
        unsafe {
            combine_kernel::launch_unchecked::<CudaRuntime>(
                &out.client,
                CubeCount::new_1d(tokens as u32),
                CubeDim::new_1d(UNITS),
                lanes,
                array(&y),
                array(&places),
                array(&weights),
                array(&out),
                (features / lanes) as u32,
                top_k as u32,
                y.dtype.into(),
            );
        }
    }
    Ok(buffer::into_float(out))
}
