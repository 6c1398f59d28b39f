//! Scale and zero point of each group of columns, and rounding to nearest with them.
//!
//! Symmetric: `scale = 2 max|w| / (2^b - 1)`, `zero = 2^(b-1)`. Asymmetric: minimum and maximum
//! including zero, `scale = (max - min) / (2^b - 1)`, `zero = round(-min / scale)`. A group of
//! zeros counts as one that reaches -1 and 1. The scale is rounded to f16 first (up to its
//! smallest positive value if it would vanish), and the rounded one is used throughout,
//! because that is what readers multiply by.

use std::ops::Range;

use burn::tensor::DType;
use cubecl::prelude::*;
use half::f16;

use super::{
    buffer::{self, Buffer, array},
    settings::Settings,
    sweep::Swept,
};

const UNITS: usize = 64;
/// Columns read before the first of them is used.
const AHEAD: usize = 8;
const PLANE: usize = 32;
/// The smallest positive f16, `2^-24`.
const TINY: f32 = 5.960_464_5e-8;

/// The f16-rounded scale of a range.
#[cube]
fn scale_of(low: f32, high: f32, max_code: f32, #[comptime] symmetric: bool) -> f32 {
    let mut range = high - low;
    if comptime!(symmetric) {
        range = 2.0 * high.max(-low);
    }
    if range == 0.0 {
        range = f32::new(2.0);
    }
    f32::cast_from(f16::cast_from(range / max_code)).max(f32::new(TINY))
}

/// The zero point of a range with this scale.
#[cube]
fn zero_of(low: f32, high: f32, scale: f32, max_code: f32, #[comptime] symmetric: bool) -> f32 {
    let mut low = low;
    if low == 0.0 && high == 0.0 {
        low = f32::new(-1.0);
    }
    let mut zero = (max_code + 1.0) * 0.5;
    if comptime!(!symmetric) {
        zero = (-low / scale).round().max(f32::new(0.0)).min(max_code);
    }
    zero
}

/// Parameters of groups of positions, from weights stored column by column: one unit per row,
/// one cube row per group.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn parameters_kernel(
    weight: &Array<f32>,
    update: &Array<f32>,
    position: &Array<u32>,
    scales: &mut Array<f32>,
    zeros: &mut Array<f32>,
    start: u32,
    end: u32,
    group_columns: u32,
    rows: u32,
    max_code: f32,
    #[comptime] updated: bool,
    #[comptime] gathered: bool,
    #[comptime] symmetric: bool,
) {
    let rows = rows as usize;
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let first = (start + CUBE_POS_Y * group_columns) as usize;
    let last = (first + group_columns as usize).min(end as usize);
    if row < rows {
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        let mut column = first;
        while column < last {
            let mut held = Array::<f32>::new(AHEAD);
            #[unroll]
            for i in 0..AHEAD {
                // Past the group's end its last column is read again: no minimum or maximum
                // changes.
                let here = (column + i).min(last - 1);
                let mut at = here;
                if comptime!(gathered) {
                    at = position[here] as usize;
                }
                held[i] = weight[at * rows + row];
                if comptime!(updated) {
                    held[i] += update[(here - start as usize) * rows + row];
                }
            }
            #[unroll]
            for i in 0..AHEAD {
                low = low.min(held[i]);
                high = high.max(held[i]);
            }
            column += AHEAD;
        }
        let group = first / group_columns as usize;
        let scale = scale_of(low, high, max_code, symmetric);
        scales[group * rows + row] = scale;
        zeros[group * rows + row] = zero_of(low, high, scale, max_code, symmetric);
    }
}

/// Rounds each group of a row to nearest: one plane per group.
#[cube(launch_unchecked)]
fn round_to_nearest_kernel(
    weight: &Array<f16>,
    out: &mut Array<f16>,
    columns: u32,
    group_columns: u32,
    groups: u32,
    total: u32,
    max_code: f32,
    #[comptime] symmetric: bool,
) {
    let plane = CUBE_POS_X as usize * (UNITS / PLANE) + UNIT_POS as usize / PLANE;
    let lane = UNIT_POS as usize % PLANE;
    if plane < total as usize {
        let row = plane / groups as usize;
        let first = (plane % groups as usize) * group_columns as usize;
        let last = (first + group_columns as usize).min(columns as usize);
        let base = row * columns as usize;
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        let mut column = first + lane;
        while column < last {
            let w = f32::cast_from(weight[base + column]);
            low = low.min(w);
            high = high.max(w);
            column += PLANE;
        }
        let low = plane_min(low);
        let high = plane_max(high);
        let scale = scale_of(low, high, max_code, symmetric);
        let zero = zero_of(low, high, scale, max_code, symmetric);
        let mut column = first + lane;
        while column < last {
            let w = f32::cast_from(weight[base + column]);
            let code = ((w / scale).round() + zero)
                .max(f32::new(0.0))
                .min(max_code);
            out[base + column] = f16::cast_from(scale * (code - zero));
            column += PLANE;
        }
    }
}

/// Where the weights that a group's parameters come from are.
pub(crate) enum Source<'a> {
    /// The positions themselves, plus this f32 `[columns, rows]` update if there is one.
    Positions(Option<&'a Buffer>),
    /// The positions of the original columns, given for each.
    Original(&'a Buffer),
}

/// Finds the parameters of the groups that start in `columns`, a range of whole groups of
/// positions, or of original columns.
pub(crate) fn parameters(
    swept: &Swept,
    source: Source<'_>,
    columns: Range<usize>,
    group_columns: usize,
    settings: Settings,
) {
    let groups = columns.len().div_ceil(group_columns) as u32;
    let (update, position) = match source {
        Source::Positions(update) => (update, None),
        Source::Original(position) => (None, Some(position)),
    };
    // SAFETY: columns stay inside the range, rows below `rows`; arguments that are switched
    // off are not read.
    unsafe {
        parameters_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &swept.weight.client,
            CubeCount::new_2d((swept.rows as u32).div_ceil(UNITS as u32), groups),
            CubeDim::new_1d(UNITS as u32),
            array(&swept.weight),
            array(update.unwrap_or(&swept.group_of)),
            array(position.unwrap_or(&swept.group_of)),
            array(&swept.scales),
            array(&swept.zeros),
            columns.start as u32,
            columns.end as u32,
            group_columns as u32,
            swept.rows as u32,
            settings.max_code(),
            update.is_some(),
            position.is_some(),
            settings.symmetric,
        );
    }
}

/// The weights, f16 `[out, in]`, rounded to nearest in groups of their original columns and
/// dequantised again.
pub(crate) fn round_to_nearest(weight: &Buffer, settings: Settings) -> Buffer {
    let [rows, columns] = [weight.meta.shape()[0], weight.meta.shape()[1]];
    let out = buffer::empty(weight, [rows, columns], DType::F16);
    let groups = settings.groups(columns);
    let total = (rows * groups) as u32;
    // SAFETY: rows and columns stay inside the weight's shape.
    unsafe {
        round_to_nearest_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &out.client,
            CubeCount::new_1d(total.div_ceil((UNITS / PLANE) as u32)),
            CubeDim::new_1d(UNITS as u32),
            array(weight),
            array(&out),
            columns as u32,
            settings.group_columns(columns) as u32,
            groups as u32,
            total,
            settings.max_code(),
            settings.symmetric,
        );
    }
    out
}
