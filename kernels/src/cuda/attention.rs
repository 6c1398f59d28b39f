//! Causal attention with grouped heads, `softmax(q·kᵀ / sqrt(head_dim)) · v`, or with other [`Scores`].
//!
//! FlashAttention-2's loop (Dao, 2023): a block of query rows walks over the keys with a
//! running maximum and sum, so no score matrix is ever stored. f16 or bf16 operands, f32 sums; the
//! probabilities are rounded to the same before they meet the values. Windows and softcaps are compiled into
//! kernels of their own, so that those without do not pay for them. The kernel is CUDA C++,
//! compiled by NVRTC at first use for each head dimension, type and kind: Burn's CubeCL attention was
//! measured at 18 TFLOP/s where this shape allows several hundred.

use std::{cell::RefCell, collections::HashMap, f32::consts::LOG2_E};

use burn::tensor::{DType, Tensor};
use cudarc::driver::{
    result as driver,
    sys::{CUdevice_attribute, CUfunction, CUfunction_attribute},
};

use super::{
    Cuda, buffer,
    context::refused,
    error::Error,
    kernel_cache::attribute,
    nvrtc::{CudaSource, Launch, function, launch},
    stream::on_stream_later,
};
use crate::Scores;

const NAME: &str = "causal_attention";
const SOURCE: CudaSource = CudaSource {
    name: NAME,
    text: include_str!("attention.cu"),
};

/// Parameters that a kernel is compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    device: usize,
    head_dim: usize,
    dtype: DType,
    window: bool,
    softcap: bool,
}

/// A compiled kernel and its shape.
#[derive(Clone, Copy)]
struct Kernel {
    function: CUfunction,
    rows: usize,
    threads: u32,
    shared: u32,
}

thread_local! {
    /// Lives on the device thread, to its end.
    static KERNELS: RefCell<HashMap<Kind, Kernel>> = RefCell::default();
}

/// Causal attention of `q` `[windows, seq, heads, head_dim]` over `k` and `v` `[windows, seq, kv_heads,
/// head_dim]`: `[windows, seq, heads * head_dim]`, all f16 or all bf16.
///
/// Query head `h` reads key head `h / (heads / kv_heads)`. The head dimension is a multiple
/// of 16, at most 256. Needs compute capability 8.0.
///
/// # Errors
///
/// Other dtypes, shapes that do not fit, or a kernel that does not compile or launch.
pub fn causal_attention(
    q: Tensor<Cuda, 4>,
    k: Tensor<Cuda, 4>,
    v: Tensor<Cuda, 4>,
    scores: Scores,
) -> Result<Tensor<Cuda, 3>, Error> {
    let [windows, seq, heads, head_dim] = q.dims();
    let kv_heads = k.dims()[2];
    if k.dims() != [windows, seq, kv_heads, head_dim]
        || v.dims() != k.dims()
        || kv_heads == 0
        || !heads.is_multiple_of(kv_heads)
        || !head_dim.is_multiple_of(16)
        || !(16..=256).contains(&head_dim)
        // A grid's second and third dimension.
        || heads > 65_535
        || windows > 65_535
        || scores.window == Some(0)
    {
        return Err(Error::Shape {
            operation: NAME,
            reason: format!(
                "q {:?}, k {:?}, v {:?}, {scores:?}",
                q.dims(),
                k.dims(),
                v.dims()
            ),
        });
    }
    let q = buffer::half(NAME, "q", q)?;
    let dtype = q.dtype;
    let k = buffer::float(NAME, "k", k, dtype)?;
    let v = buffer::float(NAME, "v", v, dtype)?;
    let out = buffer::empty(&q, [windows, seq, heads * head_dim], dtype);
    if windows == 0 || seq == 0 {
        return Ok(buffer::into_float(out));
    }
    on_stream_later(&[&q, &k, &v, &out], move |libraries, pointers| {
        // A window that hides nothing is none.
        let window = scores.window.filter(|&window| window < seq);
        let kernel = kernel(Kind {
            device: libraries.device,
            head_dim,
            dtype,
            window: window.is_some(),
            softcap: scores.softcap.is_some(),
        })?;
        let mut pointers = [pointers[0], pointers[1], pointers[2], pointers[3]];
        let mut sizes = [seq as i32, heads as i32, kv_heads as i32];
        let plain = (head_dim as f32).sqrt().recip();
        let scale = scores.scale.map_or(plain, |scale| scale as f32);
        let cap = scores.softcap.map_or(scale, |cap| cap as f32);
        let mut scale_log2 = cap * LOG2_E;
        let mut sees = window.map(|window| window as i32);
        let mut cap_log2 = scores.softcap.map(|_| 2.0 * LOG2_E * scale / cap);
        let mut parameters = Vec::with_capacity(10);
        parameters.extend(pointers.iter_mut().map(|it| (&raw mut *it).cast()));
        parameters.extend(sizes.iter_mut().map(|it| (&raw mut *it).cast()));
        parameters.push((&raw mut scale_log2).cast());
        parameters.extend(sees.as_mut().map(|it| (&raw mut *it).cast()));
        parameters.extend(cap_log2.as_mut().map(|it| (&raw mut *it).cast()));
        let blocks = seq.div_ceil(kernel.rows) as u32;
        let size = Launch {
            blocks: (blocks, heads as u32, windows as u32),
            threads: kernel.threads,
            shared: kernel.shared,
        };
        // SAFETY: the parameters are those of the kernel's signature and outlive the call; the
        // buffers were checked to have the shapes that the sizes say.
        unsafe { launch(libraries, kernel.function, size, &mut parameters) }
    })?;
    Ok(buffer::into_float(out))
}

/// The kernel of a kind, compiled at first use. Runs on the device thread.
fn kernel(kind: Kind) -> Result<Kernel, Error> {
    if let Some(kernel) = KERNELS.with_borrow(|all| all.get(&kind).copied()) {
        return Ok(kernel);
    }
    let Kind {
        device,
        head_dim,
        dtype,
        ..
    } = kind;
    let limit = attribute(
        device,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    )?;
    // Two query tiles a warp halve the traffic from shared memory, 286 TFLOP/s against 213 on
    // an H100; past 128 columns their output does not fit the registers.
    let (warps, tiles) = if head_dim <= 128 { (4, 2) } else { (8, 1) };
    let rows = 16 * tiles * warps;
    let bytes = |keys: usize| (rows + 4 * keys) * (head_dim + 8) * 2;
    let keys = [64, 32, 16]
        .into_iter()
        .find(|&keys| bytes(keys) <= limit as usize)
        .unwrap_or(16);
    let macros = [
        ("HEAD_DIM", head_dim),
        ("WARPS", warps),
        ("TILES", tiles),
        ("KEYS", keys),
        ("BF16", usize::from(dtype == DType::BF16)),
        ("WINDOW", usize::from(kind.window)),
        ("SOFTCAP", usize::from(kind.softcap)),
    ];
    let window = if kind.window { "-window" } else { "" };
    let softcap = if kind.softcap { "-softcap" } else { "" };
    let file = format!("{NAME}-{head_dim}-{}{window}{softcap}.ptx", dtype.name());
    let function = function(SOURCE.load(device, &file, &macros)?, NAME)?;
    let shared = bytes(keys) as u32;
    // SAFETY: the function's module is never unloaded.
    unsafe {
        driver::function::set_function_attribute(
            function,
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            shared as i32,
        )
    }
    .map_err(refused("cuFuncSetAttribute"))?;
    let kernel = Kernel {
        function,
        rows,
        threads: 32 * warps as u32,
        shared,
    };
    KERNELS.with_borrow_mut(|all| all.insert(kind, kernel));
    Ok(kernel)
}
