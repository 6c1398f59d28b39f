//! NCCL's functions, loaded at run time.
//!
//! cudarc has them too, but looks for `libnccl.so`, which belongs to packages for development; those for use have
//! `libnccl.so.2` alone. Results are numbers here, since a later version may have some that this one does not know.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use super::library::MissingLibrary;

/// Names of the library, in the order they are tried.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// NCCL's `ncclUint8`.
pub(crate) const BYTES: c_int = 1;
/// NCCL's `ncclSuccess`.
pub(crate) const SUCCESS: c_int = 0;
/// NCCL's `ncclInProgress`.
pub(crate) const IN_PROGRESS: c_int = 7;

/// A communicator.
pub(crate) type Comm = *mut c_void;

/// The number that all ranks of a communicator are given.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; 128]);

/// Settings of a communicator, as in version 2.18; what later versions add has its default.
#[repr(C)]
pub(crate) struct CommConfig {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl CommConfig {
    /// Settings of a communicator whose calls do not block.
    pub(crate) fn new() -> Self {
        // `NCCL_CONFIG_UNDEF_INT`.
        let default = c_int::MIN;
        CommConfig {
            size: size_of::<CommConfig>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking: 0,
            cga_cluster_size: default,
            min_ctas: default,
            max_ctas: default,
            net_name: std::ptr::null(),
            split_share: default,
        }
    }
}

type OfComm = unsafe extern "C" fn(Comm) -> c_int;
type Plain = unsafe extern "C" fn() -> c_int;
type InitRank = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut CommConfig) -> c_int;
type SendFn = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
type ReceiveFn = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;

/// The functions that are used. Their names are NCCL's, without `nccl`.
pub(crate) struct Nccl {
    pub(crate) get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub(crate) comm_init_rank_config: InitRank,
    pub(crate) comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    pub(crate) comm_finalize: OfComm,
    pub(crate) comm_destroy: OfComm,
    pub(crate) comm_abort: OfComm,
    pub(crate) group_start: Plain,
    pub(crate) group_end: Plain,
    pub(crate) send: SendFn,
    pub(crate) recv: ReceiveFn,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
}

impl Nccl {
    /// Returns the library's functions.
    ///
    /// # Errors
    /// It is not installed, or older than version 2.18.
    pub(crate) fn get() -> Result<&'static Nccl, MissingLibrary> {
        static NCCL: OnceLock<Option<Nccl>> = OnceLock::new();
        let missing = MissingLibrary {
            library: "libnccl.so.2",
            package: "NCCL 2.18 or later (Debian, NVIDIA: libnccl2; PyPI: nvidia-nccl-cu13 or -cu12, whose directory \
                      LD_LIBRARY_PATH is to name)",
        };
        NCCL.get_or_init(Nccl::open).as_ref().ok_or(missing)
    }

    fn open() -> Option<Nccl> {
        // SAFETY: the library's initialisers have no preconditions.
        let library = NAMES
            .iter()
            .find_map(|name| unsafe { Library::new(*name) }.ok())?;
        // Never closed, as its functions are kept.
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: the types are those of NCCL's header, which has not changed them since version 2.18.
        let nccl = unsafe {
            Nccl {
                get_unique_id: *library.get("ncclGetUniqueId").ok()?,
                comm_init_rank_config: *library.get("ncclCommInitRankConfig").ok()?,
                comm_get_async_error: *library.get("ncclCommGetAsyncError").ok()?,
                comm_finalize: *library.get("ncclCommFinalize").ok()?,
                comm_destroy: *library.get("ncclCommDestroy").ok()?,
                comm_abort: *library.get("ncclCommAbort").ok()?,
                group_start: *library.get("ncclGroupStart").ok()?,
                group_end: *library.get("ncclGroupEnd").ok()?,
                send: *library.get("ncclSend").ok()?,
                recv: *library.get("ncclRecv").ok()?,
                get_error_string: *library.get("ncclGetErrorString").ok()?,
                get_last_error: *library.get("ncclGetLastError").ok()?,
                get_version: *library.get("ncclGetVersion").ok()?,
            }
        };
        let mut version = 0;
        // SAFETY: the library fills the number in.
        let told = unsafe { (nccl.get_version)(&raw mut version) };
        (told == SUCCESS && version >= 21_800).then_some(nccl)
    }

    /// Describes a result that is none of success, in one line.
    pub(crate) fn describe(&self, operation: &str, result: c_int, comm: Comm) -> String {
        // SAFETY: both give texts that end with zero, or nothing; a null communicator stands for none.
        let texts = unsafe { [(self.get_error_string)(result), (self.get_last_error)(comm)] };
        let texts = texts.map(|text| match text.is_null() {
            true => String::new(),
            // SAFETY: see above.
            false => unsafe { CStr::from_ptr(text) }
                .to_string_lossy()
                .into_owned(),
        });
        let [kind, last] = texts.map(|it| it.lines().next().unwrap_or_default().trim().to_owned());
        match last.is_empty() {
            true => format!("{operation}: NCCL: {kind}"),
            false => format!("{operation}: NCCL: {kind} ({last})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_its_package() {
        match Nccl::get() {
            Ok(nccl) => {
                let line = nccl.describe("ncclSend", 4, std::ptr::null_mut());
                assert!(line.starts_with("ncclSend: NCCL: "), "{line}");
            }
            Err(missing) => {
                println!("skipped: no NCCL");
                let line = missing.to_string();
                assert!(
                    line.starts_with("libnccl.so.2 is missing: install NCCL")
                        && line.contains("libnccl2"),
                    "{line}"
                );
            }
        }
    }
}
