//! Cache of compiled kernels between runs.
//!
//! CubeCL can cache the PTX of its kernels in files, under a hash of a kernel's name and its
//! compile-time arguments; the hash includes neither the kernel's code nor the device's
//! architecture. So the files are in a directory named after both: the executable's size and time,
//! and the compute capability. Neither CubeCL nor this crate's own kernels verify what they read
//! back; they use the directory of a [`KernelStore`], which does.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, UNIX_EPOCH},
};

use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig, cache::CacheConfig};

use cudarc::driver::{result as driver, sys::CUdevice_attribute};

use super::{error::Error, kernel_store, kernel_store::KernelStore, library::device_count};

/// Time after which the kernels of an unused build are removed.
const EXPIRY: Duration = Duration::from_secs(30 * 86_400);

static ROOT: OnceLock<PathBuf> = OnceLock::new();
static STORE: OnceLock<Option<KernelStore>> = OnceLock::new();

/// Caches compiled kernels below `root`, in a directory for this executable; those of builds unused
/// for a month are removed. This call only stores the path: the driver is loaded and files are
/// accessed when [`Device::run`](crate::Device::run) first runs on a CUDA device. Later calls have
/// no effect, and without a call nothing is cached. A directory that cannot be written to only
/// costs time.
pub fn keep_kernels(root: PathBuf) {
    let _ = ROOT.set(root);
}

/// Loads the cached kernels, once, before the first use of a device.
pub(crate) fn open() {
    STORE.get_or_init(|| {
        let build = ROOT.get()?.join(build()?);
        kernel_store::expire(&build, EXPIRY);
        let store = KernelStore::open(&build.join(architecture()?)).ok()?;
        let mut config = CubeClRuntimeConfig::default();
        config.compilation.cache = Some(CacheConfig::File(store.directory().to_owned()));
        CubeClRuntimeConfig::set(config);
        Some(store)
    });
}

/// Saves the kernels compiled since.
pub(crate) fn seal() {
    if let Some(Some(store)) = STORE.get() {
        let _ = store.seal();
    }
}

/// Returns a directory name for this executable.
fn build() -> Option<String> {
    let file = fs::metadata(std::env::current_exe().ok()?).ok()?;
    let time = file.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    let version = env!("CARGO_PKG_VERSION");
    Some(format!("{version}-{:x}-{:x}", file.len(), time.as_nanos()))
}

/// Returns the compute capability of this machine's devices, if they are all the same.
fn architecture() -> Option<String> {
    let all: BTreeSet<_> = (0..device_count().ok()?)
        .map(compute_capability)
        .collect::<Result<_, _>>()
        .ok()?;
    match Vec::from_iter(all)[..] {
        [(major, minor)] => Some(format!("sm_{major}{minor}")),
        _ => None,
    }
}

/// Returns a device's compute capability.
pub(crate) fn compute_capability(device: usize) -> Result<(i32, i32), Error> {
    use CUdevice_attribute as Attribute;
    Ok((
        attribute(
            device,
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        )?,
        attribute(
            device,
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )?,
    ))
}

/// Returns an attribute of a device.
pub(crate) fn attribute(device: usize, which: CUdevice_attribute) -> Result<i32, Error> {
    let failed = |operation| move |source| Error::Driver { operation, source };
    let handle = driver::device::get(device as i32).map_err(failed("cuDeviceGet"))?;
    // SAFETY: the handle is that of a device.
    unsafe { driver::device::get_attribute(handle, which) }.map_err(failed("cuDeviceGetAttribute"))
}

/// Returns the text cached under `name`; if missing, calls `make` and caches the result.
pub(crate) fn kept(
    name: &str,
    make: impl FnOnce() -> Result<Vec<u8>, Error>,
) -> Result<Vec<u8>, Error> {
    let Some(Some(store)) = STORE.get() else {
        return make();
    };
    // Ranks of one process need the same kernels at the same time: one makes each, and the others read it when it is whole.
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = store.directory().join(name);
    if let Ok(found) = fs::read(&path) {
        return Ok(found);
    }
    let made = make()?;
    // If that fails, the next run compiles again.
    let _ = fs::write(&path, &made);
    Ok(made)
}
