//! Packed weights laid out for generation: the codes of one output row next to each other.
//!
//! Act order scatters a group over the input columns, and codes are packed down the columns. Once, when
//! a layer is loaded, [`resident`] brings the columns of a group together and turns the words round, so that
//! a plane reads 512 bytes of one row at a time and meets its scale and zero point once per group. The
//! original column of each position is kept: the input is gathered by it.

use burn::tensor::{DType, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use gptq_format::PackedLinear;
use half::f16;

use super::{
    Cuda, Device,
    buffer::{self, Buffer, array},
    error::Error,
    pack::{RUN, put},
};
use crate::{PackedLayout, PackedWeight};

const UNITS: usize = 128;
/// Bits that a unit of [`super::packed_linear`] reads at once: a group is a whole number of them.
pub(super) const LOAD: usize = 128;
/// Inputs per shared-memory access of it.
pub(super) const QUAD: usize = 4;

/// One unit per output row and run of positions.
#[cube(launch_unchecked)]
fn rows_kernel(
    stored: &Array<u32>,
    order: &Array<u32>,
    out: &mut Array<u32>,
    rows: u32,
    columns: u32,
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
            let bit = order[run * RUN + j] as usize * bits;
            let code = (stored[bit / 32 * rows + row] >> (bit % 32) as u32)
                & comptime!((1u32 << bits) - 1);
            put(&mut words, code, j, bits);
        }
        #[unroll]
        for word in 0..bits {
            out[row * (columns as usize / RUN * bits) + run * bits + word] = words[word];
        }
    }
}

/// One unit per output row and group.
#[cube(launch_unchecked)]
fn grid_kernel(
    scales: &Array<f16>,
    zeros: &Array<u8>,
    out: &mut Array<u32>,
    rows: u32,
    groups: u32,
) {
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let group = CUBE_POS_Y as usize;
    let rows = rows as usize;
    if row < rows {
        let zero = u32::cast_from(zeros[group * rows + row]);
        let scale = u16::reinterpret(scales[group * rows + row]);
        out[row * groups as usize + group] = u32::cast_from(scale) | (zero << 16u32);
    }
}

/// One unit per word of codes.
#[cube(launch_unchecked)]
fn dense_kernel<F: Float>(
    codes: &Array<u32>,
    grid: &Array<u32>,
    out: &mut Array<F>,
    words: u32,
    per_group: u32,
    total: u32,
    #[comptime] bits: usize,
    #[define(F)] _dtype: StorageType,
) {
    let at = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    if at < total as usize {
        let (words, per_group) = (words as usize, per_group as usize);
        let groups = words / per_group;
        let cell = grid[at / words * groups + at % words / per_group];
        let scale = scale_of(cell);
        let zero = f32::cast_from(cell >> 16u32);
        let word = codes[at];
        #[unroll]
        for j in 0..comptime!(32 / bits) {
            let code = (word >> comptime!((j * bits) as u32)) & comptime!((1u32 << bits) - 1);
            let value = scale * (f32::cast_from(code) - zero);
            out[at * comptime!(32 / bits) + j] = F::cast_from(value);
        }
    }
}

/// The scale in a cell of [`PackedLayout::Rows`]'s grid.
#[cube]
pub(super) fn scale_of(cell: u32) -> f32 {
    f32::cast_from(f16::reinterpret(u16::cast_from(cell & 0xffff_u32)))
}

/// Columns in the order of their groups, where codes do not cross words and every group has as many
/// columns, whole loads of them.
fn order(packed: &PackedLinear) -> Option<Vec<i32>> {
    let groups = packed.groups();
    let size = packed.in_features / groups;
    let mut order: Vec<i32> = (0..packed.in_features as i32).collect();
    order.sort_by_key(|&column| packed.g_idx[column as usize]);
    let regular = order
        .iter()
        .enumerate()
        .all(|(at, &column)| packed.g_idx[column as usize] as usize == at / size);
    let whole = (size * packed.bits.get()).is_multiple_of(LOAD);
    (matches!(packed.bits.get(), 2 | 4 | 8) && regular && whole).then_some(order)
}

/// Bytes of shared memory that a cube of [`super::packed_linear`] needs for inputs of this many columns.
fn shared_memory(columns: usize, bits: usize) -> usize {
    let pad = size_of::<[f32; QUAD]>();
    columns * (size_of::<u16>() + size_of::<f32>()) + columns * bits / LOAD * pad
}

/// Packed weights on a device, laid out in rows where that can be and an input fits in shared memory.
pub fn resident(packed: &PackedLinear, device: &Device) -> Result<PackedWeight<Cuda>, Error> {
    let weight = PackedWeight::upload(packed, device);
    let (
        Some(order),
        PackedLayout::Columns {
            codes: words,
            scales,
            zeros,
            ..
        },
    ) = (order(packed), &weight.layout)
    else {
        return Ok(weight);
    };
    let (rows, columns, bits) = (packed.out_features, packed.in_features, packed.bits.get());
    let limit = CudaRuntime::client(device)
        .properties()
        .hardware
        .max_shared_memory_size;
    if shared_memory(columns, bits) > limit {
        return Ok(weight);
    }
    let groups = packed.groups();
    let words = buffer::int("resident", "codes", words.clone(), DType::I32)?;
    let scales = buffer::float("resident", "scales", scales.clone(), DType::F16)?;
    let zeros = buffer::int("resident", "zeros", zeros.clone(), DType::U8)?;
    let order = buffer::upload(&words, &order, DType::I32);
    let codes = buffer::empty(&words, [rows, columns / RUN * bits], DType::I32);
    let grid = buffer::empty(&words, [rows, groups], DType::I32);
    let cubes = rows.div_ceil(UNITS) as u32;
    // SAFETY: one unit per row and run of 32 columns, and per row and group; `order` holds columns.
    unsafe {
        rows_kernel::launch_unchecked::<CudaRuntime>(
            &codes.client,
            CubeCount::new_2d(cubes, (columns / RUN) as u32),
            CubeDim::new_1d(UNITS as u32),
            array(&words),
            array(&order),
            array(&codes),
            rows as u32,
            columns as u32,
            bits,
        );
        grid_kernel::launch_unchecked::<CudaRuntime>(
            &grid.client,
            CubeCount::new_2d(cubes, groups as u32),
            CubeDim::new_1d(UNITS as u32),
            array(&scales),
            array(&zeros),
            array(&grid),
            rows as u32,
            groups as u32,
        );
    }
    Ok(PackedWeight {
        layout: PackedLayout::Rows {
            codes: Tensor::from_primitive(codes),
            grid: Tensor::from_primitive(grid),
            order: Tensor::from_primitive(order),
        },
        ..weight
    })
}

/// The weights `[rows, columns]` in `dtype`, f16 or bf16, columns by position, of `codes` and their `grid`.
pub(super) fn dense([codes, grid]: [&Buffer; 2], bits: usize, dtype: DType) -> Buffer {
    let [rows, words] = [0, 1].map(|at| codes.meta.shape()[at]);
    let groups = grid.meta.shape()[1];
    let out = buffer::empty(codes, [rows, words * 32 / bits], dtype);
    let total = rows * words;
    // SAFETY: one unit per word; a group is a whole number of words.
    unsafe {
        dense_kernel::launch_unchecked::<CudaRuntime>(
            &out.client,
            CubeCount::new_1d(total.div_ceil(UNITS) as u32),
            CubeDim::new_1d(UNITS as u32),
            array(codes),
            array(grid),
            array(&out),
            words as u32,
            (words / groups) as u32,
            total as u32,
            bits,
            dtype.into(),
        );
    }
    out
}
