//! Causal attention by Hopper's warp-group matrix instructions and bulk copies (`attention_wgmma.cu`).

use std::{cell::RefCell, collections::HashMap, mem::MaybeUninit};

use burn::tensor::DType;
use cudarc::driver::{
    result as driver,
    sys::{
        self, CUdevice_attribute, CUfunction, CUtensorMap, CUtensorMapDataType,
        CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion, CUtensorMapSwizzle,
    },
};

use super::{
    attention_kind::{AttentionSizes, Kind, NAME, Scales, allow_shared},
    context::refused,
    error::Error,
    kernel_cache::attribute,
    nvrtc::{CudaSource, Launch, function, launch},
    stream::Libraries,
};

const SOURCE: CudaSource = CudaSource {
    name: NAME,
    text: include_str!("attention_wgmma.cu"),
};

/// Prefix of the files of kept kernels.
const FILE: &str = "causal_attention_wgmma";

/// Query rows of a tile, half of them for each of two warp groups.
const ROWS: usize = 128;
const THREADS: u32 = 384;
/// Tiles of keys, and of values, in shared memory.
const STAGES: usize = 2;
/// Columns of a part of a tile: 128 bytes, the widest row that the copy engine swizzles.
const PART: usize = 64;
/// Bytes of keys and values of heads that are walked over together: they should stay in the L2 cache, of 50 MB on an
/// H100 or H200.
const CACHED: usize = 16 << 20;

/// Returns true if the kernel takes heads of this dimension without computing twice what is needed.
pub(super) fn takes(head_dim: usize) -> bool {
    (PART..=128).contains(&head_dim) || (208..=256).contains(&head_dim)
}

/// A compiled kernel and its shape.
#[derive(Clone, Copy)]
struct Kernel {
    function: CUfunction,
    keys: usize,
    shared: u32,
    multiprocessors: usize,
}

thread_local! {
    /// Lives on the device thread, to its end.
    static KERNELS: RefCell<HashMap<Kind, Kernel>> = RefCell::default();
}

/// Launches the kernel; `pointers` are those of q, k, v and the output, `counter` that of an i32. Runs on the device
/// thread.
pub(super) fn run(
    libraries: &Libraries,
    kind: Kind,
    pointers: [u64; 4],
    mut counter: u64,
    sizes: AttentionSizes,
    mut scales: Scales,
) -> Result<(), Error> {
    let kernel = kernel(kind)?;
    let AttentionSizes {
        windows,
        seq,
        heads,
        kv_heads,
    } = sizes;
    let [q, k, v, mut out] = pointers;
    let mut maps = [
        map(q, kind, [windows, seq, heads], ROWS)?,
        map(k, kind, [windows, seq, kv_heads], kernel.keys)?,
        map(v, kind, [windows, seq, kv_heads], kernel.keys)?,
    ];
    let head_bytes = 2 * seq * kind.head_dim * 2;
    let together = (CACHED / head_bytes).max(1) * (heads / kv_heads);
    let mut numbers = [seq, heads, kv_heads, windows, together].map(|it| it as i32);
    let tiles = seq.div_ceil(ROWS) * heads * windows;
    // SAFETY: the buffer of the counter has four bytes.
    unsafe { driver::memset_d8_async(counter, 0, 4, libraries.stream) }
        .map_err(refused("cuMemsetD8Async"))?;

    let mut parameters = Vec::with_capacity(13);
    parameters.extend(maps.iter_mut().map(|it| (&raw mut *it).cast()));
    parameters.push((&raw mut out).cast());
    parameters.push((&raw mut counter).cast());
    parameters.extend(numbers.iter_mut().map(|it| (&raw mut *it).cast()));
    parameters.push((&raw mut scales.scale_log2).cast());
    parameters.extend(scales.sees.as_mut().map(|it| (&raw mut *it).cast()));
    parameters.extend(scales.cap_log2.as_mut().map(|it| (&raw mut *it).cast()));
    let size = Launch {
        blocks: (tiles.min(kernel.multiprocessors) as u32, 1, 1),
        threads: THREADS,
        shared: kernel.shared,
    };
    // SAFETY: the parameters are those of the kernel's signature and outlive the call; the
    // caller has checked that the buffers have the shapes that the sizes say.
    unsafe { launch(libraries, kernel.function, size, &mut parameters) }
}

/// Describes a tensor `[windows, seq, heads, head_dim]` to the copy engine, which takes boxes of `rows` positions of one
/// head, [`PART`] columns each.
fn map(
    pointer: u64,
    kind: Kind,
    [windows, seq, heads]: [usize; 3],
    rows: usize,
) -> Result<CUtensorMap, Error> {
    let row = 2 * kind.head_dim as u64;
    let dims = [kind.head_dim, heads, seq, windows].map(|it| it as u64);
    let strides = [row, row * dims[1], row * dims[1] * dims[2]];
    let sides = [PART as u32, 1, rows as u32, 1];
    let steps = [1; 4];
    let dtype = match kind.dtype {
        DType::BF16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    };
    let mut map = MaybeUninit::uninit();
    // SAFETY: the arrays have as many elements as the rank says; the driver writes the whole map, or fails.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            dtype,
            dims.len() as u32,
            pointer as *mut _,
            dims.as_ptr(),
            strides.as_ptr(),
            sides.as_ptr(),
            steps.as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        .result()
        .map_err(refused("cuTensorMapEncodeTiled"))?;
        Ok(map.assume_init())
    }
}

/// The kernel of a kind, compiled at first use.
fn kernel(kind: Kind) -> Result<Kernel, Error> {
    if let Some(kernel) = KERNELS.with_borrow(|all| all.get(&kind).copied()) {
        return Ok(kernel);
    }
    let columns = match kind.head_dim {
        ..=64 => 64,
        65..=128 => 128,
        _ => 256,
    };
    // What fits the registers, and shared memory: with two tiles of queries the next is fetched while one is worked on.
    let (keys, queries) = if columns == 256 { (64, 1) } else { (128, 2) };
    let own = [
        ("COLUMNS", columns),
        ("KEYS", keys),
        ("QUERIES", queries),
        ("STAGES", STAGES),
    ];
    let macros = [&kind.macros()[..], &own].concat();
    let module = SOURCE.load_for("90a", &kind.file(FILE), &macros)?;
    let function = function(module, NAME)?;
    // A tile begins at a multiple of 1024 bytes.
    let shared = 1024 + 2 * columns * (queries * ROWS + 2 * STAGES * keys);
    allow_shared(function, shared as u32)?;
    let kernel = Kernel {
        function,
        keys,
        shared: shared as u32,
        multiprocessors: attribute(
            kind.device,
            CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )? as usize,
    };
    KERNELS.with_borrow_mut(|all| all.insert(kind, kernel));
    Ok(kernel)
}
