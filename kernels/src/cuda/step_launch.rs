//! Launches of a step: what each reads and writes, as the kernels of `step_*.cu` take it.
//!
//! Longer than most: the parameters of every kernel.

use std::{cell::RefCell, collections::HashMap, ffi::c_void, mem::zeroed};

use burn::tensor::DType;
use cudarc::driver::sys::{self, CUdevice_attribute, CUfunction, CUstream};

use super::{
    attention_kind::allow_shared,
    context::refused,
    error::Error,
    kernel_cache::{attribute, compute_capability},
    nvrtc::{CudaSource, function},
};

const PRODUCT: CudaSource = CudaSource {
    name: "product",
    text: concat!(
        include_str!("step_common.cu"),
        include_str!("step_product.cu")
    ),
};
const ATTEND: CudaSource = CudaSource {
    name: "attend",
    text: concat!(
        include_str!("step_common.cu"),
        include_str!("step_attend.cu")
    ),
};
const OTHER: CudaSource = CudaSource {
    name: "step",
    text: concat!(
        include_str!("step_common.cu"),
        include_str!("step_other.cu")
    ),
};

/// Warps of a block of a product, and of the other kernels.
const PRODUCT_WARPS: usize = 16;
const WARPS: usize = 8;
/// Rows of a tile of a product, and bytes of each that a warp takes at once.
const TILE: usize = 16;
const STEP_BYTES: usize = 128;
/// Bytes that a lane loads.
const LOAD: usize = 16;
/// Static shared memory of a kernel, at most, of products.
const STATIC_SHARED: usize = 1024;

/// A place in one of a program's buffers, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StepAt {
    pub(super) buffer: usize,
    pub(super) offset: u64,
}

impl StepAt {
    /// The start of a buffer.
    pub(super) fn start(buffer: usize) -> StepAt {
        StepAt { buffer, offset: 0 }
    }

    /// A place so many bytes later.
    pub(super) fn later(self, bytes: usize) -> StepAt {
        StepAt {
            offset: self.offset + bytes as u64,
            ..self
        }
    }

    fn pointer(self, pointers: &[u64]) -> u64 {
        pointers[self.buffer] + self.offset
    }
}

/// A norm, with its kind as the kernels number them.
#[derive(Clone, Copy)]
pub(super) struct NormAt {
    pub(super) weight: StepAt,
    pub(super) kind: i32,
    pub(super) eps: f32,
    pub(super) offset: f32,
}

/// Parameters that a product is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ProductKind {
    /// Bits of a weight; 16 if it is no code.
    pub(super) bits: usize,
    pub(super) columns: usize,
    /// Loads that share a scale; 0 if all of a row do.
    pub(super) per_group: usize,
    /// 0, or the activation of a gate.
    pub(super) paired: usize,
}

impl ProductKind {
    fn loads(self) -> usize {
        self.columns * self.bits / (8 * LOAD)
    }

    fn sharers(self) -> usize {
        let steps = (self.loads() * LOAD).div_ceil(STEP_BYTES);
        1 << steps.min(PRODUCT_WARPS).ilog2()
    }

    /// Bytes of shared memory of a block with so many tiles and steps asked for at once.
    fn shared(self, tiles: usize, depth: usize) -> usize {
        let loads = self.loads();
        let (inputs, cells) = match self.bits {
            16 => (0, 0),
            bits => {
                let cells = match self.per_group {
                    per if per > 0 && 8 % per != 0 && per % 8 != 0 => 8,
                    per @ 1..8 => 8 / per,
                    _ => 1,
                };
                (loads * ((128 / bits + 8) * 2 + 4), cells * TILE * 4)
            }
        };
        PRODUCT_WARPS * depth * (TILE * STEP_BYTES + cells)
            + self.columns * 2
            + inputs
            + tiles * TILE * (self.sharers() + 1) * 4
    }
}

/// One of a product's linears.
#[derive(Clone, Copy)]
pub(super) struct PartAt {
    pub(super) codes: StepAt,
    pub(super) grid: Option<StepAt>,
    pub(super) bias: Option<StepAt>,
    pub(super) out: StepAt,
    pub(super) rows: usize,
}

/// A launch.
pub(super) enum StepLaunch {
    Embed {
        table: StepAt,
        to: StepAt,
        hidden: usize,
        scale: f32,
    },
    /// `runs` norms of `n` features; with `add` to the residual stream.
    Normalize {
        from: StepAt,
        to: StepAt,
        runs: usize,
        n: usize,
        norm: NormAt,
        add: Option<f32>,
    },
    Product {
        kind: ProductKind,
        parts: Vec<PartAt>,
        order: Option<StepAt>,
        from: StepAt,
        residual: Option<StepAt>,
        norm: Option<NormAt>,
        scale: f32,
        cap: f32,
        logits: bool,
    },
    Attend {
        qkv: [StepAt; 3],
        table: Option<StepAt>,
        to: StepAt,
        heads: [usize; 2],
        dim: usize,
        /// Number of the cache.
        cache: usize,
        window: usize,
        scale: f32,
        cap: f32,
    },
    Gate {
        gate: StepAt,
        up: StepAt,
        to: StepAt,
        n: usize,
        gelu: bool,
    },
    Add {
        from: StepAt,
        residual: StepAt,
        n: usize,
        scale: f32,
    },
}

/// `Part` of `step_product.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PartParams {
    codes: u64,
    grid: u64,
    bias: u64,
    out: u64,
    rows: i32,
}

/// `Norm` of `step_common.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct NormParams {
    weight: u64,
    kind: i32,
    eps: f32,
    offset: f32,
}

/// `Product` of `step_product.cu`.
#[repr(C)]
#[derive(Default)]
struct ProductParams {
    parts: [PartParams; 3],
    order: u64,
    x: u64,
    residual: u64,
    norm: NormParams,
    scale: f32,
    cap: f32,
    tiles: i32,
    logits: i32,
}

/// `Attend` of `step_attend.cu`.
#[repr(C)]
struct AttendParams {
    q: u64,
    k: u64,
    v: u64,
    token: u64,
    table: u64,
    keys: u64,
    values: u64,
    out: u64,
    scratch: u64,
    ended: u64,
    heads: i32,
    kv_heads: i32,
    capacity: i32,
    splits: i32,
    window: i32,
    scale: f32,
    cap: f32,
}

/// The keys and values of a cache, and its rows for each head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheAt {
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) capacity: usize,
}

/// Parts of the keys that blocks attend to on their own.
pub(super) const SPLITS: usize = 8;

/// Buffers that every program has, by their places among its buffers.
pub(super) const INPUTS: usize = 0;
pub(super) const SCRATCH: usize = 1;
pub(super) const ENDED: usize = 2;

/// Kernels of one dtype on one device, launched on a stream.
pub(super) struct StepLauncher<'a> {
    pub(super) device: usize,
    pub(super) dtype: DType,
    pub(super) stream: CUstream,
    pub(super) pointers: &'a [u64],
    pub(super) caches: &'a [CacheAt],
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct KernelKey {
    device: usize,
    name: &'static str,
    file: String,
}

thread_local! {
    /// Lives on the device thread, to its end.
    static KERNELS: RefCell<HashMap<KernelKey, CUfunction>> = RefCell::default();
}

/// The largest dynamic shared memory of a block.
fn most_shared(device: usize) -> Result<usize, Error> {
    let most = attribute(
        device,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    )?;
    Ok(most as usize - STATIC_SHARED)
}

fn multiprocessors(device: usize) -> Result<usize, Error> {
    let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(attribute(device, count)? as usize)
}

/// Version of the driver from which graphs record launches that begin before the one before them has ended: CUDA 12.3.
const RECORDS_EARLY: i32 = 12_030;

fn driver_version() -> Result<i32, Error> {
    let mut version = 0;
    // SAFETY: the driver writes an integer.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(refused("cuDriverGetVersion"))?;
    Ok(version)
}

/// Steps that a warp of a product has asked for at once; `None` if a block has too little shared memory.
pub(super) fn depth(kind: ProductKind, device: usize) -> Result<Option<usize>, Error> {
    let most = most_shared(device)?;
    Ok([3, 2]
        .into_iter()
        .find(|&depth| kind.shared(1, depth) <= most))
}

impl StepLauncher<'_> {
    /// Compiles the kernel of a launch, or finds it. Runs on the device thread.
    pub(super) fn prepare(&self, launch: &StepLaunch) -> Result<(), Error> {
        match launch {
            StepLaunch::Product { kind, .. } => self.product(*kind).map(drop),
            StepLaunch::Attend { dim, .. } => self.attend(*dim).map(drop),
            StepLaunch::Embed { .. } => self.other("embed").map(drop),
            StepLaunch::Normalize { .. } => self.other("normalize").map(drop),
            StepLaunch::Gate { .. } => self.other("gate").map(drop),
            StepLaunch::Add { .. } => self.other("add").map(drop),
        }
    }

    fn kernel(
        &self,
        source: &CudaSource,
        name: &'static str,
        file: String,
        macros: &[(&str, usize)],
    ) -> Result<CUfunction, Error> {
        let key = KernelKey {
            device: self.device,
            name,
            file: format!("step_{file}-{}.ptx", self.dtype.name()),
        };
        if let Some(found) = KERNELS.with_borrow(|all| all.get(&key).copied()) {
            return Ok(found);
        }
        let bf16 = [("BF16", usize::from(self.dtype == DType::BF16))];
        let module = source.load(self.device, &key.file, &[macros, &bf16].concat())?;
        let found = function(module, name)?;
        KERNELS.with_borrow_mut(|all| all.insert(key, found));
        Ok(found)
    }

    fn product(&self, kind: ProductKind) -> Result<CUfunction, Error> {
        let ProductKind {
            bits,
            columns,
            per_group,
            paired,
        } = kind;
        let depth = depth(kind, self.device)?.expect("a program has products that fit");
        let macros = [
            ("BITS", bits),
            ("COLUMNS", columns),
            ("PER_GROUP", per_group),
            ("PAIRED", paired),
            ("DEPTH", depth),
            ("WARPS", PRODUCT_WARPS),
        ];
        let file = format!("product-{bits}-{columns}-{per_group}-{paired}");
        let found = self.kernel(&PRODUCT, "product", file, &macros)?;
        allow_shared(found, most_shared(self.device)? as u32)?;
        Ok(found)
    }

    fn attend(&self, dim: usize) -> Result<CUfunction, Error> {
        let macros = [("DIM", dim), ("WARPS", WARPS)];
        self.kernel(&ATTEND, "attend", format!("attend-{dim}"), &macros)
    }

    fn other(&self, name: &'static str) -> Result<CUfunction, Error> {
        self.kernel(&OTHER, name, "other".to_owned(), &[("WARPS", WARPS)])
    }

    fn pointer(&self, at: StepAt) -> u64 {
        at.pointer(self.pointers)
    }

    fn norm(&self, norm: NormAt) -> NormParams {
        NormParams {
            weight: self.pointer(norm.weight),
            kind: norm.kind,
            eps: norm.eps,
            offset: norm.offset,
        }
    }

    /// Launches the kernel. Runs on the device thread.
    pub(super) fn launch(&self, launch: &StepLaunch) -> Result<(), Error> {
        const THREADS: usize = 32 * WARPS;
        let blocks = |n: usize| (n.div_ceil(THREADS), 1);
        match launch {
            StepLaunch::Embed {
                table,
                to,
                hidden,
                scale,
            } => {
                let (mut table, mut token) = (self.pointer(*table), self.pointers[INPUTS]);
                let (mut to, mut n, mut scale) = (self.pointer(*to), *hidden as i32, *scale);
                let parameters = [
                    parameter(&mut table),
                    parameter(&mut token),
                    parameter(&mut to),
                    parameter(&mut n),
                    parameter(&mut scale),
                ];
                self.submit(self.other("embed")?, blocks(*hidden), WARPS, 0, parameters)
            }
            StepLaunch::Normalize {
                from,
                to,
                runs,
                n,
                norm,
                add,
            } => {
                let mut from = self.pointer(*from);
                let to = self.pointer(*to);
                let (mut out, mut residual) = match add {
                    None => (to, 0),
                    Some(_) => (0, to),
                };
                let (mut length, mut scale) = (*n as i32, add.unwrap_or(1.0));
                let mut norm = self.norm(*norm);
                let parameters = [
                    parameter(&mut from),
                    parameter(&mut out),
                    parameter(&mut residual),
                    parameter(&mut length),
                    parameter(&mut scale),
                    parameter(&mut norm),
                ];
                self.submit(
                    self.other("normalize")?,
                    (*runs, 1),
                    WARPS,
                    2 * n,
                    parameters,
                )
            }
            StepLaunch::Product {
                kind,
                parts,
                order,
                from,
                residual,
                norm,
                scale,
                cap,
                logits,
            } => {
                let rows = if kind.paired > 0 { TILE / 2 } else { TILE };
                let tiles = match kind.paired {
                    0 => parts.iter().map(|part| part.rows.div_ceil(rows)).sum(),
                    _ => parts[0].rows / rows,
                };
                let mut product = ProductParams {
                    order: order.map_or(0, |at| self.pointer(at)),
                    x: self.pointer(*from),
                    residual: residual.map_or(0, |at| self.pointer(at)),
                    norm: norm.map_or(NormParams::default(), |norm| self.norm(norm)),
                    scale: *scale,
                    cap: *cap,
                    tiles: tiles as i32,
                    logits: i32::from(*logits),
                    ..ProductParams::default()
                };
                for (to, part) in product.parts.iter_mut().zip(parts) {
                    *to = PartParams {
                        codes: self.pointer(part.codes),
                        grid: part.grid.map_or(0, |at| self.pointer(at)),
                        bias: part.bias.map_or(0, |at| self.pointer(at)),
                        out: self.pointer(part.out),
                        rows: part.rows as i32,
                    };
                }
                let function = self.product(*kind)?;
                let depth = depth(*kind, self.device)?.expect("a program has products that fit");
                let most = most_shared(self.device)?;
                // A block for each multiprocessor, unless it cannot hold the sums of its share of tiles.
                let mut blocks = tiles.min(multiprocessors(self.device)?);
                while kind.shared(tiles.div_ceil(blocks), depth) > most {
                    blocks *= 2;
                }
                let shared = kind.shared(tiles.div_ceil(blocks), depth);
                let parameters = [parameter(&mut product)];
                self.submit(function, (blocks, 1), PRODUCT_WARPS, shared, parameters)
            }
            StepLaunch::Attend {
                qkv,
                table,
                to,
                heads,
                dim,
                cache,
                window,
                scale,
                cap,
            } => {
                let [q, k, v] = qkv.map(|at| self.pointer(at));
                let cache = self.caches[*cache];
                let mut attend = AttendParams {
                    q,
                    k,
                    v,
                    token: self.pointers[INPUTS],
                    table: table.map_or(0, |at| self.pointer(at)),
                    keys: cache.keys,
                    values: cache.values,
                    out: self.pointer(*to),
                    scratch: self.pointers[SCRATCH],
                    ended: self.pointers[ENDED],
                    heads: heads[0] as i32,
                    kv_heads: heads[1] as i32,
                    capacity: cache.capacity as i32,
                    splits: SPLITS as i32,
                    window: *window as i32,
                    scale: *scale,
                    cap: *cap,
                };
                let parameters = [parameter(&mut attend)];
                self.submit(self.attend(*dim)?, (heads[0], SPLITS), WARPS, 0, parameters)
            }
            StepLaunch::Gate {
                gate,
                up,
                to,
                n,
                gelu,
            } => {
                let [mut gate, mut up, mut to] = [*gate, *up, *to].map(|at| self.pointer(at));
                let (mut length, mut kind) = (*n as i32, if *gelu { 2_i32 } else { 1 });
                let parameters = [
                    parameter(&mut gate),
                    parameter(&mut up),
                    parameter(&mut to),
                    parameter(&mut length),
                    parameter(&mut kind),
                ];
                self.submit(self.other("gate")?, blocks(*n), WARPS, 0, parameters)
            }
            StepLaunch::Add {
                from,
                residual,
                n,
                scale,
            } => {
                let [mut from, mut residual] = [*from, *residual].map(|at| self.pointer(at));
                let (mut length, mut scale) = (*n as i32, *scale);
                let parameters = [
                    parameter(&mut from),
                    parameter(&mut residual),
                    parameter(&mut length),
                    parameter(&mut scale),
                ];
                self.submit(self.other("add")?, blocks(*n), WARPS, 0, parameters)
            }
        }
    }

    /// Submits a kernel that may begin while the one before it ends, on cards that can.
    fn submit<const N: usize>(
        &self,
        function: CUfunction,
        (x, y): (usize, usize),
        warps: usize,
        shared: usize,
        mut parameters: [*mut c_void; N],
    ) -> Result<(), Error> {
        // SAFETY: zeros are a valid attribute, one that is ignored.
        let mut attribute: sys::CUlaunchAttribute = unsafe { zeroed() };
        attribute.id =
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let early = compute_capability(self.device)?.0 >= 9 && driver_version()? >= RECORDS_EARLY;
        let config = sys::CUlaunchConfig {
            gridDimX: x as u32,
            gridDimY: y as u32,
            gridDimZ: 1,
            blockDimX: 32 * warps as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(early),
        };
        // SAFETY: the parameters are those of the kernel's signature, which the driver copies before it returns; the
        // program's buffers have the sizes that they say, and live as long as it.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(refused("cuLaunchKernelEx"))
    }
}

fn parameter<T>(value: &mut T) -> *mut c_void {
    (&raw mut *value).cast()
}
