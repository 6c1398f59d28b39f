//! The CUDA backend's implementation of `Engine`.

use burn::tensor::{DType, Int, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use gptq_format::{Half, PackedLinear};
use gptq_solver::SolverError;

use super::{
    Cuda, Device, communicator,
    context::bind,
    error::{Error, fail},
    transfer::{self, Pinned},
};
use crate::engine::attend_next;
use crate::{
    Codes, DeviceLink, Engine, HessianOptions, HostBuffer, Incoming, LinkError, NormOptions,
    PackedWeight, Problem, Routed, RoutingOptions, Scores, StepProgram, Subset, TokenStep, Tunable,
    TuningStep, attention, dtype, half_of,
};

impl Engine for Cuda {
    const CHUNK_TOKENS: usize = 16_384;
    /// Enough for a device's multiprocessors, few enough that the buffers of a sweep stay small.
    const BATCH_ROWS: usize = 32_768;
    const KEEPS_PACKED: bool = true;
    const LINKS: bool = true;

    fn compute(half: Half) -> DType {
        dtype(half)
    }

    fn state_half(half: Half, _wide: bool) -> Half {
        half
    }

    fn matmul_nt(x: Tensor<Self, 2>, w: Tensor<Self, 2>) -> Tensor<Self, 2> {
        super::linear(x, w).unwrap_or_else(|error| fail(error))
    }

    fn embed(ids: Tensor<Self, 1, Int>, table: Tensor<Self, 2>) -> Tensor<Self, 2> {
        super::embedding(ids, table).unwrap_or_else(|error| fail(error))
    }

    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, eps: f64) -> Tensor<Self, 2> {
        super::rms_norm(x, weight, eps).unwrap_or_else(|error| fail(error))
    }

    fn rms_norm_f32(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        eps: f64,
        offset: f64,
    ) -> Tensor<Self, 2> {
        super::norm_f32(x, weight, eps, offset, false).unwrap_or_else(|error| fail(error))
    }

    fn centred_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, eps: f64) -> Tensor<Self, 2> {
        super::norm_f32(x, weight, eps, 0.0, true).unwrap_or_else(|error| fail(error))
    }

    fn rotary(x: Tensor<Self, 4>, cos: Tensor<Self, 2>, sin: Tensor<Self, 2>) -> Tensor<Self, 4> {
        match 2 * cos.dims()[1] == x.dims()[3] {
            true => super::rotary(x, cos, sin),
            false => super::partial_rotary(x, cos, sin, false),
        }
        .unwrap_or_else(|error| fail(error))
    }

    fn rotary_interleaved(
        x: Tensor<Self, 4>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> Tensor<Self, 4> {
        super::partial_rotary(x, cos, sin, true).unwrap_or_else(|error| fail(error))
    }

    fn causal_attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        scores: Scores,
    ) -> Tensor<Self, 3> {
        let dim = q.dims()[3];
        if !dim.is_multiple_of(16) || dim > 256 {
            // Shapes that no known model has; the kernel's tiles do not.
            return attention::causal_attention(q, k, v, scores);
        }
        super::causal_attention(q, k, v, scores).unwrap_or_else(|error| fail(error))
    }

    fn attend_next(
        qkv: [Tensor<Self, 4>; 3],
        tables: [Tensor<Self, 2>; 2],
        keys: &mut Tensor<Self, 3>,
        values: &mut Tensor<Self, 3>,
        at: usize,
        scores: Scores,
    ) -> Tensor<Self, 3> {
        if !super::decode_attention::attends(qkv[0].dims()[3]) {
            return attend_next(qkv, tables, keys, values, at, scores);
        }
        super::attend_next(qkv, tables, keys, values, at, scores)
            .unwrap_or_else(|error| fail(error))
    }

    fn swiglu(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        super::swiglu(gate, up).unwrap_or_else(|error| fail(error))
    }

    fn geglu(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        super::geglu(gate, up).unwrap_or_else(|error| fail(error))
    }

    fn matmul_nn(dy: Tensor<Self, 2>, w: Tensor<Self, 2>) -> Tensor<Self, 2> {
        super::input_gradient(dy, w).unwrap_or_else(|error| fail(error))
    }

    fn matmul_tn(dy: Tensor<Self, 2>, x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        super::weight_gradient(dy, x).unwrap_or_else(|error| fail(error))
    }

    fn attention_backward(
        qkv: [Tensor<Self, 4>; 3],
        d_out: Tensor<Self, 3>,
        scores: Scores,
    ) -> [Tensor<Self, 4>; 3] {
        super::attention_backward(qkv, d_out, scores).unwrap_or_else(|error| fail(error))
    }

    fn norm_backward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        dy: Tensor<Self, 2>,
        norm: NormOptions,
    ) -> Tensor<Self, 2> {
        super::norm_backward(x, weight, dy, norm).unwrap_or_else(|error| fail(error))
    }

    fn swiglu_backward(
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
        dy: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        super::swiglu_backward(gate, up, dy).unwrap_or_else(|error| fail(error))
    }

    fn geglu_backward(
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
        dy: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        super::geglu_backward(gate, up, dy).unwrap_or_else(|error| fail(error))
    }

    fn compare_logits(
        logits: Tensor<Self, 2>,
        reference: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
    ) -> Tensor<Self, 2> {
        super::compare_logits(logits, reference, targets).unwrap_or_else(|error| fail(error))
    }

    fn divergence_gradient(
        logits: Tensor<Self, 2>,
        reference: Tensor<Self, 2>,
        scale: f32,
        dtype: DType,
    ) -> [Tensor<Self, 2>; 2] {
        super::divergence_gradient(logits, reference, scale, dtype)
            .unwrap_or_else(|error| fail(error))
    }

    fn gram_zeros(shape: [usize; 2], device: &Device) -> Tensor<Self, 2> {
        super::gram_zeros(shape, device).unwrap_or_else(|error| fail(error))
    }

    fn gram_add(gram: Tensor<Self, 2>, x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        super::gram_add(gram, x).unwrap_or_else(|error| fail(error))
    }

    fn cross_add(
        cross: Tensor<Self, 2>,
        pair: [Tensor<Self, 2>; 2],
        x: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        super::cross_add(cross, pair, x).unwrap_or_else(|error| fail(error))
    }

    fn route(logits: Tensor<Self, 2>, correction: Option<&[f32]>, how: RoutingOptions) -> Routed {
        super::route(logits, correction, how).unwrap_or_else(|error| fail(error))
    }

    fn matmul_nt_each(
        x: Tensor<Self, 2>,
        starts: &[usize],
        weights: Vec<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        super::linear_each(x, starts, weights).unwrap_or_else(|error| fail(error))
    }

    fn gram_add_each(
        grams: Vec<Tensor<Self, 2>>,
        x: Tensor<Self, 2>,
        starts: &[usize],
    ) -> Vec<Tensor<Self, 2>> {
        super::gram_add_each(grams, x, starts).unwrap_or_else(|error| fail(error))
    }

    fn cross_add_each(
        crosses: Vec<Tensor<Self, 2>>,
        pair: [Tensor<Self, 2>; 2],
        x: Tensor<Self, 2>,
        starts: &[usize],
    ) -> Vec<Tensor<Self, 2>> {
        super::cross_add_each(crosses, pair, x, starts).unwrap_or_else(|error| fail(error))
    }

    fn combine(y: Tensor<Self, 2>, routed: &Routed) -> Tensor<Self, 2> {
        super::combine(y, routed).unwrap_or_else(|error| fail(error))
    }

    fn solve_each(
        problems: Vec<Problem<Self>>,
        hessian: HessianOptions,
    ) -> Result<Vec<Subset<Self>>, (usize, SolverError)> {
        super::solve(problems, hessian).map_err(|failed| {
            let error = match failed.error {
                Error::NotFinite { column } => SolverError::NonFiniteGram {
                    row: column,
                    col: column,
                },
                Error::NotPositiveDefinite { damping } => {
                    SolverError::NotPositiveDefinite { tried: damping }
                }
                error => fail(error),
            };
            (failed.at, error)
        })
    }

    fn tune(
        tunable: &mut Tunable<Self>,
        gradient: Tensor<Self, 2>,
        step: TuningStep,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        super::tune::step(tunable, gradient, step, dtype).unwrap_or_else(|error| fail(error))
    }

    fn tuned(tunable: &Tunable<Self>) -> Codes<Self> {
        super::tune::tuned(tunable).unwrap_or_else(|error| fail(error))
    }

    fn relative_error(gram: Tensor<Self, 2>, w: Tensor<Self, 2>, q: Tensor<Self, 2>) -> f64 {
        super::relative_error(gram, w, q).unwrap_or_else(|error| fail(error))
    }

    fn pack(linear: Codes<Self>) -> Incoming {
        let fetched = super::pack::pack(linear);
        fetched.unwrap_or_else(|error| fail(error)).into()
    }

    fn dequantize_packed(packed: &PackedLinear, dtype: DType, device: &Device) -> Tensor<Self, 2> {
        super::dequantize(packed, dtype, device).unwrap_or_else(|error| fail(error))
    }

    fn resident(packed: &PackedLinear, device: &Device) -> PackedWeight<Self> {
        super::resident(packed, device).unwrap_or_else(|error| fail(error))
    }

    fn packed_matmul_nt(x: Tensor<Self, 2>, w: &PackedWeight<Self>) -> Tensor<Self, 2> {
        super::packed_linear(x, w).unwrap_or_else(|error| fail(error))
    }

    fn step(program: StepProgram<Self>) -> Option<Box<dyn TokenStep<Self>>> {
        super::step::step(program).unwrap_or_else(|error| fail(error))
    }

    fn host_buffer(len: usize, half: Half, device: &Device) -> HostBuffer {
        let pinned = Pinned::take(len * size_of::<u16>(), device.index);
        HostBuffer::page_locked(pinned.unwrap_or_else(|error| fail(error)), half)
    }

    fn upload<const D: usize>(
        from: &HostBuffer,
        start: usize,
        shape: [usize; D],
        device: &Device,
    ) -> Tensor<Self, D> {
        match from.pinned() {
            Some(pinned) => transfer::upload(pinned, start, shape, dtype(from.half()), device),
            None => {
                let mut staged = Self::host_buffer(shape.iter().product(), from.half(), device);
                let len = staged.bits_mut().len();
                staged
                    .bits_mut()
                    .copy_from_slice(&from.bits()[start..start + len]);
                return Self::upload(&staged, 0, shape, device);
            }
        }
        .unwrap_or_else(|error| fail(error))
    }

    fn download(x: Tensor<Self, 2>) -> HostBuffer {
        let half = half_of(x.dtype());
        let pinned = transfer::download(x).unwrap_or_else(|error| fail(error));
        HostBuffer::page_locked(pinned, half)
    }

    fn link_ticket() -> Result<Vec<u8>, LinkError> {
        communicator::ticket()
    }

    fn connect(
        device: &Device,
        ticket: &[u8],
        place: [usize; 2],
        ended: &dyn Fn() -> bool,
    ) -> Result<Box<dyn DeviceLink<Self>>, LinkError> {
        Ok(Box::new(communicator::connect(
            device, ticket, place, ended,
        )?))
    }

    fn release_memory(device: &Device) {
        CudaRuntime::client(device).memory_cleanup();
    }

    fn device_name(device: &Device) -> Option<String> {
        bind(device.index).ok()?.name().ok()
    }

    fn device_id(device: &Device) -> Option<String> {
        let id = bind(device.index).ok()?.uuid().ok()?.bytes;
        Some(
            id.iter()
                .map(|byte| format!("{:02x}", *byte as u8))
                .collect(),
        )
    }

    fn free_memory(device: &Device) -> Option<u64> {
        let context = bind(device.index).ok()?;
        let (free, _) = context.mem_get_info().ok()?;
        Some(free as u64)
    }
}
