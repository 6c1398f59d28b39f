//! A linear layer on weights that stay packed: `y = x wᵀ`, `w[o, i] = s (code[i, o] - z)`.
//!
//! Act order scatters a group over the input columns. [`resident`] therefore reorders `qweight` once, on the
//! device, so that groups are contiguous, and keeps the original column of each position. One token is
//! multiplied by the codes as they are, in f32: a group's columns first give `Σ x code` and `Σ x`, and only
//! their combination `s (Σ x code - z Σ x)` meets scale and zero. A code becomes a float without a
//! conversion: its bits in the mantissa of 1 are `1 + code / 2^b`. More tokens than one are multiplied by the
//! dequantised weights, by cuBLAS, their columns in the same order.
//!
//! A cube of 32 planes has 32 output rows, one per unit of a plane; each plane takes every 32nd segment of
//! input columns, and the planes' sums meet in shared memory in a fixed order.

use burn::tensor::{DType, Int, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use gptq_format::PackedLinear;
use half::f16;

use super::{
    Cuda, Device,
    buffer::{self, Buffer, array},
    error::Error,
    linear,
    pack::{RUN, put, unpack},
};
use crate::PackedWeight;

/// Units of a plane, and planes of a cube.
const SIDE: usize = 32;
/// The most words of a column that a unit holds at once.
const WORDS: usize = 16;
/// Inputs per shared-memory access.
const QUAD: usize = 4;
const UNITS: usize = 128;

/// `1 + code / 2^bits` for code `j` of a word.
#[cube]
fn fraction(word: u32, #[comptime] j: usize, #[comptime] bits: usize) -> f32 {
    let low = comptime!((j * bits) as u32);
    let place = comptime!((23 - bits) as u32);
    let mask = comptime!(((1u32 << bits) - 1) << (23 - bits));
    if comptime!(low <= place) {
        f32::reinterpret(((word << comptime!(place - low)) & mask) | 0x3f80_0000u32)
    } else {
        f32::reinterpret(((word >> comptime!(low - place)) & mask) | 0x3f80_0000u32)
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn one_token_kernel<F: Float>(
    x: &Array<F>,
    order: &Array<u32>,
    qweight: &Array<u32>,
    qzeros: &Array<u32>,
    scales: &Array<f16>,
    out: &mut Array<F>,
    rows: u32,
    segments: u32,
    per_group: u32,
    plus: u32,
    #[comptime] bits: usize,
    #[comptime] words: usize,
    #[define(F)] _dtype: StorageType,
) {
    let codes = comptime!(32 / bits);
    let columns = comptime!(words * 32 / bits);
    let mut inputs = SharedMemory::<Vector<f32, Const<4>>>::new(comptime!(SIDE * columns / QUAD));
    let mut partial = SharedMemory::<f32>::new(comptime!(SIDE * SIDE));
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let rows = rows as usize;
    let segments = segments as usize;
    let row = CUBE_POS_X as usize * SIDE + lane;
    let bit = row % RUN * bits;
    let zero_word = row / RUN * bits + bit / 32;
    let zero_words = rows / RUN * bits;
    let mut total = f32::new(0.0);
    let turns = segments.div_ceil(SIDE);
    let mut turn = 0;
    while turn < turns {
        let segment = turn * SIDE + plane;
        let mut held = Array::<u32>::new(words);
        let mut sum = f32::new(0.0);
        if segment < segments {
            #[unroll]
            for word in 0..words {
                held[word] = qweight[(segment * words + word) * rows + row];
            }
            let mut quad = lane;
            while quad < comptime!(columns / QUAD) {
                let mut four = Vector::<f32, Const<4>>::new(0.0);
                #[unroll]
                for at in 0..QUAD {
                    let column = order[segment * columns + quad * QUAD + at];
                    let value = f32::cast_from(x[column as usize]);
                    four[at] = value;
                    sum += value;
                }
                inputs[plane * comptime!(columns / QUAD) + quad] = four;
                quad += SIDE;
            }
        }
        sync_cube();
        // The planes of a cube may differ here, the units of a plane do not.
        if segment < segments {
            let sum = plane_sum(sum);
            let mut dot = f32::new(0.0);
            #[unroll]
            for word in 0..words {
                #[unroll]
                for quad in 0..comptime!(codes / QUAD) {
                    let four = inputs
                        [plane * comptime!(columns / QUAD) + comptime!(word * codes / QUAD + quad)];
                    #[unroll]
                    for at in 0..QUAD {
                        let j = comptime!(quad * QUAD + at);
                        dot += four[at] * fraction(held[word], j, bits);
                    }
                }
            }
            let group = segment / per_group as usize;
            let zero = ((qzeros[group * zero_words + zero_word] >> (bit % 32) as u32)
                & comptime!((1u32 << bits) - 1))
                + plus;
            let scale = f32::cast_from(scales[group * rows + row]);
            total += scale
                * ((dot - sum) * comptime!((1u32 << bits) as f32) - sum * f32::cast_from(zero));
        }
        sync_cube();
        turn += 1;
    }
    partial[plane * SIDE + lane] = total;
    sync_cube();
    if plane == 0 {
        let mut total = f32::new(0.0);
        #[unroll]
        for other in 0..SIDE {
            total += partial[other * SIDE + lane];
        }
        out[row] = F::cast_from(total);
    }
}

/// One unit per output row and run of positions.
#[cube(launch_unchecked)]
fn reorder_kernel(
    qweight: &Array<u32>,
    order: &Array<u32>,
    out: &mut Array<u32>,
    rows: u32,
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
            let code = (qweight[bit / 32 * rows + row] >> (bit % 32) as u32)
                & comptime!((1u32 << bits) - 1);
            put(&mut words, code, j, bits);
        }
        #[unroll]
        for word in 0..bits {
            out[(run * bits + word) * rows + row] = words[word];
        }
    }
}

/// Columns in the order of their groups, where codes are 4 or 8 bits and every group has as many columns.
fn order(packed: &PackedLinear) -> Option<Vec<i32>> {
    let groups = packed.scales.len() / packed.out_features;
    let size = packed.in_features / groups;
    let mut order: Vec<i32> = (0..packed.in_features as i32).collect();
    order.sort_by_key(|&column| packed.g_idx[column as usize]);
    let regular = order
        .iter()
        .enumerate()
        .all(|(at, &column)| packed.g_idx[column as usize] as usize == at / size);
    let words = (size * packed.bits.get()).is_multiple_of(32);
    (matches!(packed.bits.get(), 4 | 8) && regular && words).then_some(order)
}

/// Packed weights on a device, reordered for [`packed_linear`] where that can be.
pub fn resident(packed: &PackedLinear, device: &Device) -> Result<PackedWeight<Cuda>, Error> {
    let mut weight = PackedWeight::upload(packed, device);
    let Some(order) = order(packed) else {
        return Ok(weight);
    };
    let (rows, bits) = (packed.out_features, packed.bits.get());
    let from = buffer::int("resident", "qweight", weight.qweight.clone(), DType::I32)?;
    let position = buffer::upload(&from, &order, DType::I32);
    let shape = [packed.in_features / 32 * bits, rows];
    let out = buffer::empty(&from, shape, DType::I32);
    // SAFETY: one unit per row and run of 32 columns, all of them columns of the layer.
    unsafe {
        reorder_kernel::launch_unchecked::<CudaRuntime>(
            &from.client,
            CubeCount::new_2d(
                rows.div_ceil(UNITS) as u32,
                (packed.in_features / RUN) as u32,
            ),
            CubeDim::new_1d(UNITS as u32),
            array(&from),
            array(&position),
            array(&out),
            rows as u32,
            bits,
        );
    }
    weight.qweight = Tensor::from_primitive(out);
    weight.order = Some(Tensor::from_primitive(position));
    Ok(weight)
}

/// The tensors of a [`PackedWeight`] as buffers.
struct Buffers {
    qweight: Buffer,
    qzeros: Buffer,
    scales: Buffer,
}

impl Buffers {
    fn of(weight: &PackedWeight<Cuda>) -> Result<Buffers, Error> {
        let ints = |name, tensor: &Tensor<Cuda, 2, Int>| {
            buffer::int("packed_linear", name, tensor.clone(), DType::I32)
        };
        Ok(Buffers {
            qweight: ints("qweight", &weight.qweight)?,
            qzeros: ints("qzeros", &weight.qzeros)?,
            scales: buffer::float("packed_linear", "scales", weight.scales.clone(), DType::F16)?,
        })
    }

    /// The weights `[rows, columns]`, as many columns as `x`, in its dtype, given each one's group.
    fn dense(
        &self,
        x: &Tensor<Cuda, 2>,
        groups: &Buffer,
        plus: u32,
        bits: usize,
    ) -> Tensor<Cuda, 2> {
        let (rows, columns) = (self.qweight.meta.shape()[1], x.dims()[1]);
        let out = buffer::empty(&self.qweight, [rows, columns], x.dtype());
        let parts = [&self.qweight, &self.qzeros, &self.scales, groups];
        unpack(parts, plus, bits, &out);
        buffer::into_float(out)
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
    let [tokens, columns] = x.dims();
    let rows = weight.scales.dims()[1];
    if columns != weight.g_idx.dims()[0] {
        return Err(Error::Shape {
            operation: "packed_linear",
            reason: format!("x {:?}, w [{rows}, {}]", x.dims(), weight.g_idx.dims()[0]),
        });
    }
    let parts = Buffers::of(weight)?;
    let plus = u32::from(weight.format.zero_offset());
    let bits = weight.bits.get();
    let Some(order) = &weight.order else {
        let groups = buffer::int("packed_linear", "g_idx", weight.g_idx.clone(), DType::I32)?;
        let dense = parts.dense(&x, &groups, plus, bits);
        return linear(x, dense);
    };
    let groups = weight.scales.dims()[0];
    if tokens != 1 {
        let group = |position: usize| (position / (columns / groups)) as i32;
        let groups: Vec<i32> = (0..columns).map(group).collect();
        let groups = buffer::upload(&parts.qweight, &groups, DType::I32);
        let dense = parts.dense(&x, &groups, plus, bits);
        return linear(x.select(1, order.clone()), dense);
    }
    let x = buffer::half("packed_linear", "x", x)?;
    let order = buffer::int("packed_linear", "order", order.clone(), DType::I32)?;
    let out = buffer::empty(&x, [1, rows], x.dtype);
    let group_words = columns / groups * bits / 32;
    let words = (1..=WORDS)
        .rev()
        .find(|words| {
            group_words.is_multiple_of(*words) && (words * 32 / bits).is_multiple_of(QUAD)
        })
        .unwrap_or(1);
    // SAFETY: rows are a multiple of 32, segments of `words` words cover the columns, and a group is
    // a whole number of segments; `order` holds columns.
    unsafe {
        one_token_kernel::launch_unchecked::<CudaRuntime>(
            &x.client,
            CubeCount::new_1d((rows / SIDE) as u32),
            CubeDim::new_2d(SIDE as u32, SIDE as u32),
            array(&x),
            array(&order),
            array(&parts.qweight),
            array(&parts.qzeros),
            array(&parts.scales),
            array(&out),
            rows as u32,
            (columns * bits / 32 / words) as u32,
            (group_words / words) as u32,
            plus,
            bits,
            words,
            x.dtype.into(),
        );
    }
    Ok(buffer::into_float(out))
}
