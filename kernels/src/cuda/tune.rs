//! A step of tuning (`crate::Tunable`): one plane for each group of a row, which sums the group's pull on its scale,
//! moves the scale, then its codes, and writes the weights, in one pass over memory.

use burn::tensor::{DType, Int, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use half::f16;

use super::{
    Cuda,
    buffer::{self, Buffer, array},
    error::Error,
};
use crate::Codes;
use crate::tunable::{
    EPSILON, FIRST, LARGEST, MOST, REACH, SECOND, STRETCH, TINY, Tunable, TuningStep,
};

const UNITS: usize = 128;
const PLANE: usize = 32;
/// Rows and columns of a transposed tile.
const TILE: usize = 32;

/// Returns a gradient, or 0 in place of one that is no number.
#[cube]
fn finite(gradient: f32) -> f32 {
    select(gradient.abs() <= MOST, gradient, f32::new(0.0))
}

/// Returns Adam's direction.
#[cube]
fn direction(first: f32, second: f32, of_first: f32, of_second: f32) -> f32 {
    first * of_first / (f32::sqrt(second * of_second) + EPSILON)
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn step_kernel<F: Float>(
    gradient: &Array<f32>,
    order: &Array<i32>,
    start: &Array<f32>,
    scales: &Array<f32>,
    zeros: &Array<f32>,
    unrounded: &mut Array<f32>,
    first: &mut Array<f32>,
    second: &mut Array<f32>,
    stretch: &mut Array<f32>,
    stretch_first: &mut Array<f32>,
    stretch_second: &mut Array<f32>,
    weight: &mut Array<F>,
    columns: u32,
    size: u32,
    groups: u32,
    total: u32,
    max_code: f32,
    code_rate: f32,
    scale_rate: f32,
    of_first: f32,
    of_second: f32,
    #[define(F)] _dtype: StorageType,
) {
    let plane = CUBE_POS_X as usize * (UNITS / PLANE) + UNIT_POS as usize / PLANE;
    let lane = UNIT_POS as usize % PLANE;
    if plane < total as usize {
        let size = size as usize;
        let row = plane / groups as usize * columns as usize;
        let begin = plane % groups as usize * size;
        let zero = zeros[plane];
        // Read before the plane's sum, after which they are written.
        let mut a = stretch[plane];
        let mut a_first = stretch_first[plane];
        let mut a_second = stretch_second[plane];
        let mut pull = f32::new(0.0);
        let mut k = lane;
        while k < size {
            let code = unrounded[row + begin + k]
                .round()
                .max(f32::new(0.0))
                .min(max_code);
            let g = finite(gradient[row + order[begin + k] as usize]);
            pull += g * (code - zero);
            k += PLANE;
        }
        let pull = plane_sum(pull) * scales[plane];
        a_first = FIRST * a_first + (1.0 - FIRST) * pull;
        a_second = SECOND * a_second + (1.0 - SECOND) * pull * pull;
        a -= scale_rate * direction(a_first, a_second, of_first, of_second);
        a = a.max(f32::new(-STRETCH)).min(f32::new(STRETCH));
        if lane == 0 {
            stretch[plane] = a;
            stretch_first[plane] = a_first;
            stretch_second[plane] = a_second;
        }
        let scale = scales[plane] * (1.0 + a);
        let sign = select(scale < 0.0, f32::new(-1.0), f32::new(1.0));
        let size_of = (scale * sign).max(f32::new(TINY)).min(f32::new(LARGEST));
        let scale = f32::cast_from(f16::cast_from(size_of)) * sign;
        let mut k = lane;
        while k < size {
            let at = row + begin + k;
            let from = row + order[begin + k] as usize;
            let mut u = unrounded[at];
            let mut g = finite(gradient[from]) * scale;
            if u < -0.5 || u > max_code + 0.5 {
                g = f32::new(0.0);
            }
            let u_first = FIRST * first[at] + (1.0 - FIRST) * g;
            let u_second = SECOND * second[at] + (1.0 - SECOND) * g * g;
            first[at] = u_first;
            second[at] = u_second;
            u -= code_rate * direction(u_first, u_second, of_first, of_second);
            u = u.max(start[at] - REACH).min(start[at] + REACH);
            unrounded[at] = u;
            let code = u.round().max(f32::new(0.0)).min(max_code);
            weight[from] = F::cast_from(scale * (code - zero));
            k += PLANE;
        }
    }
}

/// `out[c, r] = u8(clamp(round(unrounded[r, back[c]])))`, tile by tile.
#[cube(launch_unchecked)]
fn codes_kernel(
    unrounded: &Array<f32>,
    back: &Array<u32>,
    out: &mut Array<u8>,
    rows: u32,
    columns: u32,
    max_code: f32,
) {
    let row = CUBE_POS_X as usize * TILE + UNIT_POS_X as usize;
    let column = CUBE_POS_Y as usize * TILE + UNIT_POS_Y as usize;
    if row < rows as usize && column < columns as usize {
        let u = unrounded[row * columns as usize + back[column] as usize];
        let code = u.round().max(f32::new(0.0)).min(max_code);
        out[column * rows as usize + row] = u8::cast_from(code);
    }
}

/// Takes a step along `gradient`, f32 `[out, in]`; returns the weights after it in `dtype`, f16 or bf16.
///
/// # Errors
///
/// Another dtype or shape.
pub(crate) fn step(
    tunable: &mut Tunable<Cuda>,
    gradient: Tensor<Cuda, 2>,
    step: TuningStep,
    dtype: DType,
) -> Result<Tensor<Cuda, 2>, Error> {
    let [rows, columns] = tunable.unrounded.dims();
    let groups = tunable.scales.dims()[1];
    if gradient.dims() != [rows, columns] {
        return Err(Error::Shape {
            operation: "tune",
            reason: format!("a gradient {:?} of [{rows}, {columns}]", gradient.dims()),
        });
    }
    let float =
        |name, tensor: &Tensor<Cuda, 2>| buffer::float("tune", name, tensor.clone(), DType::F32);
    let gradient = buffer::float("tune", "gradient", gradient, DType::F32)?;
    let start = float("start", &tunable.start)?;
    let scales = float("scales", &tunable.scales)?;
    let zeros = float("zeros", &tunable.zeros)?;
    let unrounded = float("unrounded", &tunable.unrounded)?;
    let stretch = float("stretch", &tunable.stretch)?;
    let moments = pair(&tunable.moments)?;
    let stretch_moments = pair(&tunable.stretch_moments)?;
    let order = buffer::int("tune", "columns", tunable.columns.clone(), DType::I32)?;
    let weight = buffer::empty(&gradient, [rows, columns], dtype);
    let total = (rows * groups) as u32;
    let [of_first, of_second] = step.corrections();
    // SAFETY: planes below `total` have a row and a group inside the buffers' shapes, `order` is a permutation of
    // the columns, and the buffers that are written belong to `tunable` alone.
    unsafe {
        step_kernel::launch_unchecked::<CudaRuntime>(
            &gradient.client,
            CubeCount::new_1d(total.div_ceil((UNITS / PLANE) as u32)),
            CubeDim::new_1d(UNITS as u32),
            array(&gradient),
            array(&order),
            array(&start),
            array(&scales),
            array(&zeros),
            array(&unrounded),
            array(&moments[0]),
            array(&moments[1]),
            array(&stretch),
            array(&stretch_moments[0]),
            array(&stretch_moments[1]),
            array(&weight),
            columns as u32,
            tunable.group_size() as u32,
            groups as u32,
            total,
            f32::from(tunable.bits.max_code()),
            step.code_rate,
            step.scale_rate,
            of_first,
            of_second,
            dtype.into(),
        );
    }
    // Those that were not contiguous have been copied.
    tunable.unrounded = buffer::into_float(unrounded);
    tunable.stretch = buffer::into_float(stretch);
    tunable.moments = moments.map(buffer::into_float);
    tunable.stretch_moments = stretch_moments.map(buffer::into_float);
    Ok(buffer::into_float(weight))
}

fn pair([first, second]: &[Tensor<Cuda, 2>; 2]) -> Result<[Buffer; 2], Error> {
    let float =
        |tensor: &Tensor<Cuda, 2>| buffer::float("tune", "moments", tensor.clone(), DType::F32);
    Ok([float(first)?, float(second)?])
}

/// Returns the linear as it is now.
///
/// # Errors
///
/// Another dtype than those it was made with.
pub(crate) fn tuned(tunable: &Tunable<Cuda>) -> Result<Codes<Cuda>, Error> {
    let [rows, columns] = tunable.unrounded.dims();
    let unrounded = buffer::float("tune", "unrounded", tunable.unrounded.clone(), DType::F32)?;
    let back = buffer::upload(&unrounded, &tunable.back(), DType::U32);
    let codes = buffer::empty(&unrounded, [columns, rows], DType::U8);
    let tiles = |n: usize| n.div_ceil(TILE) as u32;
    // SAFETY: rows and columns stay inside the shape, and `back` is a permutation of the columns.
    unsafe {
        codes_kernel::launch_unchecked::<CudaRuntime>(
            &unrounded.client,
            CubeCount::new_2d(tiles(rows), tiles(columns)),
            CubeDim::new_2d(TILE as u32, TILE as u32),
            array(&unrounded),
            array(&back),
            array(&codes),
            rows as u32,
            columns as u32,
            f32::from(tunable.bits.max_code()),
        );
    }
    Ok(Codes {
        bits: tunable.bits,
        codes: Tensor::<Cuda, 2, Int>::from_primitive(codes),
        scales: tunable.scales().transpose().cast(DType::F16),
        zeros: tunable.zero_codes.clone(),
        g_idx: tunable.g_idx.clone(),
    })
}
