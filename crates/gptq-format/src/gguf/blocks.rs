//! Blocks of 32 elements along the inputs, each with an f16 scale `d`.
//!
//! Q4_0: `d`, then 16 bytes with element `j` in the low half of byte `j` and `j + 16` in the high. Q5_0: `d`, a u32 with
//! the fifth bit of element `j` at bit `j`, then the same 16 bytes. Q8_0: `d`, then 32 signed bytes. A group of more than
//! 32 columns repeats its scale.

use half::f16;

use super::{BLOCK, GgufType};
use crate::formats::transposed;
use crate::{Bits, FormatError, PackedLinear, QuantizedLinear, unpack_across};

/// Order of a matrix's rows in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufRows {
    /// The order of the checkpoint.
    Same,
    /// llama.cpp rotates neighbouring rows of a head, checkpoints one of either half of it: row `2 i + j` of a head is
    /// row `j * half + i` of the checkpoint's. The number is that of heads.
    Paired(usize),
}

impl GgufRows {
    /// Returns the checkpoint's row for each of a file's `rows`.
    pub fn sources(self, rows: usize) -> Vec<usize> {
        match self {
            GgufRows::Same => (0..rows).collect(),
            GgufRows::Paired(heads) => {
                let head = (rows / heads.max(1)).max(1);
                let source = |row: usize| {
                    let (first, within) = (row / head * head, row % head);
                    first + within % 2 * (head / 2) + within / 2
                };
                (0..rows).map(source).collect()
            }
        }
    }
}

/// Encodes a linear as blocks of `kind`, row by row of the outputs in the order of `rows`.
///
/// # Errors
/// A code that `kind` cannot hold: settings and zero points disagree.
pub fn encode_blocks(
    linear: &PackedLinear,
    kind: GgufType,
    rows: GgufRows,
    module: &str,
) -> Result<Vec<u8>, FormatError> {
    let (n_in, n_out, bits) = (linear.in_features, linear.out_features, linear.bits);
    let words = n_in * bits.get() / 32;
    let packed = transposed(&linear.codes, words, n_out);
    let (middle, beyond) = (middle(kind), !limit(kind));
    // Codes that a block has as they are.
    let own = matches!(
        (kind, bits),
        (GgufType::Q4_0, Bits::Four) | (GgufType::Q8_0, Bits::Eight)
    );
    let own = own && linear.zeros.iter().all(|zero| i32::from(*zero) == middle);
    let columns = n_in / linear.groups().max(1);
    let mut out = Vec::with_capacity(n_in / BLOCK * n_out * kind.block().1);
    let mut codes = vec![0u8; n_in];
    let mut spilled = 0;
    for row in rows.sources(n_out) {
        let row_words = packed.get(row * words..(row + 1) * words);
        let row_words = row_words.unwrap_or_default();
        if own {
            let blocks = row_words.chunks_exact(BLOCK * bits.get() / 32).enumerate();
            for (block, words) in blocks {
                let group = block * BLOCK / columns.max(1) * n_out + row;
                let scale = linear.scales.get(group).copied().unwrap_or_default();
                out.extend_from_slice(&scale.to_le_bytes());
                match words {
                    [a, b, c, d] => {
                        for (low, high) in [(a, c), (b, d)] {
                            let bytes = spread(*low) | spread(*high) << 4;
                            out.extend_from_slice(&bytes.to_le_bytes());
                        }
                    }
                    bytes => {
                        // From codes to signed numbers.
                        let signed = |word: &u32| (word ^ 0x8080_8080).to_le_bytes();
                        out.extend(bytes.iter().flat_map(signed));
                    }
                }
            }
            continue;
        }
        unpack_row(row_words, bits, &mut codes);
        for (block, codes) in codes.as_chunks::<BLOCK>().0.iter().enumerate() {
            let group = block * BLOCK / columns.max(1) * n_out + row;
            let scale = linear.scales.get(group).copied().unwrap_or_default();
            let zero = i32::from(linear.zeros.get(group).copied().unwrap_or_default());
            let mut q = [0u8; BLOCK];
            for (q, code) in q.iter_mut().zip(codes) {
                let value = i32::from(*code) - zero + middle;
                spilled |= value & beyond;
                *q = value as u8;
            }
            out.extend_from_slice(&scale.to_le_bytes());
            put(&mut out, kind, &q);
        }
    }
    match spilled {
        0 => Ok(out),
        _ => Err(FormatError::BlockCode {
            module: module.into(),
            kind: kind.name(),
        }),
    }
}

/// Gives each of a word's eight 4-bit codes a byte.
fn spread(word: u32) -> u64 {
    let word = u64::from(word);
    let word = (word | word << 16) & 0x0000_FFFF_0000_FFFF;
    let word = (word | word << 8) & 0x00FF_00FF_00FF_00FF;
    (word | word << 4) & 0x0F0F_0F0F_0F0F_0F0F
}

/// Unpacks the words of one row of outputs.
fn unpack_row(words: &[u32], bits: Bits, codes: &mut Vec<u8>) {
    let width = bits.get();
    if !32usize.is_multiple_of(width) {
        *codes = unpack_across(words, 1, codes.len(), bits);
        return;
    }
    for (codes, word) in codes.chunks_exact_mut(32 / width).zip(words) {
        for (j, code) in codes.iter_mut().enumerate() {
            *code = (word >> (j * width)) as u8 & bits.max_code();
        }
    }
}

/// The bits that a code may have.
fn limit(kind: GgufType) -> i32 {
    match kind {
        GgufType::Q4_0 => 15,
        GgufType::Q5_0 => 31,
        _ => 255,
    }
}

/// The code that stands for 0.
fn middle(kind: GgufType) -> i32 {
    match kind {
        GgufType::Q4_0 => 8,
        GgufType::Q5_0 => 16,
        _ => 128,
    }
}

fn put(out: &mut Vec<u8>, kind: GgufType, q: &[u8; BLOCK]) {
    if kind == GgufType::Q8_0 {
        out.extend_from_slice(&q.map(|q| q ^ 128));
        return;
    }
    if kind == GgufType::Q5_0 {
        let fifth = |(j, q): (usize, &u8)| u32::from(q >> 4 & 1) << j;
        let bits: u32 = q.iter().enumerate().map(fifth).sum();
        out.extend_from_slice(&bits.to_le_bytes());
    }
    let (low, high) = q.split_at(BLOCK / 2);
    let mut bytes = [0u8; BLOCK / 2];
    for (byte, (low, high)) in bytes.iter_mut().zip(low.iter().zip(high)) {
        *byte = low & 15 | high << 4;
    }
    out.extend_from_slice(&bytes);
}

/// Encodes floats as Q8_0, rounding them: `d` is the largest magnitude over 127.
pub fn q8_0(values: &[f32], out: &mut Vec<u8>) {
    for block in values.chunks(BLOCK) {
        let largest = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        let scale = largest / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        out.extend(f16::from_f32(scale).to_le_bytes());
        out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
    }
}

/// Decodes blocks of `kind` to `(q - middle, d)` of each block, in a linear of 8 bits for the comparison with a branch:
/// codes are `q - middle + 128`, zero points 128, and groups are blocks, in the order of the checkpoint's rows.
///
/// # Errors
/// Bytes of another length than `[out, in]` has.
pub fn decode_blocks(
    bytes: &[u8],
    kind: GgufType,
    rows: GgufRows,
    [n_out, n_in]: [usize; 2],
    name: &str,
) -> Result<QuantizedLinear, FormatError> {
    let (_, size) = kind.block();
    let blocks = n_in / BLOCK;
    let quantized = matches!(kind, GgufType::Q4_0 | GgufType::Q5_0 | GgufType::Q8_0);
    let expected = blocks
        .checked_mul(n_out)
        .and_then(|all| all.checked_mul(size));
    if !quantized || blocks == 0 || !n_in.is_multiple_of(BLOCK) || expected != Some(bytes.len()) {
        return Err(FormatError::Dtype {
            name: name.into(),
            found: kind.name().into(),
            expected: "whole blocks of Q4_0, Q5_0 or Q8_0",
        });
    }
    let mut codes = vec![0u8; n_in * n_out];
    let mut scales = vec![f16::ZERO; blocks * n_out];
    let rows = rows.sources(n_out).into_iter();
    let places = rows.flat_map(|row| (0..blocks).map(move |block| (row, block)));
    for ((row, block), bytes) in places.zip(bytes.chunks_exact(size)) {
        let (scale, body) = bytes.split_at(size_of::<f16>().min(bytes.len()));
        if let (Some(to), Some(scale)) = (scales.get_mut(block * n_out + row), scale.first_chunk())
        {
            *to = f16::from_le_bytes(*scale);
        }
        let q = taken(kind, body);
        let to = codes.iter_mut().skip(row * n_in + block * BLOCK);
        for (to, q) in to.zip(q) {
            *to = (q - middle(kind) + 128) as u8;
        }
    }
    Ok(QuantizedLinear {
        bits: Bits::Eight,
        in_features: n_in,
        out_features: n_out,
        codes: transposed(&codes, n_out, n_in),
        scales,
        zeros: vec![128; blocks * n_out],
        g_idx: (0..n_in).map(|i| (i / BLOCK) as i32).collect(),
    })
}

/// The codes of a block.
fn taken(kind: GgufType, body: &[u8]) -> [i32; BLOCK] {
    let mut q = [0; BLOCK];
    if kind == GgufType::Q8_0 {
        for (q, byte) in q.iter_mut().zip(body) {
            *q = i32::from(*byte as i8) + 128;
        }
        return q;
    }
    let (fifth, body) = match kind {
        GgufType::Q5_0 => match body.split_first_chunk::<4>() {
            Some((bits, rest)) => (u32::from_le_bytes(*bits), rest),
            None => (0, body),
        },
        _ => (0, body),
    };
    let halves = body.iter().map(|byte| byte & 15);
    let halves = halves.chain(body.iter().map(|byte| byte >> 4));
    for (j, (q, half)) in q.iter_mut().zip(halves).enumerate() {
        *q = i32::from(half) | ((fifth >> j & 1) << 4) as i32;
    }
    q
}
