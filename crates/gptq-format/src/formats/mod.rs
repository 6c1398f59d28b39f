//! Layouts of quantized linears in files: one file for each, behind one trait.
//!
//! A solver gives codes, scales, zero points and groups ([`PackedLinear`]) and knows no file; a format says which
//! tensors hold them, encodes and decodes these, and refuses what it cannot hold before any work is done.

mod compressed_tensors;
mod gptq;
mod mlx;
#[cfg(test)]
pub(crate) mod random_linear;

use std::borrow::Cow;
use std::fmt::Debug;
use std::path::Path;

use half::f16;
use safetensors::Dtype;
use serde_json::{Map, Value};

pub use compressed_tensors::CompressedTensors;
pub use gptq::AutoGptq;
pub use mlx::Mlx;

use crate::{
    Bits, CheckpointFormat, FormatError, GroupSize, LinearShape, LittleEndian, PackedLinear,
    QuantizeConfig, Refusal, TensorSpec, le_bytes,
};

/// A layout of quantized linears in files. What holds for a whole branch, such as how zero points are stored, is
/// part of the value; what may differ between linears is an argument.
pub trait OutputFormat: Debug + Send + Sync {
    /// Its name in settings and tables.
    fn name(&self) -> &'static str;

    /// Suffix of a tensor that every quantized linear layer of this format has, and no dense one.
    fn marker(&self) -> &'static str;

    /// The tensors of one linear, in the order in which they are listed and compared.
    fn parts(&self, linear: &LinearShape) -> Vec<PartSpec>;

    /// Returns true if files with these settings may lack a tensor, because the settings imply its content.
    fn may_lack(&self, _suffix: &str, _settings: &QuantizeConfig) -> bool {
        false
    }

    /// Inputs and outputs of the quantized linear `module` of `bits`, from its tensors' shapes.
    ///
    /// # Errors
    /// A tensor that is missing, or is not a matrix.
    fn features(
        &self,
        from: &dyn StoredTensors,
        module: &str,
        bits: Bits,
    ) -> Result<[usize; 2], FormatError>;

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
    /// format's own in `dir`. `modules` are all linear layers of the blocks.
    ///
    /// # Errors
    /// Settings that readers would not take; a file that cannot be written.
    fn write_settings(
        &self,
        settings: &QuantizeConfig,
        modules: &[ModuleSettings],
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

/// Returns the layout of linear layers in `format` with symmetric (`sym`) or asymmetric codes.
pub fn layout(format: CheckpointFormat, sym: bool) -> Box<dyn OutputFormat> {
    match format {
        CheckpointFormat::Gptq => Box::new(AutoGptq::V1),
        CheckpointFormat::GptqV2 => Box::new(AutoGptq::V2),
        CheckpointFormat::CompressedTensors => Box::new(CompressedTensors { sym }),
        CheckpointFormat::Mlx => Box::new(Mlx),
    }
}

/// A module's name, and its width and columns per group; `None` where it is left in full precision.
pub type ModuleSettings = (String, Option<(Bits, GroupSize)>);

/// The tensors of a checkpoint, as far as a format reads them.
pub trait StoredTensors {
    /// Quantization settings of the checkpoint; `None` if it is dense.
    fn settings(&self) -> Option<&QuantizeConfig>;

    /// Returns true if there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// The dimensions of a tensor that must be a matrix.
    ///
    /// # Errors
    /// No such tensor, or one of other than two dimensions.
    fn matrix(&self, name: &str) -> Result<[usize; 2], FormatError>;

    /// The words of an i32 tensor.
    ///
    /// # Errors
    /// No such tensor, or one of another shape or type.
    fn i32(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>, FormatError>;

    /// The words of a u32 tensor.
    ///
    /// # Errors
    /// No such tensor, or one of another shape or type.
    fn u32(&self, name: &str, shape: &[usize]) -> Result<Vec<u32>, FormatError>;

    /// The elements of an i64 tensor.
    ///
    /// # Errors
    /// No such tensor, or one of another shape or type.
    fn i64(&self, name: &str, shape: &[usize]) -> Result<Vec<i64>, FormatError>;

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

/// Both dimensions are whole runs of this many: then codes and zero points fill words at every width.
const RUN: usize = 32;

/// Checks that codes and zero points fill whole words.
fn whole_words(linear: &LinearShape) -> Result<(), Refusal> {
    match linear.in_features.is_multiple_of(RUN) && linear.out_features.is_multiple_of(RUN) {
        true => Ok(()),
        false => refuse("packing needs multiples of 32", "skip it with an override"),
    }
}

/// Checks that the columns of a group are neighbours and all groups are of one size, as the format called `name` needs.
fn contiguous(name: &str, linear: &LinearShape, grids: Grids) -> Result<(), Refusal> {
    let GroupSize::Columns(size) = linear.group_size else {
        return Ok(());
    };
    if grids.scattered {
        return refuse(
            &format!("{name} cannot hold act order with scattered groups"),
            "quantize with static_groups = true or desc_act = false",
        );
    }
    match linear.group_size.divides(linear.in_features) {
        true => Ok(()),
        false => refuse(
            &format!("{name} needs whole groups, and {size} does not divide its inputs"),
            "quantize it with another group_size",
        ),
    }
}

/// Checks that `g_idx` of `linear` is in order, for a format without one.
fn in_order(
    format: &dyn OutputFormat,
    module: &str,
    linear: &PackedLinear,
) -> Result<(), FormatError> {
    let groups = linear.groups();
    let columns = match groups {
        0 | 1 => linear.in_features,
        groups => linear.in_features / groups,
    };
    let shape = LinearShape {
        in_features: linear.in_features,
        out_features: linear.out_features,
        bits: linear.bits,
        group_size: match groups {
            0 | 1 => GroupSize::Row,
            _ => GroupSize::Columns(columns),
        },
    };
    let scattered = in_order_groups(linear.in_features, columns) != linear.g_idx;
    let sym = linear
        .zeros
        .iter()
        .all(|zero| *zero == linear.bits.symmetric_zero());
    must_fit(format, module, &shape, Grids { sym, scattered })
}

/// Checks that `format` can hold `module`.
fn must_fit(
    format: &dyn OutputFormat,
    module: &str,
    linear: &LinearShape,
    grids: Grids,
) -> Result<(), FormatError> {
    format
        .fits(linear, grids)
        .map_err(|refusal| FormatError::DoesNotFit {
            module: module.into(),
            refusal,
        })
}

/// A tensor of elements that were laid out for it.
fn laid_out<T: LittleEndian>(suffix: &'static str, values: &[T]) -> Encoded<'static> {
    Encoded {
        suffix,
        bytes: le_bytes(values).to_vec().into(),
    }
}

/// The group of each input where groups are in order.
fn in_order_groups(in_features: usize, columns: usize) -> Vec<i32> {
    (0..in_features)
        .map(|i| (i / columns.max(1)) as i32)
        .collect()
}

/// Number of codes that this many words hold.
fn unpacked(words: usize, bits: Bits) -> usize {
    words.saturating_mul(32) / bits.get()
}

/// Transposes `[rows, cols]`, a square of elements at a time, which is read and written in runs: dimensions are often powers
/// of two, and elements that far apart share a place in the cache.
pub(crate) fn transposed<T: Copy + Default>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    const SQUARE: usize = 32;
    let mut out = vec![T::default(); values.len()];
    let mut square = [[T::default(); SQUARE]; SQUARE];
    for top in (0..rows).step_by(SQUARE) {
        let height = SQUARE.min(rows - top);
        for left in (0..cols).step_by(SQUARE) {
            let width = SQUARE.min(cols - left);
            for (row, line) in (top..top + height).zip(&mut square) {
                let from = values.get(row * cols + left..row * cols + left + width);
                if let (Some(from), Some(line)) = (from, line.get_mut(..width)) {
                    line.copy_from_slice(from);
                }
            }
            for col in 0..width {
                let mut run = [T::default(); SQUARE];
                for (to, line) in run.iter_mut().zip(&square) {
                    *to = line.get(col).copied().unwrap_or_default();
                }
                let start = (left + col) * rows + top;
                let to = out.get_mut(start..start + height);
                if let (Some(to), Some(run)) = (to, run.get(..height)) {
                    to.copy_from_slice(run);
                }
            }
        }
    }
    out
}

fn part(suffix: &'static str, dtype: Dtype, shape: &[usize]) -> PartSpec {
    PartSpec {
        suffix,
        dtype,
        shape: shape.into(),
    }
}

fn refuse(reason: &str, remedy: &str) -> Result<(), Refusal> {
    Err(Refusal {
        reason: reason.to_owned(),
        remedy: remedy.to_owned(),
    })
}
