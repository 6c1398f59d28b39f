//! Codes packed into 32-bit words, and packed linears dequantized.
//!
//! Thirty-two codes of `b` bits make `b` words, down the input columns in their original order: code
//! `j` takes bits `b j ..` of them as one little-endian string. For 2, 4 and 8 bits no code crosses a
//! word; of 3 bits, code 10 has its low two bits at the top of the first word, and code 21 its low bit
//! at the top of the second.

use std::fmt;

use burn::tensor::{DType, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use gptq_format::{Bits, PackedLinear};
use half::f16;

use super::{
    Cuda, Device,
    buffer::{self, Buffer, array},
    error::Error,
    transfer::{Pinned, fetch},
};
use crate::Codes;

/// Values that fill whole words.
pub(crate) const RUN: usize = 32;
const UNITS: usize = 128;

/// Adds value `j` of a run to its words.
#[cube]
pub(crate) fn put(
    words: &mut Array<u32>,
    value: u32,
    #[comptime] j: usize,
    #[comptime] bits: usize,
) {
    let word = comptime!(j * bits / 32);
    let shift = comptime!((j * bits % 32) as u32);
    words[word] |= value << shift;
    if comptime!(shift as usize + bits > 32) {
        words[word + 1] |= value >> comptime!(32 - shift);
    }
}

/// One unit per output row and run of input columns.
#[cube(launch_unchecked)]
fn pack_kernel(codes: &Array<u8>, out: &mut Array<u32>, rows: u32, #[comptime] bits: usize) {
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let run = CUBE_POS_Y as usize;
    let rows = rows as usize;
    if row < rows {
        let mut words = Array::<u32>::new(bits);
        #[unroll]
        for word in 0..bits {
            words[word] = 0u32;
        }
        #[unroll]
        for j in 0..RUN {
            let code = u32::cast_from(codes[(run * RUN + j) * rows + row]);
            put(&mut words, code, j, bits);
        }
        #[unroll]
        for word in 0..bits {
            out[(run * bits + word) * rows + row] = words[word];
        }
    }
}

/// One unit per output row and run of input columns.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn unpack_kernel<F: Float>(
    words: &Array<u32>,
    scales: &Array<f16>,
    zeros: &Array<u8>,
    group_of: &Array<u32>,
    out: &mut Array<F>,
    rows: u32,
    columns: u32,
    #[comptime] bits: usize,
    #[define(F)] _dtype: StorageType,
) {
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let run = CUBE_POS_Y as usize;
    let rows = rows as usize;
    if row < rows {
        let mask = comptime!((1u32 << bits) - 1);
        #[unroll]
        for j in 0..RUN {
            let at = (run * bits + comptime!(j * bits / 32)) * rows + row;
            let low = comptime!((j * bits % 32) as u32);
            let mut code = words[at] >> low;
            if comptime!(low as usize + bits > 32) {
                code |= words[at + rows] << comptime!(32 - low);
            }
            let code = code & mask;
            let group = group_of[run * RUN + j] as usize * rows + row;
            let zero = u32::cast_from(zeros[group]);
            let value =
                f32::cast_from(scales[group]) * (f32::cast_from(code) - f32::cast_from(zero));
            out[row * columns as usize + run * RUN + j] = F::cast_from(value);
        }
    }
}

/// Packs a linear's codes, and sends all of it to the host.
///
/// # Errors
///
/// Dtypes or shapes that do not fit together, or inputs that are no multiple of 32.
pub(crate) fn pack(linear: Codes<Cuda>) -> Result<Fetched, Error> {
    let Codes { bits, g_idx, .. } = linear;
    let codes = buffer::int("pack", "codes", linear.codes, DType::U8)?;
    let scales = buffer::float("pack", "scales", linear.scales, DType::F16)?;
    let zeros = buffer::int("pack", "zeros", linear.zeros, DType::U8)?;
    let [columns, rows] = [0, 1].map(|at| codes.meta.shape()[at]);
    let groups = scales.meta.shape()[0];
    if !columns.is_multiple_of(RUN) || g_idx.len() != columns {
        return Err(Error::Shape {
            operation: "pack",
            reason: format!("codes [{columns}, {rows}] with {} groups", g_idx.len()),
        });
    }
    let each = |buffer: &Buffer| [0, 1].map(|at| buffer.meta.shape()[at]);
    if each(&scales) != [groups, rows] || each(&zeros) != [groups, rows] {
        return Err(Error::Shape {
            operation: "pack",
            reason: format!(
                "scales {:?} and zero points {:?} of {rows} rows",
                each(&scales),
                each(&zeros)
            ),
        });
    }
    let width = bits.get();
    let words = buffer::empty(&codes, [columns / RUN * width, rows], DType::U32);
    // SAFETY: one unit per row and run of columns, all of them inside the shapes.
    unsafe {
        pack_kernel::launch_unchecked::<CudaRuntime>(
            &codes.client,
            CubeCount::new_2d(rows.div_ceil(UNITS) as u32, (columns / RUN) as u32),
            CubeDim::new_1d(UNITS as u32),
            array(&codes),
            array(&words),
            rows as u32,
            width,
        );
    }
    Ok(Fetched {
        bits,
        out_features: rows,
        codes: fetch(&words)?,
        scales: fetch(&scales)?,
        zeros: fetch(&zeros)?,
        g_idx,
    })
}

/// A packed linear whose tensors are on their way to the host.
pub(crate) struct Fetched {
    bits: Bits,
    out_features: usize,
    codes: Pinned,
    scales: Pinned,
    zeros: Pinned,
    g_idx: Vec<i32>,
}

impl Fetched {
    /// Waits for the tensors.
    pub(crate) fn wait(self) -> PackedLinear {
        PackedLinear {
            bits: self.bits,
            in_features: self.g_idx.len(),
            out_features: self.out_features,
            codes: self.codes.values().to_vec(),
            scales: self.scales.values().to_vec(),
            zeros: self.zeros.values().to_vec(),
            g_idx: self.g_idx,
        }
    }
}

impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (n_in, n_out) = (self.g_idx.len(), self.out_features);
        write!(f, "Fetched({n_in} x {n_out}, {} bits)", self.bits)
    }
}

/// The weights that a packed linear stands for: `[out, in]`, `scale (code - zero)` rounded to
/// `dtype`, f16 or bf16. Act order needs nothing more: `g_idx` says the group of each column. The caller has
/// checked that its entries are groups.
///
/// # Errors
///
/// Lengths that do not fit together.
pub fn dequantize(
    packed: &PackedLinear,
    dtype: DType,
    device: &Device,
) -> Result<Tensor<Cuda, 2>, Error> {
    let (rows, columns, bits) = (packed.out_features, packed.in_features, packed.bits.get());
    let groups = packed.scales.len() / rows.max(1);
    if columns % RUN != 0
        || packed.codes.len() != columns / RUN * bits * rows
        || packed.scales.len() != groups * rows
        || packed.zeros.len() != groups * rows
        || packed.g_idx.len() != columns
    {
        return Err(Error::Shape {
            operation: "dequantize",
            reason: format!("a packed linear [{rows}, {columns}] of {bits} bits"),
        });
    }
    let client = CudaRuntime::client(device);
    let out = buffer::empty_on(&client, device, [rows, columns], dtype);
    let codes = buffer::upload(&out, &packed.codes, DType::U32);
    let scales = buffer::upload(&out, &packed.scales, DType::F16);
    let zeros = buffer::upload(&out, &packed.zeros, DType::U8);
    let g_idx = buffer::upload(&out, &packed.g_idx, DType::I32);
    // The lengths were checked against each other; the caller's g_idx holds groups below `groups`.
    unpack([&codes, &scales, &zeros, &g_idx], bits, &out);
    Ok(buffer::into_float(out))
}

/// Dequantizes codes in words, scales, zero points and the group of each column into `out`
/// `[rows, columns]`, f16 or bf16. Their lengths fit together, and the groups are below their number.
pub(crate) fn unpack([words, scales, zeros, group_of]: [&Buffer; 4], bits: usize, out: &Buffer) {
    let [rows, columns] = [0, 1].map(|at| out.meta.shape()[at]);
    // SAFETY: one unit per row and run of columns; the caller's lengths fit.
    unsafe {
        unpack_kernel::launch_unchecked::<CudaRuntime>(
            &out.client,
            CubeCount::new_2d(rows.div_ceil(UNITS) as u32, (columns / RUN) as u32),
            CubeDim::new_1d(UNITS as u32),
            array(words),
            array(scales),
            array(zeros),
            array(group_of),
            array(out),
            rows as u32,
            columns as u32,
            bits,
            out.dtype.into(),
        );
    }
}
