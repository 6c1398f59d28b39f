//! Compiled kernels kept from one run to the next.
//!
//! CubeCL can keep the PTX of its kernels in a file, under a hash of a kernel's name and its
//! compile-time arguments; neither the kernel's own code nor the device's architecture is in that
//! hash. So the file lies in a directory named after both: the executable's size and time, and the
//! compute capability.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::UNIX_EPOCH,
};

use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig, cache::CacheConfig};

use cudarc::driver::{result as driver, sys::CUdevice_attribute};

use super::{error::Error, library::device_count};

static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();

/// Keeps compiled kernels below `root`, in a directory of this executable's own; those of other
/// builds are removed. To be called before the first use of a device; later calls do nothing, and
/// without a call nothing is kept. A directory that cannot be written costs time, no more.
pub fn keep_kernels(root: &Path) {
    let (Some(build), Some(architecture)) = (build(), architecture()) else {
        return;
    };
    DIRECTORY.get_or_init(|| {
        let own = root.join(&build).join(architecture);
        for other in fs::read_dir(root).into_iter().flatten().flatten() {
            if other.file_name() != *build {
                // Another process may be at the same: what is gone is gone.
                let _ = fs::remove_dir_all(other.path());
            }
        }
        let mut config = CubeClRuntimeConfig::default();
        config.compilation.cache = Some(CacheConfig::File(own.clone()));
        CubeClRuntimeConfig::set(config);
        own
    });
}

/// This executable, as a directory's name.
fn build() -> Option<String> {
    let file = fs::metadata(std::env::current_exe().ok()?).ok()?;
    let time = file.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    let version = env!("CARGO_PKG_VERSION");
    Some(format!("{version}-{:x}-{:x}", file.len(), time.as_nanos()))
}

/// The compute capability of this machine's devices, where they have the same.
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

/// A device's compute capability.
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

/// An attribute of a device.
pub(crate) fn attribute(device: usize, which: CUdevice_attribute) -> Result<i32, Error> {
    let failed = |operation| move |source| Error::Driver { operation, source };
    let handle = driver::device::get(device as i32).map_err(failed("cuDeviceGet"))?;
    // SAFETY: the handle is that of a device.
    unsafe { driver::device::get_attribute(handle, which) }.map_err(failed("cuDeviceGetAttribute"))
}

/// The text kept under `name`, or else what `make` gives, which is kept.
pub(crate) fn kept(
    name: &str,
    make: impl FnOnce() -> Result<Vec<u8>, Error>,
) -> Result<Vec<u8>, Error> {
    let Some(directory) = DIRECTORY.get() else {
        return make();
    };
    let path = directory.join(name);
    if let Ok(found) = fs::read(&path) {
        return Ok(found);
    }
    let made = make()?;
    // Under its name only when it is whole; where that fails, the next run compiles again.
    let part = directory.join(format!("{name}.{}", std::process::id()));
    let _ = fs::create_dir_all(directory)
        .and_then(|()| fs::write(&part, &made))
        .and_then(|()| fs::rename(&part, &path));
    Ok(made)
}
