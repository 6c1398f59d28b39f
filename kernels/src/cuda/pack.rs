//! Codes and zero points packed into 32-bit words, and packed tensors dequantised.
//!
//! Thirty-two values of `b` bits make `b` words: value `j` takes bits `b j ..` of them as one
//! little-endian string. For 2, 4 and 8 bits no value crosses a word; for 3 bits this is
//! exactly the known layout (value 10 has its low two bits at the top of the first word, value
//! 21 its low bit at the top of the second). `qweight` is packed along the input columns, in
//! their original order, `qzeros` along the output rows.

use burn::tensor::{DType, Int, Tensor};
use cubecl::prelude::*;
use half::f16;

use super::{
    Cuda,
    buffer::{self, Buffer, array},
    error::Error,
    settings::{Settings, ZeroOffset},
    sweep::Swept,
};

/// Values that fill whole words.
const RUN: usize = 32;
const UNITS: usize = 128;

/// Adds value `j` of a run to its words.
#[cube]
fn put(words: &mut Array<u32>, value: u32, #[comptime] j: usize, #[comptime] bits: usize) {
    let word = comptime!(j * bits / 32);
    let shift = comptime!((j * bits % 32) as u32);
    words[word] |= value << shift;
    if comptime!(shift as usize + bits > 32) {
        words[word + 1] |= value >> comptime!(32 - shift);
    }
}

/// One unit per output row and run of input columns.
#[cube(launch_unchecked)]
fn pack_weight_kernel(
    codes: &Array<u8>,
    position: &Array<u32>,
    out: &mut Array<u32>,
    rows: u32,
    all_rows: u32,
    offset: u32,
    #[comptime] bits: usize,
) {
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
            let at = position[run * RUN + j] as usize * all_rows as usize;
            let code = u32::cast_from(codes[at + offset as usize + row]);
            put(&mut words, code, j, bits);
        }
        #[unroll]
        for word in 0..bits {
            out[(run * bits + word) * rows + row] = words[word];
        }
    }
}

/// One unit per group and run of output rows.
#[cube(launch_unchecked)]
fn pack_zeros_kernel(
    zeros: &Array<f32>,
    out: &mut Array<u32>,
    runs: u32,
    all_rows: u32,
    offset: u32,
    minus: u32,
    #[comptime] bits: usize,
) {
    let run = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let group = CUBE_POS_Y as usize;
    let runs = runs as usize;
    if run < runs {
        let mut words = Array::<u32>::new(bits);
        #[unroll]
        for word in 0..bits {
            words[word] = 0u32;
        }
        let base = group * all_rows as usize + offset as usize + run * RUN;
        #[unroll]
        for j in 0..RUN {
            let zero = u32::cast_from(zeros[base + j]) - minus;
            put(&mut words, zero & comptime!((1u32 << bits) - 1), j, bits);
        }
        #[unroll]
        for word in 0..bits {
            out[(group * runs + run) * bits + word] = words[word];
        }
    }
}

#[cube(launch_unchecked)]
fn scales_kernel(scales: &Array<f32>, out: &mut Array<f16>, rows: u32, all_rows: u32, offset: u32) {
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let group = CUBE_POS_Y as usize;
    if row < rows as usize {
        let at = group * all_rows as usize + offset as usize + row;
        out[group * rows as usize + row] = f16::cast_from(scales[at]);
    }
}

/// One unit per output row and run of input columns.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn unpack_kernel(
    qweight: &Array<u32>,
    qzeros: &Array<u32>,
    scales: &Array<f16>,
    group_of: &Array<u32>,
    out: &mut Array<f16>,
    rows: u32,
    columns: u32,
    plus: u32,
    #[comptime] bits: usize,
) {
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let run = CUBE_POS_Y as usize;
    let rows = rows as usize;
    if row < rows {
        let mask = comptime!((1u32 << bits) - 1);
        let words = rows / RUN * bits;
        let bit = row % RUN * bits;
        let word = row / RUN * bits + bit / 32;
        let shift = (bit % 32) as u32;
        #[unroll]
        for j in 0..RUN {
            let at = (run * bits + comptime!(j * bits / 32)) * rows + row;
            let low = comptime!((j * bits % 32) as u32);
            let mut code = qweight[at] >> low;
            if comptime!(low as usize + bits > 32) {
                code |= qweight[at + rows] << comptime!(32 - low);
            }
            let code = code & mask;
            let group = group_of[run * RUN + j] as usize;
            let mut zero = qzeros[group * words + word] >> shift;
            if shift + comptime!(bits as u32) > 32 {
                zero |= qzeros[group * words + word + 1] << (32 - shift);
            }
            let zero = ((zero & mask) + plus) & comptime!(2 * ((1u32 << bits) - 1) + 1);
            let value = f32::cast_from(scales[group * rows + row])
                * (f32::cast_from(code) - f32::cast_from(zero));
            out[row * columns as usize + run * RUN + j] = f16::cast_from(value);
        }
    }
}

/// A quantised linear layer's tensors, as a checkpoint holds them.
#[derive(Debug, Clone)]
pub struct Packed {
    /// Codes, i32 `[in * bits / 32, out]`.
    pub qweight: Tensor<Cuda, 2, Int>,
    /// Zero points, i32 `[groups, out * bits / 32]`.
    pub qzeros: Tensor<Cuda, 2, Int>,
    /// Scales, f16 `[groups, out]`.
    pub scales: Tensor<Cuda, 2>,
    /// The group of each input column, i32 `[in]`.
    pub g_idx: Tensor<Cuda, 1, Int>,
}

/// Packs the layer in rows `offset..offset + rows`. The caller has checked that `rows` and the
/// columns are multiples of 32.
pub(crate) fn pack(
    swept: &Swept,
    position: &Buffer,
    g_idx: Buffer,
    [offset, rows]: [usize; 2],
    settings: Settings,
    zero_offset: ZeroOffset,
) -> Packed {
    let columns = position.meta.shape()[0];
    let groups = settings.groups(columns);
    let bits = settings.bits as usize;
    let new = |shape, dtype| buffer::empty(&swept.codes, shape, dtype);
    let qweight = new([columns / RUN * bits, rows], DType::I32);
    let qzeros = new([groups, rows / RUN * bits], DType::I32);
    let scales = new([groups, rows], DType::F16);
    let client = &swept.codes.client;
    let cubes = |units: usize, y: usize| CubeCount::new_2d(units.div_ceil(UNITS) as u32, y as u32);
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: rows stay below `offset + rows <= all_rows`, runs below the packed shapes.
    unsafe {
        pack_weight_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            client,
            cubes(rows, columns / RUN),
            dim,
            array(&swept.codes),
            array(position),
            array(&qweight),
            rows as u32,
            swept.rows as u32,
            offset as u32,
            bits,
        );
        pack_zeros_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            client,
            cubes(rows / RUN, groups),
            dim,
            array(&swept.zeros),
            array(&qzeros),
            (rows / RUN) as u32,
            swept.rows as u32,
            offset as u32,
            u32::from(zero_offset == ZeroOffset::MinusOne),
            bits,
        );
        scales_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            client,
            cubes(rows, groups),
            dim,
            array(&swept.scales),
            array(&scales),
            rows as u32,
            swept.rows as u32,
            offset as u32,
        );
    }
    Packed {
        qweight: buffer::into_int(qweight),
        qzeros: buffer::into_int(qzeros),
        scales: buffer::into_float(scales),
        g_idx: buffer::into_int(g_idx),
    }
}

/// The weights that a packed layer stands for: f16 `[out, in]`, `scale (code - zero)` rounded
/// to f16. Act order needs nothing more: `g_idx` says the group of each column.
///
/// # Errors
///
/// Other dtypes, bits other than 2, 3, 4 or 8, or shapes that do not fit together.
pub fn dequantise(
    packed: &Packed,
    bits: u32,
    zero_offset: ZeroOffset,
) -> Result<Tensor<Cuda, 2>, Error> {
    let [words, rows] = packed.qweight.dims();
    let [groups, zero_words] = packed.qzeros.dims();
    let [columns] = packed.g_idx.dims();
    let wide = bits as usize;
    if !matches!(bits, 2 | 3 | 4 | 8)
        || columns % RUN != 0
        || rows % RUN != 0
        || words != columns / RUN * wide
        || zero_words != rows / RUN * wide
        || packed.scales.dims() != [groups, rows]
    {
        return Err(Error::Shape {
            operation: "dequantise",
            reason: format!(
                "{bits} bits, qweight [{words}, {rows}], qzeros [{groups}, {zero_words}], \
                 scales {:?}, g_idx [{columns}]",
                packed.scales.dims()
            ),
        });
    }
    let of = "dequantise";
    let qweight = buffer::int(of, "qweight", packed.qweight.clone(), DType::I32)?;
    let qzeros = buffer::int(of, "qzeros", packed.qzeros.clone(), DType::I32)?;
    let g_idx = buffer::int(of, "g_idx", packed.g_idx.clone(), DType::I32)?;
    let scales = buffer::float(of, "scales", packed.scales.clone(), DType::F16)?;
    let out = buffer::empty(&scales, [rows, columns], DType::F16);
    // SAFETY: the shapes were checked against each other; the caller's g_idx holds groups
    // below `groups`.
    unsafe {
        unpack_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            CubeCount::new_2d(rows.div_ceil(UNITS) as u32, (columns / RUN) as u32),
            CubeDim::new_1d(UNITS as u32),
            array(&qweight),
            array(&qzeros),
            array(&scales),
            array(&g_idx),
            array(&out),
            rows as u32,
            columns as u32,
            u32::from(zero_offset == ZeroOffset::MinusOne),
            wide,
        );
    }
    Ok(buffer::into_float(out))
}
