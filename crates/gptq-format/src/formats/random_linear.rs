//! Linear layers for the tests of all formats.

use half::f16;

use crate::{Bits, GroupSize, LinearShape, QuantizedLinear};

/// Returns a linear layer of random codes, scales of either sign, and zero points; in the middle if `sym`.
pub(crate) fn random_linear(shape: &LinearShape, sym: bool, seed: u64) -> QuantizedLinear {
    let mut state = seed | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 33) as u32
    };
    let (n_in, n_out, groups) = (shape.in_features, shape.out_features, shape.groups());
    let max = u32::from(shape.bits.max_code());
    let mut code = |_| (next() & max) as u8;
    let codes = (0..n_in * n_out).map(&mut code).collect();
    let zeros = match sym {
        true => vec![shape.bits.symmetric_zero(); groups * n_out],
        false => (0..groups * n_out).map(code).collect(),
    };
    let scale = |_| f16::from_f32((next() as f32 / u32::MAX as f32 * 2.0 - 0.5) / 16.0);
    let scales = (0..groups * n_out).map(scale).collect();
    let columns = shape.group_size.columns(n_in);
    QuantizedLinear {
        bits: shape.bits,
        in_features: n_in,
        out_features: n_out,
        codes,
        scales,
        zeros,
        g_idx: (0..n_in).map(|i| (i / columns) as i32).collect(),
    }
}

/// Returns the shape of a small linear layer with `groups` groups of `columns`, or one for the whole row.
pub(crate) fn shape(bits: Bits, columns: usize, groups: usize, row: bool) -> LinearShape {
    LinearShape {
        in_features: columns * groups,
        out_features: 64,
        bits,
        group_size: match row {
            true => GroupSize::Row,
            false => GroupSize::Columns(columns),
        },
    }
}
