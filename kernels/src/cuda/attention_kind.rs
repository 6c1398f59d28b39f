//! Kinds of attention kernels, and what both take.

use burn::tensor::DType;
use cudarc::driver::{
    result as driver,
    sys::{CUfunction, CUfunction_attribute},
};

use super::{context::refused, error::Error};

/// Name of both kernels.
pub(super) const NAME: &str = "causal_attention";

/// Parameters that a kernel is compiled for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    pub(super) device: usize,
    pub(super) head_dim: usize,
    pub(super) dtype: DType,
    pub(super) window: bool,
    pub(super) softcap: bool,
}

impl Kind {
    /// Returns the name of its file among the kept kernels, after a prefix.
    pub(super) fn file(self, prefix: &str) -> String {
        let window = if self.window { "-window" } else { "" };
        let softcap = if self.softcap { "-softcap" } else { "" };
        let (head_dim, dtype) = (self.head_dim, self.dtype.name());
        format!("{prefix}-{head_dim}-{dtype}{window}{softcap}.ptx")
    }

    /// Macros of both sources.
    pub(super) fn macros(self) -> [(&'static str, usize); 4] {
        [
            ("HEAD_DIM", self.head_dim),
            ("BF16", usize::from(self.dtype == DType::BF16)),
            ("WINDOW", usize::from(self.window)),
            ("SOFTCAP", usize::from(self.softcap)),
        ]
    }
}

/// The sizes of a call.
#[derive(Clone, Copy)]
pub(super) struct AttentionSizes {
    pub(super) windows: usize,
    pub(super) seq: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
}

/// Settings of the scores as kernels take them: the factor of a score of which a power of 2 is taken, the number of keys a
/// row sees, and the factor within the softcap's tanh.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    pub(super) scale_log2: f32,
    pub(super) sees: Option<i32>,
    pub(super) cap_log2: Option<f32>,
}

/// Lets a kernel have so many bytes of dynamic shared memory.
pub(super) fn allow_shared(function: CUfunction, bytes: u32) -> Result<(), Error> {
    // SAFETY: the function's module is never unloaded.
    unsafe {
        driver::function::set_function_attribute(
            function,
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            bytes as i32,
        )
    }
    .map_err(refused("cuFuncSetAttribute"))
}
