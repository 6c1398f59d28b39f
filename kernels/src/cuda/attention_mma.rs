//! Causal attention by the matrix instructions of single warps, which every card from compute capability 8.0 has
//! (`attention_mma.cu`): Burn's CubeCL attention was measured at 18 TFLOP/s where this shape allows several hundred.

use std::{cell::RefCell, collections::HashMap};

use cudarc::driver::sys::{CUdevice_attribute, CUfunction};

use super::{
    attention_kind::{AttentionSizes, Kind, NAME, Scales, allow_shared},
    error::Error,
    kernel_cache::attribute,
    nvrtc::{CudaSource, Launch, function, launch},
    stream::Libraries,
};

const SOURCE: CudaSource = CudaSource {
    name: NAME,
    text: include_str!("attention_mma.cu"),
};

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

/// Launches the kernel; `pointers` are those of q, k, v and the output. Runs on the device thread.
pub(super) fn run(
    libraries: &Libraries,
    kind: Kind,
    mut pointers: [u64; 4],
    sizes: AttentionSizes,
    mut scales: Scales,
) -> Result<(), Error> {
    let kernel = kernel(kind)?;
    let mut numbers = [sizes.seq, sizes.heads, sizes.kv_heads].map(|size| size as i32);
    let mut parameters = Vec::with_capacity(10);
    parameters.extend(pointers.iter_mut().map(|it| (&raw mut *it).cast()));
    parameters.extend(numbers.iter_mut().map(|it| (&raw mut *it).cast()));
    parameters.push((&raw mut scales.scale_log2).cast());
    parameters.extend(scales.sees.as_mut().map(|it| (&raw mut *it).cast()));
    parameters.extend(scales.cap_log2.as_mut().map(|it| (&raw mut *it).cast()));
    let blocks = sizes.seq.div_ceil(kernel.rows) as u32;
    let size = Launch {
        blocks: (blocks, sizes.heads as u32, sizes.windows as u32),
        threads: kernel.threads,
        shared: kernel.shared,
    };
    // SAFETY: the parameters are those of the kernel's signature and outlive the call; the
    // caller has checked that the buffers have the shapes that the sizes say.
    unsafe { launch(libraries, kernel.function, size, &mut parameters) }
}

/// The kernel of a kind, compiled at first use.
fn kernel(kind: Kind) -> Result<Kernel, Error> {
    if let Some(kernel) = KERNELS.with_borrow(|all| all.get(&kind).copied()) {
        return Ok(kernel);
    }
    let Kind {
        device, head_dim, ..
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
    let own = [("WARPS", warps), ("TILES", tiles), ("KEYS", keys)];
    let macros = [&kind.macros()[..], &own].concat();
    let function = function(SOURCE.load(device, &kind.file(NAME), &macros)?, NAME)?;
    let shared = bytes(keys) as u32;
    allow_shared(function, shared)?;
    let kernel = Kernel {
        function,
        rows,
        threads: 32 * warps as u32,
        shared,
    };
    KERNELS.with_borrow_mut(|all| all.insert(kind, kernel));
    Ok(kernel)
}
