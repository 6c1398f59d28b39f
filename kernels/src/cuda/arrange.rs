//! Rearranges weights for the sweep, and back as f16 or bf16; codes and grids out of it.
//!
//! The sweep works column by column on `[in, rows]`, in its own column order; checkpoints and
//! the forward pass hold `[out, in]` in the original order. Both ways go through a tile in
//! shared memory, so that reads and writes are contiguous. Codes stay column by column, of one layer
//! and in the original order.

use burn::tensor::{DType, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use gptq_format::Bits;
use half::f16;

use super::{
    Cuda,
    buffer::{self, Buffer, array},
    pack::RUN,
    sweep::Swept,
};
use crate::Codes;

const TILE: usize = 32;
const STRIPES: usize = 8;
const UNITS: usize = 128;

/// `out[position[c], offset + r] = weight[r, c]`, zero for dead columns.
#[cube(launch_unchecked)]
fn columns_kernel<F: Float>(
    weight: &Array<F>,
    position: &Array<u32>,
    diagonal: &Array<f32>,
    out: &mut Array<f32>,
    rows: u32,
    columns: u32,
    all_rows: u32,
    offset: u32,
    #[define(F)] _dtype: StorageType,
) {
    let mut tile = SharedMemory::<f32>::new(TILE * (TILE + 1));
    let x = UNIT_POS_X as usize;
    let y = UNIT_POS_Y as usize;
    let rows = rows as usize;
    let columns = columns as usize;
    let row0 = CUBE_POS_Y as usize * TILE;
    let column0 = CUBE_POS_X as usize * TILE;
    #[unroll]
    for stripe in 0..TILE / STRIPES {
        let r = stripe * STRIPES + y;
        if row0 + r < rows && column0 + x < columns {
            let mut value = f32::cast_from(weight[(row0 + r) * columns + column0 + x]);
            if diagonal[column0 + x] == 0.0 {
                value = f32::new(0.0);
            }
            tile[r * (TILE + 1) + x] = value;
        }
    }
    sync_cube();
    #[unroll]
    for stripe in 0..TILE / STRIPES {
        let c = stripe * STRIPES + y;
        if row0 + x < rows && column0 + c < columns {
            let at = position[column0 + c] as usize * all_rows as usize;
            out[at + offset as usize + row0 + x] = tile[x * (TILE + 1) + c];
        }
    }
}

/// `out[r, c] = scale (code - zero)` of position `position[c]`, row `offset + r`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn dequantize_kernel<F: Float>(
    codes: &Array<u8>,
    scales: &Array<f32>,
    zeros: &Array<f32>,
    group_of: &Array<u32>,
    position: &Array<u32>,
    out: &mut Array<F>,
    rows: u32,
    columns: u32,
    all_rows: u32,
    offset: u32,
    #[define(F)] _dtype: StorageType,
) {
    let mut tile = SharedMemory::<f32>::new(TILE * (TILE + 1));
    let x = UNIT_POS_X as usize;
    let y = UNIT_POS_Y as usize;
    let rows = rows as usize;
    let columns = columns as usize;
    let all_rows = all_rows as usize;
    let row0 = CUBE_POS_Y as usize * TILE;
    let column0 = CUBE_POS_X as usize * TILE;
    #[unroll]
    for stripe in 0..TILE / STRIPES {
        let c = stripe * STRIPES + y;
        if row0 + x < rows && column0 + c < columns {
            let at = position[column0 + c] as usize;
            let row = offset as usize + row0 + x;
            let group = group_of[at] as usize * all_rows + row;
            let code = f32::cast_from(codes[at * all_rows + row]);
            tile[x * (TILE + 1) + c] = scales[group] * (code - zeros[group]);
        }
    }
    sync_cube();
    #[unroll]
    for stripe in 0..TILE / STRIPES {
        let r = stripe * STRIPES + y;
        if row0 + r < rows && column0 + x < columns {
            out[(row0 + r) * columns + column0 + x] = F::cast_from(tile[r * (TILE + 1) + x]);
        }
    }
}

/// `out[c, r] = codes[position[c], offset + r]`; one unit per row and run of columns.
#[cube(launch_unchecked)]
fn codes_kernel(
    codes: &Array<u8>,
    position: &Array<u32>,
    out: &mut Array<u8>,
    rows: u32,
    all_rows: u32,
    offset: u32,
) {
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let run = CUBE_POS_Y as usize;
    let rows = rows as usize;
    if row < rows {
        #[unroll]
        for j in 0..RUN {
            let at = position[run * RUN + j] as usize * all_rows as usize;
            out[(run * RUN + j) * rows + row] = codes[at + offset as usize + row];
        }
    }
}

/// Scales as f16 and zero points as bytes, of the rows from `offset` on; one unit per row and group.
#[cube(launch_unchecked)]
fn grids_kernel(
    scales: &Array<f32>,
    zeros: &Array<f32>,
    scales_out: &mut Array<f16>,
    zeros_out: &mut Array<u8>,
    rows: u32,
    all_rows: u32,
    offset: u32,
) {
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let group = CUBE_POS_Y as usize;
    let rows = rows as usize;
    if row < rows {
        let from = group * all_rows as usize + offset as usize + row;
        scales_out[group * rows + row] = f16::cast_from(scales[from]);
        zeros_out[group * rows + row] = u8::cast_from(zeros[from]);
    }
}

fn tiles(rows: usize, columns: usize) -> (CubeCount, CubeDim) {
    (
        CubeCount::new_2d(columns.div_ceil(TILE) as u32, rows.div_ceil(TILE) as u32),
        CubeDim::new_2d(TILE as u32, STRIPES as u32),
    )
}

/// Writes the layer `weight`, any float `[out, in]`, to rows `offset..` of `out`, f32 `[in,
/// all_rows]`, in the sweep's column order, with zeros where `diagonal` is zero.
pub(crate) fn into_columns(
    weight: &Buffer,
    position: &Buffer,
    diagonal: &Buffer,
    out: &Buffer,
    offset: usize,
) {
    let [rows, columns] = [weight.meta.shape()[0], weight.meta.shape()[1]];
    let (count, dim) = tiles(rows, columns);
    // SAFETY: indices stay inside the shapes; `offset + rows <= all_rows`.
    unsafe {
        columns_kernel::launch_unchecked::<CudaRuntime>(
            &out.client,
            count,
            dim,
            array(weight),
            array(position),
            array(diagonal),
            array(out),
            rows as u32,
            columns as u32,
            out.meta.shape()[1] as u32,
            offset as u32,
            weight.dtype.into(),
        );
    }
}

/// Returns the dequantized weights of the layer in rows `offset..offset + rows`: `[rows, in]` of
/// this dtype in the original column order. `position` and `group_of` are those of the layer's problem.
pub(crate) fn dequantize(
    swept: &Swept,
    [position, group_of]: [&Buffer; 2],
    [offset, rows]: [usize; 2],
    dtype: DType,
) -> Buffer {
    let columns = position.meta.shape()[0];
    let out = buffer::empty(&swept.codes, [rows, columns], dtype);
    let (count, dim) = tiles(rows, columns);
    // SAFETY: indices stay inside the shapes; `offset + rows <= swept.rows`.
    unsafe {
        dequantize_kernel::launch_unchecked::<CudaRuntime>(
            &out.client,
            count,
            dim,
            array(&swept.codes),
            array(&swept.scales),
            array(&swept.zeros),
            array(group_of),
            array(position),
            array(&out),
            rows as u32,
            columns as u32,
            swept.rows as u32,
            offset as u32,
            dtype.into(),
        );
    }
    out
}

/// Codes and grids of the layer in rows `offset..offset + rows`, columns in the original order. The caller has
/// checked that the columns are a multiple of 32.
pub(crate) fn codes(
    swept: &Swept,
    position: &Buffer,
    g_idx: &[i32],
    [offset, rows]: [usize; 2],
    bits: Bits,
) -> Codes<Cuda> {
    let columns = position.meta.shape()[0];
    let groups = swept.scales.meta.shape()[0];
    let new = |shape, dtype| buffer::empty(&swept.codes, shape, dtype);
    let codes = new([columns, rows], DType::U8);
    let scales = new([groups, rows], DType::F16);
    let zeros = new([groups, rows], DType::U8);
    let client = &swept.codes.client;
    let cubes = |y: usize| CubeCount::new_2d(rows.div_ceil(UNITS) as u32, y as u32);
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: rows stay below `offset + rows <= swept.rows`, columns and groups inside the shapes.
    unsafe {
        codes_kernel::launch_unchecked::<CudaRuntime>(
            client,
            cubes(columns / RUN),
            dim,
            array(&swept.codes),
            array(position),
            array(&codes),
            rows as u32,
            swept.rows as u32,
            offset as u32,
        );
        grids_kernel::launch_unchecked::<CudaRuntime>(
            client,
            cubes(groups),
            dim,
            array(&swept.scales),
            array(&swept.zeros),
            array(&scales),
            array(&zeros),
            rows as u32,
            swept.rows as u32,
            offset as u32,
        );
    }
    Codes {
        bits,
        codes: Tensor::from_primitive(codes),
        scales: buffer::into_float(scales),
        zeros: Tensor::from_primitive(zeros),
        g_idx: g_idx.to_vec(),
    }
}
