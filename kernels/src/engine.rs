//! The backend extension: one method per device operation.
//!
//! Longer than most: every operation's contract is here.

use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData, activation::sigmoid};
use gptq_format::{Half, PackedLinear};
use gptq_solver::SolverError;
use rayon::prelude::*;

use crate::{
    Codes, DeviceLink, HessianOptions, HostBuffer, Incoming, LinkError, NormOptions, NotFinite,
    PackedWeight, Problem, Routed, RoutingOptions, Scores, StepProgram, Subset, TokenStep, Tunable,
    TuningStep, attention, backward, divergence, experts, finite, host_solve,
};

/// Applies `f` to every item, up to [`Engine::LANES`] at a time; results come in the items' order.
pub fn map_lanes<B: Engine, T: Send, R: Send>(
    items: Vec<T>,
    f: impl Fn(T) -> R + Sync + Send,
) -> Vec<R> {
    match B::LANES {
        1 => items.into_iter().map(f).collect(),
        _ => items.into_par_iter().with_max_len(1).map(f).collect(),
    }
}

/// Joins runs of rows, `starts[i]..starts[i + 1]`, with what belongs to each.
fn runs<T>(starts: &[usize], each: Vec<T>) -> impl Iterator<Item = (Range<usize>, T)> {
    let runs = starts.windows(2).map(|run| run[0]..run[1]);
    runs.zip(each)
}

/// The default of [`Engine::attend_next`].
pub(crate) fn attend_next<B: Engine>(
    [q, k, v]: [Tensor<B, 4>; 3],
    [cos, sin]: [Tensor<B, 2>; 2],
    keys: &mut Tensor<B, 3>,
    values: &mut Tensor<B, 3>,
    at: usize,
    scores: Scores,
) -> Tensor<B, 3> {
    let q = B::rotary(q, cos.clone(), sin.clone());
    attention::append(keys, B::rotary(k, cos, sin), at);
    attention::append(values, v, at);
    B::cached_attention(q, keys.clone(), values.clone(), at, scores)
}

/// Columns of a Gram panel in the default [`Engine::gram_add`].
const GRAM_PANEL: usize = 128;

/// Operations of the quantizer on a backend. Shapes are `[rows, cols]`, row-major; every tensor
/// named `x`, `w` or a weight has the dtype that [`Engine::compute`] says, in one model the same.
///
/// Like Burn's own operations these return tensors, not results: a device that fails unwinds, and
/// [`Device::run`](crate::Device::run) turns that into an error.
pub trait Engine: Backend {
    /// Number of chunks of windows that are worth running at the same time: more than 1 if single
    /// operations leave cores idle. It is a constant, so that sums do not depend on the machine's cores.
    const LANES: usize = 1;

    /// Rows in a strip, if a solve of some strips of a linear gives the rows of a solve of all, to the bit; `None` if its
    /// products depend on how many rows there are, so that ranks share whole linears.
    const STRIP: Option<usize> = None;

    /// Number of tokens whose transient activations are worth having at once, in whole windows.
    const CHUNK_TOKENS: usize = 4096;

    /// True if matrices go from one rank's device to another's by [`Engine::connect`], false if by the host.
    const LINKS: bool = false;

    /// Number of rows of linears that are worth solving together, about, where each few of them have an input of their
    /// own.
    const BATCH_ROWS: usize = 1;

    /// True if generation leaves quantized weights packed on the device and multiplies with them there;
    /// otherwise they are dequantized once, when they are loaded.
    const KEEPS_PACKED: bool = false;

    /// Returns the element type of weights and activations in the forward pass of a model taken in `half`.
    fn compute(half: Half) -> DType;

    /// Returns the type in which hidden states of such a model are kept between the stages of a run. Those of
    /// a `wide` model do not fit f16.
    fn state_half(half: Half, wide: bool) -> Half;

    /// `x` in another type: hidden states as they are kept, or as they are computed on.
    fn cast<const D: usize>(x: Tensor<Self, D>, dtype: DType) -> Tensor<Self, D> {
        x.cast(dtype)
    }

    /// `x [tokens, in] · wᵀ`, `w [out, in]`, giving `[tokens, out]`.
    fn matmul_nt(x: Tensor<Self, 2>, w: Tensor<Self, 2>) -> Tensor<Self, 2> {
        x.matmul(w.transpose())
    }

    /// Rows `ids` of `table [vocabulary, hidden]`, giving `[tokens, hidden]`.
    fn embed(ids: Tensor<Self, 1, Int>, table: Tensor<Self, 2>) -> Tensor<Self, 2> {
        table.select(0, ids)
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over the last dimension; normalised in f32, rounded to
    /// the compute type, then multiplied, as in Transformers.
    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, eps: f64) -> Tensor<Self, 2> {
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let variance = (x.clone() * x.clone()).mean_dim(1);
        let normal = x * variance.add_scalar(eps).sqrt().recip();
        normal.cast(dtype) * weight.unsqueeze()
    }

    /// `x / sqrt(mean(x²) + eps) * (weight + offset)` over the last dimension, all of it in f32 and rounded once.
    fn rms_norm_f32(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        eps: f64,
        offset: f64,
    ) -> Tensor<Self, 2> {
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let variance = (x.clone() * x.clone()).mean_dim(1);
        let normal = x * variance.add_scalar(eps).sqrt().recip();
        (normal * weight.cast(DType::F32).add_scalar(offset).unsqueeze()).cast(dtype)
    }

    /// `(x - mean(x)) / sqrt(variance(x) + eps) * weight` over the last dimension, in f32 and rounded once.
    fn centred_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, eps: f64) -> Tensor<Self, 2> {
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let centred = x.clone() - x.mean_dim(1);
        Self::rms_norm_f32(centred, weight, eps, 0.0).cast(dtype)
    }

    /// Rotary position embedding of `x [windows, seq, heads, dim]` for positions `0..seq`: with
    /// halves `a, b` of the first features of the last dimension, `(a cos - b sin, b cos + a sin)`; the rest
    /// stays. `cos` and `sin` are f32 `[seq, half]`, `half` at most `dim / 2`.
    fn rotary(x: Tensor<Self, 4>, cos: Tensor<Self, 2>, sin: Tensor<Self, 2>) -> Tensor<Self, 4> {
        let dtype = x.dtype();
        let [windows, seq, heads, dim] = x.dims();
        let half = cos.dims()[1];
        // Everything but the windows is one row, which the tables hold for each head: a backend that
        // broadcasts whole rows quickly may walk others an element at a time.
        let row = seq * heads * half;
        let table = |t: Tensor<Self, 2>| {
            let t = t.cast(dtype).reshape([seq, 1, half]);
            t.repeat_dim(1, heads).reshape([1, row])
        };
        let part = |range| {
            let part = x.clone().slice([0..windows, 0..seq, 0..heads, range]);
            part.reshape([windows, row])
        };
        let (cos, sin) = (table(cos), table(sin));
        let (a, b) = (part(0..half), part(half..2 * half));
        let first = a.clone() * cos.clone() - b.clone() * sin.clone();
        let second = b * cos + a * sin;
        let halves = [first, second].map(|it| it.reshape([windows, seq, heads, half]));
        let mut parts = halves.to_vec();
        if 2 * half < dim {
            parts.push(x.slice([0..windows, 0..seq, 0..heads, 2 * half..dim]));
        }
        Tensor::cat(parts, 3)
    }

    /// Does the same as [`Engine::rotary`], but pairs neighbours `x[2i], x[2i + 1]` in place of the halves'
    /// `x[i], x[half + i]`.
    fn rotary_interleaved(
        x: Tensor<Self, 4>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> Tensor<Self, 4> {
        let [windows, seq, heads, dim] = x.dims();
        let half = cos.dims()[1];
        let rotated = x.clone().slice([0..windows, 0..seq, 0..heads, 0..2 * half]);
        // [.., half, 2] -> [.., 2, half]: neighbours become halves.
        let rows = windows * seq * heads;
        let apart = rotated.reshape([rows, half, 2]).swap_dims(1, 2);
        let apart = apart.reshape([windows, seq, heads, 2 * half]);
        let apart = Self::rotary(apart, cos, sin).reshape([rows, 2, half]);
        let joined = apart
            .swap_dims(1, 2)
            .reshape([windows, seq, heads, 2 * half]);
        match 2 * half < dim {
            true => {
                let rest = x.slice([0..windows, 0..seq, 0..heads, 2 * half..dim]);
                Tensor::cat(vec![joined, rest], 3)
            }
            false => joined,
        }
    }

    /// Causal attention of `q [windows, seq, heads, dim]` over `k`, `v [windows, seq, kv_heads,
    /// dim]`, giving `[windows, seq, heads * dim]`; `heads` is a multiple of `kv_heads`.
    fn causal_attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        scores: Scores,
    ) -> Tensor<Self, 3> {
        attention::causal_attention(q, k, v, scores)
    }

    /// Causal attention of new tokens over a cache: `q [1, n, heads, dim]` at positions
    /// `start..start + n`, `keys` and `values [kv_heads, capacity, dim]` whose first `start + n`
    /// rows are filled, the new tokens' own included. Gives `[1, n, heads * dim]`.
    fn cached_attention(
        q: Tensor<Self, 4>,
        keys: Tensor<Self, 3>,
        values: Tensor<Self, 3>,
        start: usize,
        scores: Scores,
    ) -> Tensor<Self, 3> {
        attention::cached_attention(q, keys, values, start, scores)
    }

    /// Attention of the token at position `at` over a cache that it joins: rotates `q [1, 1, heads, dim]`
    /// and `k [1, 1, kv_heads, dim]` by `cos` and `sin [1, dim / 2]`, writes the key and the value to row
    /// `at` of `keys` and `values [kv_heads, capacity, dim]`, and gives the attention over the rows up to
    /// it, `[1, 1, heads * dim]`. `at` is below `capacity`.
    fn attend_next(
        qkv: [Tensor<Self, 4>; 3],
        tables: [Tensor<Self, 2>; 2],
        keys: &mut Tensor<Self, 3>,
        values: &mut Tensor<Self, 3>,
        at: usize,
        scores: Scores,
    ) -> Tensor<Self, 3> {
        attend_next(qkv, tables, keys, values, at, scores)
    }

    /// `silu(gate) * up`.
    fn swiglu(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        gate.clone() * sigmoid(gate) * up
    }

    /// `gelu(gate) * up`, with the approximation `gelu(x) = x / 2 (1 + tanh(u)) = x sigmoid(2 u)`,
    /// `u = sqrt(2 / π) (x + 0.044715 x³)`.
    fn geglu(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let cubic = gate.clone() * gate.clone() * gate.clone() * 0.044_715 + gate.clone();
        gate * sigmoid(cubic * (8.0 / std::f64::consts::PI).sqrt()) * up
    }

    /// The gradient of [`Engine::matmul_nt`] with respect to `x`: `dy [tokens, out] · w`, `w [out, in]`, giving
    /// `[tokens, in]`.
    fn matmul_nn(dy: Tensor<Self, 2>, w: Tensor<Self, 2>) -> Tensor<Self, 2> {
        dy.matmul(w)
    }

    /// The gradient of [`Engine::matmul_nt`] with respect to `w`: `dyᵀ · x` for `dy [tokens, out]` and `x [tokens,
    /// in]`, giving f32 `[out, in]`. There is at least one token.
    fn matmul_tn(dy: Tensor<Self, 2>, x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let (dy, x) = (dy.cast(DType::F32), x.cast(DType::F32));
        dy.transpose().matmul(x)
    }

    /// The gradients of [`Engine::causal_attention`] with respect to `q`, `k` and `v`, for that of its output,
    /// `d_out [windows, seq, heads * dim]`. The weights are computed again, a block of queries at a time.
    fn attention_backward(
        qkv: [Tensor<Self, 4>; 3],
        d_out: Tensor<Self, 3>,
        scores: Scores,
    ) -> [Tensor<Self, 4>; 3] {
        backward::attention_backward(qkv, d_out, scores)
    }

    /// The gradient of the norm `norm` of each row of `x [rows, len]`, with weights `[len]`, with respect to `x`, for
    /// that of its output, `dy` like `x`. An [`Engine::rms_norm`], whose rounding has no gradient, is one without
    /// offset.
    fn norm_backward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        dy: Tensor<Self, 2>,
        norm: NormOptions,
    ) -> Tensor<Self, 2> {
        backward::norm_backward(x, weight, dy, norm)
    }

    /// The gradients of [`Engine::swiglu`] with respect to `gate` and `up`, for that of its output.
    fn swiglu_backward(
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
        dy: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        backward::swiglu_backward(gate, up, dy)
    }

    /// The gradients of [`Engine::geglu`] with respect to `gate` and `up`, for that of its output.
    fn geglu_backward(
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
        dy: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        backward::geglu_backward(gate, up, dy)
    }

    /// Compares predictions with a reference's: for each row of `logits` and `reference`, f32 `[tokens, vocabulary]`,
    /// gives four numbers, f32 `[tokens, 4]`: `-ln q` and `-ln p` of the token `targets`, `Σ p (ln p - ln q)`, and 1 if
    /// the likeliest token is the same, else 0; `q = softmax(logits)`, `p = softmax(reference)`. Of equally likely
    /// tokens the first counts.
    fn compare_logits(
        logits: Tensor<Self, 2>,
        reference: Tensor<Self, 2>,
        targets: Tensor<Self, 1, Int>,
    ) -> Tensor<Self, 2> {
        divergence::compare_logits(logits, reference, targets)
    }

    /// For each row of `logits` and `reference`, f32 `[tokens, vocabulary]`, gives `KL = Σ p (ln p - ln q)`, f32 `[tokens,
    /// 1]`, and `scale` times its gradient with respect to `logits`, `q - p`, in `dtype`.
    fn divergence_gradient(
        logits: Tensor<Self, 2>,
        reference: Tensor<Self, 2>,
        scale: f32,
        dtype: DType,
    ) -> [Tensor<Self, 2>; 2] {
        divergence::divergence_gradient(logits, reference, scale, dtype)
    }

    /// A matrix of zeros, f32, for [`Engine::gram_add`] (`[in, in]`) or [`Engine::cross_add`].
    fn gram_zeros(shape: [usize; 2], device: &Self::Device) -> Tensor<Self, 2> {
        Tensor::zeros(shape, (device, DType::F32))
    }

    /// `gram + xᵀx` for `x [tokens, in]` and `gram [in, in]` f32, of which only the upper triangle
    /// (column index at least row index) is meaningful.
    fn gram_add(gram: Tensor<Self, 2>, x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let [tokens, n] = x.dims();
        let x = x.cast(DType::F32);
        let mut gram = gram;
        for start in (0..n).step_by(GRAM_PANEL) {
            let end = (start + GRAM_PANEL).min(n);
            let left = x.clone().slice([0..tokens, 0..end]).transpose();
            let panel = left.matmul(x.clone().slice([0..tokens, start..end]));
            let sum = gram.clone().slice([0..end, start..end]) + panel;
            gram = gram.slice_assign([0..end, start..end], sum);
        }
        gram
    }

    /// `cross + (dense - own)ᵀx` for `dense` and `own` `[tokens, features]`, `x [tokens, in]`, and `cross` f32
    /// `[features, in]`.
    fn cross_add(
        cross: Tensor<Self, 2>,
        [dense, own]: [Tensor<Self, 2>; 2],
        x: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        let [dense, own, x] = [dense, own, x].map(|it| it.cast(DType::F32));
        cross + (dense - own).transpose().matmul(x)
    }

    /// Chooses experts for tokens by their routers' `logits [tokens, experts]`, of which `correction` is a summand for
    /// the choice alone. Waits for the device.
    fn route(logits: Tensor<Self, 2>, correction: Option<&[f32]>, how: RoutingOptions) -> Routed {
        let experts = logits.dims()[1];
        let logits = logits.cast(DType::F32).into_data();
        let logits = logits.as_slice::<f32>().expect("the logits are f32");
        Routed::of(logits, experts, correction, how)
    }

    /// [`Engine::matmul_nt`] of each run of rows of `x [rows, in]` with a weight of its own, `[out, in]`, giving `[rows,
    /// out]`. Run `i` is the rows `starts[i]..starts[i + 1]`; all of them are `x`, which has at least one.
    fn matmul_nt_each(
        x: Tensor<Self, 2>,
        starts: &[usize],
        weights: Vec<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        let runs = runs(starts, weights);
        let products = runs.filter(|(run, _)| !run.is_empty()).map(|(run, w)| {
            let rows = x.clone().narrow(0, run.start, run.len());
            Self::matmul_nt(rows, w)
        });
        Tensor::cat(products.collect(), 0)
    }

    /// [`Engine::gram_add`] of each run of rows of `x`, which `starts` gives as in [`Engine::matmul_nt_each`].
    fn gram_add_each(
        grams: Vec<Tensor<Self, 2>>,
        x: Tensor<Self, 2>,
        starts: &[usize],
    ) -> Vec<Tensor<Self, 2>> {
        let sums = runs(starts, grams).map(|(run, gram)| match run.is_empty() {
            true => gram,
            false => Self::gram_add(gram, x.clone().narrow(0, run.start, run.len())),
        });
        sums.collect()
    }

    /// [`Engine::cross_add`] of each run of rows, which `starts` gives as in [`Engine::matmul_nt_each`].
    fn cross_add_each(
        crosses: Vec<Tensor<Self, 2>>,
        pair: [Tensor<Self, 2>; 2],
        x: Tensor<Self, 2>,
        starts: &[usize],
    ) -> Vec<Tensor<Self, 2>> {
        let sums = runs(starts, crosses).map(|(run, cross)| {
            let rows = |x: &Tensor<Self, 2>| x.clone().narrow(0, run.start, run.len());
            match run.is_empty() {
                true => cross,
                false => Self::cross_add(cross, pair.each_ref().map(rows), rows(&x)),
            }
        });
        sums.collect()
    }

    /// The sum over each token's experts of their outputs, with the weights of the choice, in f32 and rounded once: `y
    /// [slots, out]`, one expert after the other, gives `[tokens, out]`.
    fn combine(y: Tensor<Self, 2>, routed: &Routed) -> Tensor<Self, 2> {
        experts::combine(y, routed)
    }

    /// Solves every linear that shares one input: orders, damps and factors its Gram matrix once,
    /// then quantizes each weight of the requests, or what the mismatch makes of it.
    ///
    /// # Errors
    /// A Gram matrix that is not finite or cannot be factored.
    fn solve(problem: Problem<Self>, hessian: HessianOptions) -> Result<Subset<Self>, SolverError> {
        let subsets = Self::solve_each(vec![problem], hessian).map_err(|(_, error)| error)?;
        Ok(subsets.into_iter().next().expect("one for each problem"))
    }

    /// [`Engine::solve`] for each of some inputs, in any order or together.
    ///
    /// # Errors
    /// The first input that has one, and its error.
    fn solve_each(
        problems: Vec<Problem<Self>>,
        hessian: HessianOptions,
    ) -> Result<Vec<Subset<Self>>, (usize, SolverError)> {
        let problems = problems.into_iter().enumerate().collect();
        let solved = map_lanes::<Self, _, _>(problems, |(at, problem)| {
            host_solve::solve(problem, hessian).map_err(|error| (at, error))
        });
        solved.into_iter().collect()
    }

    /// Takes a step of `tunable` along `gradient`, f32 `[out, in]`; returns the weights after it in `dtype`, which
    /// [`Engine::compute`] gives.
    fn tune(
        tunable: &mut Tunable<Self>,
        gradient: Tensor<Self, 2>,
        step: TuningStep,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        tunable.step(gradient, step).cast(dtype)
    }

    /// Returns the linear that `tunable` is now.
    fn tuned(tunable: &Tunable<Self>) -> Codes<Self> {
        Codes::upload(tunable.on_host(), &tunable.device())
    }

    /// Returns `‖(W - Q)X‖² / ‖WX‖²` for weights `w` and `q`, `[out, in]` in compute dtype, and the Gram matrix `XᵀX`,
    /// f32 `[in, in]`, upper triangle.
    fn relative_error(gram: Tensor<Self, 2>, w: Tensor<Self, 2>, q: Tensor<Self, 2>) -> f64 {
        host_solve::relative_error(gram, w, q)
    }

    /// Packs the codes of a linear into words and sends all of it to the host. The device may still be at it when
    /// this returns: whoever takes it waits. The inputs are a multiple of 32.
    fn pack(linear: Codes<Self>) -> Incoming {
        linear.download().pack().into()
    }

    /// The weights a packed linear stands for, `[out, in]` in `dtype`, which [`Engine::compute`] gives.
    /// Its `g_idx` has been checked against its groups.
    fn dequantize_packed(
        packed: &PackedLinear,
        dtype: DType,
        device: &Self::Device,
    ) -> Tensor<Self, 2> {
        let shape = [packed.out_features, packed.in_features];
        let data = TensorData::new(packed.unpack().dequantize(), shape);
        Tensor::<Self, 2>::from_data(data, (device, DType::F32)).cast(dtype)
    }

    /// A packed linear on the device as [`Engine::packed_matmul_nt`] takes it.
    fn resident(packed: &PackedLinear, device: &Self::Device) -> PackedWeight<Self> {
        PackedWeight::upload(packed, device)
    }

    /// `x [tokens, in] · wᵀ` for a packed `w`, giving `[tokens, out]`. The default dequantizes by way
    /// of the host at every call: override it together with [`Engine::KEEPS_PACKED`].
    fn packed_matmul_nt(x: Tensor<Self, 2>, w: &PackedWeight<Self>) -> Tensor<Self, 2> {
        let weight = Self::dequantize_packed(&w.download(), x.dtype(), &x.device());
        Self::matmul_nt(x, weight)
    }

    /// Makes a program that takes one token through a model; `None` if the engine has nothing faster than its operations
    /// one by one, or not for all of these.
    fn step(_program: StepProgram<Self>) -> Option<Box<dyn TokenStep<Self>>> {
        None
    }

    /// Host memory for `len` values of type `half`, for transfers to `device`; its contents are
    /// undefined.
    fn host_buffer(len: usize, half: Half, _device: &Self::Device) -> HostBuffer {
        HostBuffer::pageable(vec![0; len], half)
    }

    /// The tensor of this shape, in the type of `from`, that starts at value `start` of it. The device
    /// may still be reading when this returns: `from` keeps track of that.
    fn upload<const D: usize>(
        from: &HostBuffer,
        start: usize,
        shape: [usize; D],
        device: &Self::Device,
    ) -> Tensor<Self, D> {
        let len: usize = shape.iter().product();
        let data = from.data(start..start + len, shape);
        let dtype = data.dtype;
        Tensor::from_data(data, (device, dtype))
    }

    /// The values of a matrix of f16 or bf16. The device may still be writing when this returns: the
    /// buffer's readers wait.
    fn download(x: Tensor<Self, 2>) -> HostBuffer {
        HostBuffer::from_data(x.into_data())
    }

    /// `x` with what lies beyond the range of `half` replaced by the nearest that it holds, and how many
    /// values that were; NaN stays. Waits for the device.
    fn clamp(x: Tensor<Self, 2>, half: Half) -> (Tensor<Self, 2>, usize) {
        finite::clamp(x, half)
    }

    /// Finds the values of `x` that are not finite, to explain a failure: a run detects one on the diagonals
    /// of its Gram matrices, which a solve reads anyway.
    fn not_finite(x: Tensor<Self, 2>) -> Option<NotFinite> {
        finite::not_finite(x)
    }

    /// Returns the number that [`Engine::connect`] is to be given on every rank of a run.
    ///
    /// # Errors
    /// A missing library, or an engine without [`Engine::LINKS`].
    fn link_ticket() -> Result<Vec<u8>, LinkError> {
        Err(LinkError::Failed("no link between devices".to_owned()))
    }

    /// Connects the device with those of the other ranks: `[rank, size]` is this one's place. `ended` is asked while they
    /// are awaited.
    ///
    /// # Errors
    /// A missing library or its failure, ranks that do not come, `ended`, or an engine without [`Engine::LINKS`].
    fn connect(
        _device: &Self::Device,
        _ticket: &[u8],
        _place: [usize; 2],
        _ended: &dyn Fn() -> bool,
    ) -> Result<Box<dyn DeviceLink<Self>>, LinkError> {
        Err(LinkError::Failed("no link between devices".to_owned()))
    }

    /// Gives device memory that no tensor uses back to the driver, where an engine keeps it for reuse.
    fn release_memory(_device: &Self::Device) {}

    /// The device's name, where devices of one kind may compute different bytes.
    fn device_name(_device: &Self::Device) -> Option<String> {
        None
    }

    /// A name of the device that no other one of its host has; `None` where tensors live in the host's memory.
    fn device_id(_device: &Self::Device) -> Option<String> {
        None
    }

    /// Device memory that is free, in bytes; `None` where tensors live in the host's memory.
    fn free_memory(_device: &Self::Device) -> Option<u64> {
        None
    }
}
