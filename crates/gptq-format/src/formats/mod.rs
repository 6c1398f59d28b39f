//! Layouts of quantized linears in files: one file for each, behind one trait.
//!
//! A solver gives codes, scales, zero points and groups ([`PackedLinear`]) and knows no file; a format says which
//! tensors hold them, encodes and decodes these, and refuses what it cannot hold before any work is done.

mod gptq;

use std::borrow::Cow;
use std::fmt::Debug;
use std::path::Path;

use half::f16;
use safetensors::Dtype;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{FormatError, LinearShape, PackedLinear, QuantizeConfig, TensorSpec};

/// A layout of quantized linears in files. What holds for a whole branch, such as how zero points are stored, is
/// part of the value; what may differ between linears is an argument.
pub trait OutputFormat: Debug + Send + Sync {
    /// Its name in settings and tables.
    fn name(&self) -> &'static str;

    /// The tensors of one linear, in the order in which they are listed and compared.
    fn parts(&self, linear: &LinearShape) -> Vec<PartSpec>;

    /// Returns true if files with these settings may lack a tensor, because the settings imply its content.
    fn may_lack(&self, _suffix: &str, _settings: &QuantizeConfig) -> bool {
        false
    }

    /// The name that a file gives one of a module's tensors.
    fn tensor_name(&self, module: &str, suffix: &str) -> String {
        format!("{module}.{suffix}")
    }

    /// Checks that the format can hold such a linear layer.
    ///
    /// # Errors
    /// It cannot, and what to do about it.
    fn fits(&self, linear: &LinearShape, grids: Grids) -> Result<(), Refusal>;

    /// The bytes of the tensors that [`OutputFormat::parts`] lists, in that order.
    ///
    /// # Errors
    /// Values that the format cannot hold.
    fn encode<'a>(
        &self,
        module: &str,
        linear: &'a PackedLinear,
    ) -> Result<Vec<Encoded<'a>>, FormatError>;

    /// Reads the linear `module` back, which is of shape and settings `linear`.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape or type, or does not decode.
    fn decode(
        &self,
        from: &dyn StoredTensors,
        module: &str,
        linear: &LinearShape,
    ) -> Result<PackedLinear, FormatError>;

    /// Tells readers how a branch is quantized: in `config`, the contents of `config.json`, and in files of the
    /// format's own in `dir`.
    ///
    /// # Errors
    /// Settings that readers would not take; a file that cannot be written.
    fn write_settings(
        &self,
        settings: &QuantizeConfig,
        config: &mut Map<String, Value>,
        dir: &Path,
    ) -> Result<(), FormatError>;

    /// The tensors of `module` by their names in files.
    fn tensors(&self, module: &str, linear: &LinearShape) -> Vec<TensorSpec> {
        let parts = self.parts(linear).into_iter();
        let named = |part: PartSpec| TensorSpec {
            name: self.tensor_name(module, part.suffix),
            dtype: part.dtype,
            shape: part.shape,
        };
        parts.map(named).collect()
    }

    /// Bits of a linear's tensors together.
    fn stored_bits(&self, linear: &LinearShape) -> u64 {
        let tensors = self.tensors("", linear);
        8 * tensors.iter().map(TensorSpec::bytes).sum::<usize>() as u64
    }
}

/// The tensors of a checkpoint, as far as a format reads them.
pub trait StoredTensors {
    /// Quantization settings of the checkpoint; `None` if it is dense.
    fn settings(&self) -> Option<&QuantizeConfig>;

    /// Returns true if there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// The words of an i32 tensor.
    ///
    /// # Errors
    /// No such tensor, or one of another shape or type.
    fn i32(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>, FormatError>;

    /// A floating-point tensor as f16, row-major.
    ///
    /// # Errors
    /// No such tensor, or one of another shape or type; values that f16 does not hold.
    fn f16(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>, FormatError>;
}

/// One of a quantized linear's tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct PartSpec {
    /// The last component of its name.
    pub suffix: &'static str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
}

/// A tensor's bytes as a file holds them.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded<'a> {
    /// The last component of its name.
    pub suffix: &'static str,
    /// Its elements, row-major and little-endian.
    pub bytes: Cow<'a, [u8]>,
}

/// The kind of codes that a branch has, as far as it is known before they are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grids {
    /// True if all zero points are in the middle of the code range.
    pub sym: bool,
    /// True if columns of a group may lie anywhere (act order without static groups).
    pub scattered: bool,
}

/// Reason that a format cannot hold a linear.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{reason}; {remedy}")]
pub struct Refusal {
    /// Rule that fails, if any.
    pub reason: String,
    /// Change to a recipe that avoids it.
    pub remedy: String,
}
