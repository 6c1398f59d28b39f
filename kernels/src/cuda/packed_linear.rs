//! A linear layer on weights that stay packed: `y = x wᵀ`, `w[o, i] = s (code[i, o] - z)`.
//!
//! One token is multiplied by the codes as they are, in f32: the columns of a load first give `Σ x code` and
//! `Σ x`, and only their combination `s (Σ x code - z Σ x)` meets scale and zero. A code becomes a float
//! without a conversion: its bits in the mantissa of 1 are `1 + code / 2^b`. More tokens than one are
//! multiplied by the dequantized weights, by cuBLAS.
//!
//! A cube first gathers the input by position into shared memory, a load's columns padded by 16 bytes so
//! that no two units of a quarter of a plane meet in a bank. Its planes then walk over the rows, two at a
//! time: units next to each other read 16 bytes each of a row, and ask for the next loads before they wait
//! for any. A plane's sums meet in a fixed order.

use burn::tensor::{DType, Int, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};

use super::{
    Cuda,
    buffer::{self, array},
    error::Error,
    linear,
    pack::unpack,
    packed_rows::{LOAD, QUAD, dense, scale_of},
};
use crate::{PackedLayout, PackedWeight};

/// Units of a plane, and planes of a cube.
const UNITS: usize = 32;
const PLANES: usize = 16;
/// Output rows that a plane has at once; with it, a cube has 32, which every number of rows is a multiple of.
const ROWS: usize = 2;
/// Loads of a unit per row that are asked for together.
const HELD: usize = 2;
/// Quads of inputs that a unit gathers at once.
const TURNS: usize = 4;

/// `1 + code / 2^bits` for code `j` of a word. `one` has the bits of 1: a constant here would take an
/// instruction of its own beside the mask.
#[cube]
fn fraction(word: u32, one: u32, #[comptime] j: usize, #[comptime] bits: usize) -> f32 {
    let low = comptime!((j * bits) as u32);
    let place = comptime!((23 - bits) as u32);
    let mask = comptime!(((1u32 << bits) - 1) << (23 - bits));
    if comptime!(low <= place) {
        f32::reinterpret(((word << comptime!(place - low)) & mask) | one)
    } else {
        f32::reinterpret(((word >> comptime!(low - place)) & mask) | one)
    }
}

/// Parameters that a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    bits: usize,
    /// Input columns.
    columns: usize,
    /// Loads of a row that share a scale.
    per_group: usize,
}

/// Asks for what this unit multiplies from load `first` on: codes, and the cells of their groups.
#[cube]
fn fetch(
    codes: &Array<Vector<u32, Const<4>>>,
    grid: &Array<u32>,
    held: &mut Array<Vector<u32, Const<4>>>,
    cells: &mut Array<u32>,
    row: usize,
    first: usize,
    #[comptime] shape: Shape,
) {
    let loads = comptime!(shape.columns * shape.bits / LOAD);
    #[unroll]
    for load in 0..HELD {
        let at = first + load * UNITS + UNIT_POS_X as usize;
        if at < loads {
            #[unroll]
            for r in 0..ROWS {
                held[load * ROWS + r] = codes[(row + r) * loads + at];
                cells[load * ROWS + r] =
                    grid[(row + r) * comptime!(loads / shape.per_group) + at / shape.per_group];
            }
        }
    }
}

#[cube(launch_unchecked)]
fn one_token_kernel<F: Float>(
    x: &Array<F>,
    order: &Array<Vector<u32, Const<4>>>,
    codes: &Array<Vector<u32, Const<4>>>,
    grid: &Array<u32>,
    out: &mut Array<F>,
    all_rows: u32,
    one: u32,
    #[comptime] shape: Shape,
    #[define(F)] _dtype: StorageType,
) {
    let bits = comptime!(shape.bits);
    let units = comptime!(PLANES * UNITS);
    let loads = comptime!(shape.columns * shape.bits / LOAD);
    // Quads of columns in a load, and with the padding.
    let quads = comptime!(LOAD / shape.bits / QUAD);
    let pitch = comptime!(quads + 1);
    let mut plain = SharedMemory::<F>::new(comptime!(shape.columns));
    let mut inputs = SharedMemory::<Vector<f32, Const<4>>>::new(comptime!(loads * pitch));
    let lane = UNIT_POS_X as usize;
    let unit = UNIT_POS_Y as usize * UNITS + lane;
    let mut row = (CUBE_POS_X as usize * PLANES + UNIT_POS_Y as usize) * ROWS;

    let mut held = Array::<Vector<u32, Const<4>>>::new(comptime!(HELD * ROWS));
    let mut cells = Array::<u32>::new(comptime!(HELD * ROWS));
    fetch(codes, grid, &mut held, &mut cells, row, 0, shape);
    #[unroll]
    for turn in 0..comptime!(shape.columns.div_ceil(units)) {
        let column = turn * units + unit;
        if column < comptime!(shape.columns) {
            plain[column] = x[column];
        }
    }
    let mut first = 0;
    while first < comptime!(shape.columns / QUAD) {
        let mut from = Array::<Vector<u32, Const<4>>>::new(TURNS);
        #[unroll]
        for turn in 0..TURNS {
            let quad = first + turn * units + unit;
            if quad < comptime!(shape.columns / QUAD) {
                from[turn] = order[quad];
            }
        }
        if first == 0 {
            sync_cube();
        }
        #[unroll]
        for turn in 0..TURNS {
            let quad = first + turn * units + unit;
            if quad < comptime!(shape.columns / QUAD) {
                let mut four = Vector::<f32, Const<4>>::new(0.0);
                #[unroll]
                for at in 0..QUAD {
                    four[at] = f32::cast_from(plain[from[turn][at] as usize]);
                }
                inputs[quad / quads * pitch + quad % quads] = four;
            }
        }
        first += comptime!(TURNS * units);
    }
    sync_cube();

    while row < all_rows as usize {
        let mut total = Array::<f32>::new(ROWS);
        #[unroll]
        for r in 0..ROWS {
            total[r] = f32::new(0.0);
        }
        let next = row + CUBE_COUNT_X as usize * comptime!(PLANES * ROWS);
        let mut first = 0;
        while first < loads {
            #[unroll]
            for load in 0..HELD {
                let at = first + load * UNITS + lane;
                if at < loads {
                    let mut sum = f32::new(0.0);
                    let mut dot = Array::<f32>::new(ROWS);
                    #[unroll]
                    for r in 0..ROWS {
                        dot[r] = f32::new(0.0);
                    }
                    #[unroll]
                    for quad in 0..quads {
                        let four = inputs[at * pitch + quad];
                        #[unroll]
                        for i in 0..QUAD {
                            let code = comptime!(quad * QUAD + i);
                            let word = comptime!(code * bits / 32);
                            let j = comptime!(code % (32 / bits));
                            sum += four[i];
                            #[unroll]
                            for r in 0..ROWS {
                                let code = fraction(held[load * ROWS + r][word], one, j, bits);
                                dot[r] += four[i] * code;
                            }
                        }
                    }
                    #[unroll]
                    for r in 0..ROWS {
                        let cell = cells[load * ROWS + r];
                        let codes = (dot[r] - sum) * comptime!((1u32 << bits) as f32);
                        total[r] += scale_of(cell) * (codes - sum * f32::cast_from(cell >> 16u32));
                    }
                }
            }
            first += comptime!(HELD * UNITS);
            if first < loads {
                fetch(codes, grid, &mut held, &mut cells, row, first, shape);
            } else if next < all_rows as usize {
                fetch(codes, grid, &mut held, &mut cells, next, 0, shape);
            }
        }
        #[unroll]
        for r in 0..ROWS {
            let sum = plane_sum(total[r]);
            if lane == 0 {
                out[row + r] = F::cast_from(sum);
            }
        }
        row = next;
    }
}

/// `x wᵀ` for `x` f16 or bf16 `[tokens, in]`: `[tokens, out]` of the same.
///
/// # Errors
///
/// Another dtype, or an `x` of another width.
pub fn packed_linear(
    x: Tensor<Cuda, 2>,
    weight: &PackedWeight<Cuda>,
) -> Result<Tensor<Cuda, 2>, Error> {
    let ([tokens, width], [rows, columns]) = (x.dims(), weight.dims());
    if width != columns {
        return Err(Error::Shape {
            operation: "packed_linear",
            reason: format!("x {:?}, w [{rows}, {columns}]", x.dims()),
        });
    }
    let ints = |name, tensor: &Tensor<Cuda, 2, Int>| {
        buffer::int("packed_linear", name, tensor.clone(), DType::I32)
    };
    let bits = weight.bits.get();
    match &weight.layout {
        PackedLayout::Columns {
            codes,
            scales,
            zeros,
            g_idx,
        } => {
            let codes = ints("codes", codes)?;
            let scales = buffer::float("packed_linear", "scales", scales.clone(), DType::F16)?;
            let zeros = buffer::int("packed_linear", "zeros", zeros.clone(), DType::U8)?;
            let g_idx = buffer::int("packed_linear", "g_idx", g_idx.clone(), DType::I32)?;
            let dense = buffer::empty(&codes, [rows, columns], x.dtype());
            unpack([&codes, &scales, &zeros, &g_idx], bits, &dense);
            linear(x, buffer::into_float(dense))
        }
        PackedLayout::Rows { codes, grid, order } => {
            let (codes, grid) = (ints("codes", codes)?, ints("grid", grid)?);
            if tokens != 1 {
                let dense = buffer::into_float(dense([&codes, &grid], bits, x.dtype()));
                return linear(x.select(1, order.clone()), dense);
            }
            let x = buffer::half("packed_linear", "x", x)?;
            let order = buffer::int("packed_linear", "order", order.clone(), DType::I32)?;
            let out = buffer::empty(&x, [1, rows], x.dtype);
            let groups = grid.meta.shape()[1];
            let shape = Shape {
                bits,
                columns,
                per_group: columns * bits / LOAD / groups,
            };
            // A cube per multiprocessor: gathering the inputs is then done once for all of its rows.
            let hardware = &x.client.properties().hardware;
            let most = hardware.num_streaming_multiprocessors.unwrap_or(u32::MAX);
            let cubes = (rows / (PLANES * ROWS)) as u32;
            // SAFETY: rows are a multiple of 32, a row and a group whole numbers of loads, `order` holds
            // columns; [`super::packed_rows`] made them so.
            unsafe {
                one_token_kernel::launch_unchecked::<CudaRuntime>(
                    &x.client,
                    CubeCount::new_1d(cubes.min(most)),
                    CubeDim::new_2d(UNITS as u32, PLANES as u32),
                    array(&x),
                    array(&order),
                    array(&codes),
                    array(&grid),
                    array(&out),
                    rows as u32,
                    1_f32.to_bits(),
                    shape,
                    x.dtype.into(),
                );
            }
            Ok(buffer::into_float(out))
        }
    }
}
