//! Codes and zero points packed into 32-bit words, and packed tensors dequantized.
//!
//! Thirty-two values of `b` bits make `b` words: value `j` takes bits `b j ..` of them as one
//! little-endian string. For 2, 4 and 8 bits no value crosses a word; for 3 bits this is
//! exactly the known layout (value 10 has its low two bits at the top of the first word, value
//! 21 its low bit at the top of the second). `qweight` is packed along the input columns, in
//! their original order, `qzeros` along the output rows.

use std::fmt;

use burn::tensor::{DType, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use gptq_format::{CheckpointFormat, PackedLinear};
use gptq_solver::Settings;
use half::f16;

use super::{
    Cuda, Device,
    buffer::{self, Buffer, array},
    error::Error,
    sweep::Swept,
    transfer::{Pinned, fetch},
};

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
fn unpack_kernel<F: Float>(
    qweight: &Array<u32>,
    qzeros: &Array<u32>,
    scales: &Array<f16>,
    group_of: &Array<u32>,
    out: &mut Array<F>,
    rows: u32,
    columns: u32,
    plus: u32,
    #[comptime] bits: usize,
    #[define(F)] _dtype: StorageType,
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
            let zero = (zero + plus) & mask;
            let value = f32::cast_from(scales[group * rows + row])
                * (f32::cast_from(code) - f32::cast_from(zero));
            out[row * columns as usize + run * RUN + j] = F::cast_from(value);
        }
    }
}

/// A packed layer on its way to the host.
pub(crate) struct Packed {
    qweight: Buffer,
    qzeros: Buffer,
    scales: Buffer,
    g_idx: Vec<i32>,
    settings: Settings,
    format: CheckpointFormat,
}

/// Packs the layer in rows `offset..offset + rows`. The caller has checked that `rows` and the
/// columns are multiples of 32.
pub(crate) fn pack(
    swept: &Swept,
    position: &Buffer,
    g_idx: &[i32],
    [offset, rows]: [usize; 2],
    settings: Settings,
    format: CheckpointFormat,
) -> Packed {
    let columns = position.meta.shape()[0];
    let groups = settings.group_size.groups(columns);
    let bits = settings.bits.get();
    let new = |shape, dtype| buffer::empty(&swept.codes, shape, dtype);
    let qweight = new([columns / RUN * bits, rows], DType::U32);
    let qzeros = new([groups, rows / RUN * bits], DType::U32);
    let scales = new([groups, rows], DType::F16);
    let client = &swept.codes.client;
    let cubes = |units: usize, y: usize| CubeCount::new_2d(units.div_ceil(UNITS) as u32, y as u32);
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: rows stay below `offset + rows <= all_rows`, runs below the packed shapes.
    unsafe {
        pack_weight_kernel::launch_unchecked::<CudaRuntime>(
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
        pack_zeros_kernel::launch_unchecked::<CudaRuntime>(
            client,
            cubes(rows / RUN, groups),
            dim,
            array(&swept.zeros),
            array(&qzeros),
            (rows / RUN) as u32,
            swept.rows as u32,
            offset as u32,
            u32::from(format.zero_offset()),
            bits,
        );
        scales_kernel::launch_unchecked::<CudaRuntime>(
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
        qweight,
        qzeros,
        scales,
        g_idx: g_idx.to_vec(),
        settings,
        format,
    }
}

impl Packed {
    /// Sends the tensors to the host.
    pub(crate) fn fetch(self) -> Result<Fetched, Error> {
        Ok(Fetched {
            out_features: self.qweight.meta.shape()[1],
            qweight: fetch(&self.qweight)?,
            qzeros: fetch(&self.qzeros)?,
            scales: fetch(&self.scales)?,
            g_idx: self.g_idx,
            settings: self.settings,
            format: self.format,
        })
    }
}

/// A packed layer whose tensors are on their way to the host.
pub(crate) struct Fetched {
    out_features: usize,
    qweight: Pinned,
    qzeros: Pinned,
    scales: Pinned,
    g_idx: Vec<i32>,
    settings: Settings,
    format: CheckpointFormat,
}

impl Fetched {
    /// Waits for the tensors.
    pub(crate) fn wait(self) -> PackedLinear {
        PackedLinear {
            bits: self.settings.bits,
            in_features: self.g_idx.len(),
            out_features: self.out_features,
            format: self.format,
            qweight: self.qweight.values().to_vec(),
            qzeros: self.qzeros.values().to_vec(),
            scales: self.scales.values().to_vec(),
            g_idx: self.g_idx,
        }
    }
}

impl fmt::Debug for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fetched({:?})", self.settings)
    }
}

/// The weights that a packed layer stands for: `[out, in]`, `scale (code - zero)` rounded to
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
        || rows % RUN != 0
        || packed.qweight.len() != columns / RUN * bits * rows
        || packed.qzeros.len() != rows / RUN * bits * groups
        || packed.scales.len() != groups * rows
        || packed.g_idx.len() != columns
    {
        return Err(Error::Shape {
            operation: "dequantize",
            reason: format!("a packed linear [{rows}, {columns}] of {bits} bits"),
        });
    }
    let client = CudaRuntime::client(device);
    let out = buffer::empty_on(&client, device, [rows, columns], dtype);
    let qweight = buffer::upload(&out, &packed.qweight, DType::U32);
    let qzeros = buffer::upload(&out, &packed.qzeros, DType::U32);
    let scales = buffer::upload(&out, &packed.scales, DType::F16);
    let g_idx = buffer::upload(&out, &packed.g_idx, DType::I32);
    let plus = u32::from(packed.format.zero_offset());
    // The lengths were checked against each other; the caller's g_idx holds groups below `groups`.
    unpack([&qweight, &qzeros, &scales, &g_idx], plus, bits, &out);
    Ok(buffer::into_float(out))
}

/// Dequantizes `qweight`, `qzeros`, `scales` and the group of each of its columns into `out`
/// `[rows, columns]`, f16 or bf16. Their lengths fit together, and the groups are below their number.
pub(crate) fn unpack(
    [qweight, qzeros, scales, group_of]: [&Buffer; 4],
    plus: u32,
    bits: usize,
    out: &Buffer,
) {
    let [rows, columns] = [0, 1].map(|at| out.meta.shape()[at]);
    // SAFETY: one unit per row and run of columns; the caller's lengths fit.
    unsafe {
        unpack_kernel::launch_unchecked::<CudaRuntime>(
            &out.client,
            CubeCount::new_2d(rows.div_ceil(UNITS) as u32, (columns / RUN) as u32),
            CubeDim::new_1d(UNITS as u32),
            array(qweight),
            array(qzeros),
            array(scales),
            array(group_of),
            array(out),
            rows as u32,
            columns as u32,
            plus,
            bits,
            out.dtype.into(),
        );
    }
}
