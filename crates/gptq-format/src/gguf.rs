//! GGUF version 3, the container of llama.cpp: metadata and tensors in one file.
//!
//! `"GGUF"`, u32 version, u64 number of tensors, u64 number of metadata entries; then the entries: a key, a u32 type and
//! a value; then for each tensor its name, u32 number of dimensions, these as u64 with the fastest first, a u32 type and
//! a u64 offset into the data, which begins at the next multiple of `general.alignment` (32 where it is not given).
//! Strings are a u64 length and UTF-8, arrays a u32 type, a u64 length and the values. All little-endian. Source: GGUF's
//! specification, in llama.cpp's ggml (`docs/gguf.md`).

mod blocks;
mod reader;
mod writer;

use half::f16;

pub use blocks::{GgufRows, decode_blocks, encode_blocks, q8_0};
pub use reader::GgufFile;
pub use writer::GgufWriter;

use crate::{Bits, GroupSize, LinearShape, Refusal};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Key of the alignment of tensors.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Alignment where the key is missing.
const ALIGNMENT: u64 = 32;
/// Elements of a block of quantized types.
const BLOCK: usize = 32;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the names are the types")]
pub enum GgufValue {
    U32(u32),
    I32(i32),
    F32(f32),
    U64(u64),
    Bool(bool),
    Text(String),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
    /// A value of a type that nothing here needs: its type, and its bytes.
    Other(u32, Vec<u8>),
}

impl GgufValue {
    /// Returns the number of its type.
    fn kind(&self) -> u32 {
        match self {
            GgufValue::U32(_) => 4,
            GgufValue::I32(_) => 5,
            GgufValue::F32(_) => 6,
            GgufValue::U64(_) => 10,
            GgufValue::Bool(_) => 7,
            GgufValue::Text(_) => 8,
            GgufValue::U32s(_)
            | GgufValue::I32s(_)
            | GgufValue::F32s(_)
            | GgufValue::Bools(_)
            | GgufValue::Texts(_) => 9,
            GgufValue::Other(kind, _) => *kind,
        }
    }
}

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the types")]
pub enum GgufType {
    F32,
    F16,
    Bf16,
    /// `(q - 8) d` of 4-bit `q`.
    Q4_0,
    /// `(q - 16) d` of 5-bit `q`.
    Q5_0,
    /// `q d` of signed 8-bit `q`.
    Q8_0,
}

impl GgufType {
    const ALL: [(GgufType, u32, &'static str); 6] = [
        (GgufType::F32, 0, "F32"),
        (GgufType::F16, 1, "F16"),
        (GgufType::Bf16, 30, "BF16"),
        (GgufType::Q4_0, 2, "Q4_0"),
        (GgufType::Q5_0, 6, "Q5_0"),
        (GgufType::Q8_0, 8, "Q8_0"),
    ];

    fn entry(self) -> (GgufType, u32, &'static str) {
        let mut all = GgufType::ALL.into_iter();
        all.find(|entry| entry.0 == self)
            .unwrap_or((self, u32::MAX, ""))
    }

    /// Returns the number in files.
    pub fn id(self) -> u32 {
        self.entry().1
    }

    /// Returns the name.
    pub fn name(self) -> &'static str {
        self.entry().2
    }

    /// Returns the type of this number.
    pub fn from_id(id: u32) -> Option<GgufType> {
        let mut all = GgufType::ALL.into_iter();
        all.find(|entry| entry.1 == id).map(|entry| entry.0)
    }

    /// Returns the elements and the bytes of a block.
    pub fn block(self) -> (usize, usize) {
        let scale = size_of::<f16>();
        match self {
            GgufType::F32 => (1, 4),
            GgufType::F16 | GgufType::Bf16 => (1, 2),
            GgufType::Q4_0 => (BLOCK, scale + BLOCK / 2),
            GgufType::Q5_0 => (BLOCK, scale + BLOCK / 8 + BLOCK / 2),
            GgufType::Q8_0 => (BLOCK, scale + BLOCK),
        }
    }

    /// Returns the type that holds such a linear layer without loss: codes less their zero points, and the group's scale
    /// for each block.
    ///
    /// # Errors
    /// There is none, and what to do about it.
    pub fn of_linear(
        linear: &LinearShape,
        sym: bool,
        scattered: bool,
    ) -> Result<GgufType, Refusal> {
        let refuse = |reason: &str, remedy: &str| {
            Err(Refusal {
                reason: reason.to_owned(),
                remedy: remedy.to_owned(),
            })
        };
        if let GroupSize::Columns(size) = linear.group_size {
            if scattered {
                return refuse(
                    "gguf cannot hold act order with scattered groups",
                    "quantize with static_groups = true or desc_act = false",
                );
            }
            if !size.is_multiple_of(BLOCK) {
                return refuse(
                    &format!(
                        "gguf has blocks of {BLOCK} inputs, and groups of {size} do not split into them"
                    ),
                    "quantize with a group_size that is a multiple of 32",
                );
            }
        }
        if !linear.in_features.is_multiple_of(BLOCK) {
            return refuse(
                "gguf needs inputs in multiples of 32",
                "skip it with an override",
            );
        }
        match (linear.bits, sym) {
            // Differences of codes and zero points are within -8 and 7.
            (Bits::Two | Bits::Three, _) | (Bits::Four, true) => Ok(GgufType::Q4_0),
            (Bits::Four, false) => Ok(GgufType::Q5_0),
            (Bits::Eight, true) => Ok(GgufType::Q8_0),
            (Bits::Eight, false) => refuse(
                "gguf has no type for asymmetric codes of 8 bits",
                "quantize with sym = true, or at 4 bits",
            ),
        }
    }
}

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufTensor {
    /// Name.
    pub name: String,
    /// Element type.
    pub kind: GgufType,
    /// Dimensions, the slowest first, as elsewhere in this crate; files have them the other way round.
    pub shape: Vec<usize>,
}

impl GgufTensor {
    /// Returns its size in bytes; `None` where it is too large to be counted, or a row is no whole number of blocks.
    pub fn bytes(&self) -> Option<usize> {
        let (elements, bytes) = self.kind.block();
        let row = self.shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(elements) {
            return None;
        }
        let mut all = self.shape.iter();
        let all = all.try_fold(1usize, |product, n| product.checked_mul(*n))?;
        (all / elements).checked_mul(bytes)
    }
}

#[cfg(test)]
mod tests;
