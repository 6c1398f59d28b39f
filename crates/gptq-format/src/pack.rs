//! Codes to 32-bit words and back.
//!
//! AutoGPTQ's layout is a little-endian bit stream: value `j` of a column occupies bits
//! `[b*j, b*j + b)`, low bits first, for every width. Its 3-bit case, 32 values in 3 words with
//! values 10 and 21 straddling a word boundary, is the same stream, so one loop serves 2, 3, 4 and
//! 8 bits. Codes pack *down* the input dimension, in memory as in files; AutoGPTQ's zero points pack *across* the
//! output dimension.

use crate::Bits;

/// Packs `codes` `[rows, cols]` down the rows into `[rows * bits / 32, cols]` words.
///
/// `rows` must be a multiple of 32 (asserted), so that every width fills whole words.
pub fn pack_down(codes: &[u8], rows: usize, cols: usize, bits: Bits) -> Vec<u32> {
    assert_eq!(codes.len(), rows * cols);
    assert!(
        rows.is_multiple_of(32),
        "{rows} rows do not fill whole words"
    );
    let b = bits.get();
    let mut words = vec![0u32; rows * b / 32 * cols];
    for (r, row) in codes.chunks_exact(cols.max(1)).enumerate() {
        let (word, shift) = (r * b / 32, r * b % 32);
        let mut rest = words.chunks_exact_mut(cols.max(1)).skip(word);
        if let Some(words) = rest.next() {
            for (w, &code) in words.iter_mut().zip(row) {
                *w |= u32::from(code) << shift;
            }
        }
        if shift + b > 32
            && let Some(words) = rest.next()
        {
            for (w, &code) in words.iter_mut().zip(row) {
                *w |= u32::from(code) >> (32 - shift);
            }
        }
    }
    words
}

/// Inverse of [`pack_down`]: words `[rows * bits / 32, cols]` to codes `[rows, cols]`.
pub fn unpack_down(words: &[u32], rows: usize, cols: usize, bits: Bits) -> Vec<u8> {
    let b = bits.get();
    assert!(
        rows.is_multiple_of(32),
        "{rows} rows do not fill whole words"
    );
    assert_eq!(words.len(), rows * b / 32 * cols);
    let mask = u32::from(bits.max_code());
    let mut codes = vec![0u8; rows * cols];
    for (r, row) in codes.chunks_exact_mut(cols.max(1)).enumerate() {
        let (word, shift) = (r * b / 32, r * b % 32);
        let mut rest = words.chunks_exact(cols.max(1)).skip(word);
        if let Some(words) = rest.next() {
            for (code, &w) in row.iter_mut().zip(words) {
                *code = (w >> shift & mask) as u8;
            }
        }
        if shift + b > 32
            && let Some(words) = rest.next()
        {
            for (code, &w) in row.iter_mut().zip(words) {
                *code |= ((w << (32 - shift)) & mask) as u8;
            }
        }
    }
    codes
}

/// Values that fill whole words at every width.
const RUN: usize = 32;

/// Packs `values` `[rows, cols]` across the columns into `[rows, cols * bits / 32]` words.
///
/// `cols` must be a multiple of 32 (asserted).
pub fn pack_across(values: &[u8], rows: usize, cols: usize, bits: Bits) -> Vec<u32> {
    assert_eq!(values.len(), rows * cols);
    assert!(
        cols.is_multiple_of(RUN),
        "{cols} columns do not fill whole words"
    );
    let b = bits.get();
    let mut words = Vec::with_capacity(values.len() / RUN * b);
    for run in values.chunks_exact(RUN) {
        let (mut held, mut filled) = (0u64, 0);
        for &value in run {
            held |= u64::from(value) << filled;
            filled += b;
            if filled >= 32 {
                words.push(held as u32);
                held >>= 32;
                filled -= 32;
            }
        }
    }
    words
}

/// Inverse of [`pack_across`]: words `[rows, cols * bits / 32]` to values `[rows, cols]`.
pub fn unpack_across(words: &[u32], rows: usize, cols: usize, bits: Bits) -> Vec<u8> {
    let b = bits.get();
    assert!(
        cols.is_multiple_of(RUN),
        "{cols} columns do not fill whole words"
    );
    assert_eq!(words.len(), rows * cols / RUN * b);
    let mut values = Vec::with_capacity(rows * cols);
    for run in words.chunks_exact(b) {
        let (mut held, mut filled) = (0u64, 0);
        for &word in run {
            held |= u64::from(word) << filled;
            filled += 32;
            while filled >= b {
                values.push(held as u8 & bits.max_code());
                held >>= b;
                filled -= b;
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn three_bit_words_are_laid_out_as_autogptq_writes_them() {
        // One value at a time, so that each lands where the layout says: value 10 has its low two
        // bits at 30 and its high bit at bit 0 of the next word; value 21 splits one and two.
        let at = |j: usize| {
            let mut codes = vec![0u8; 32];
            codes[j] = 7;
            pack_down(&codes, 32, 1, Bits::Three)
        };
        assert_eq!(at(0), [7, 0, 0]);
        assert_eq!(at(9), [7 << 27, 0, 0]);
        assert_eq!(at(10), [3 << 30, 1, 0]);
        assert_eq!(at(11), [0, 7 << 1, 0]);
        assert_eq!(at(21), [0, 1 << 31, 3]);
        assert_eq!(at(22), [0, 0, 7 << 2]);
        assert_eq!(at(31), [0, 0, 7 << 29]);
    }

    proptest! {
        #[test]
        fn unpacking_returns_what_was_packed(
            bits in prop::sample::select(Bits::ALL.to_vec()),
            blocks in 1usize..5,
            other in 1usize..41,
            seed in any::<u64>(),
        ) {
            let n = blocks * 32 * other;
            let mut state = seed | 1;
            let codes: Vec<u8> = (0..n)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (state >> 33) as u8 & bits.max_code()
                })
                .collect();
            let down = pack_down(&codes, blocks * 32, other, bits);
            prop_assert_eq!(down.len() * 32, n * bits.get());
            prop_assert_eq!(&unpack_down(&down, blocks * 32, other, bits), &codes);
            let across = pack_across(&codes, other, blocks * 32, bits);
            prop_assert_eq!(&unpack_across(&across, other, blocks * 32, bits), &codes);
        }
    }
}
