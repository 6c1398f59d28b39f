//! Scale and zero point of each group of columns, and rounding to nearest.
//!
//! Symmetric: `scale = 2 max|w| / (2^b - 1)`, `zero = 2^(b-1)`. Asymmetric: minimum and maximum
//! including zero, `scale = (max - min) / (2^b - 1)`, `zero = round(-min / scale)`. A group of
//! zeros gets the range from -1 to 1. The scale is rounded to f16 first (up to its smallest
//! positive value if it would vanish), and the rounded one is used throughout, as loaders multiply
//! by it.
//!
//! With a scale search, the range is multiplied by the one of `scale_factors` whose grid has the
//! least loss, `Σ M_kk² (w_k - q_k)²` over the group's columns: the cost of their errors in the
//! sweep (`gptq_solver::Grid::fit`). A symmetric grid is mirrored, with a negative scale, if the
//! largest weight is positive. The plain range wins ties.

use std::ops::Range;

use burn::tensor::DType;
use cubecl::prelude::*;
use gptq_solver::{Settings, scale_factors};
use half::f16;

use super::{
    buffer::{self, Buffer, array},
    sweep::{Swept, divide},
};

const UNITS: usize = 64;
/// Number of columns read ahead.
const AHEAD: usize = 8;
const PLANE: usize = 32;
/// The smallest positive f16, `2^-24`, and the largest f16.
const TINY: f32 = 5.960_464_5e-8;
const LARGEST: f32 = 65_504.0;
/// Rows per cube in the search.
const ROWS: usize = 32;
/// Units that share the factors and columns of a row.
const SLICES: usize = 8;
/// Factors per unit.
const EACH: usize = 4;
/// Index of the plain range among the factors.
const PLAIN: usize = SLICES * EACH - 1;

/// Returns the f16-rounded scale of a range.
#[cube]
fn scale_of(low: f32, high: f32, max_code: f32, #[comptime] symmetric: bool) -> f32 {
    let mut range = high - low;
    if comptime!(symmetric) {
        range = 2.0 * high.max(-low);
    }
    if range == 0.0 {
        range = f32::new(2.0);
    }
    f32::cast_from(f16::cast_from(range / max_code))
        .max(f32::new(TINY))
        .min(f32::new(LARGEST))
}

/// Returns the zero point of a range with this scale.
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

/// Finds the parameters of groups of positions, from weights stored column by column: one unit per
/// row, one cube row per group.
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
    each: u32,
    columns: u32,
    max_code: f32,
    #[comptime] updated: bool,
    #[comptime] gathered: bool,
    #[comptime] symmetric: bool,
) {
    let rows = rows as usize;
    let row = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let first = (start + CUBE_POS_Y * group_columns) as usize;
    let last = (first + group_columns as usize).min(end as usize);
    let own = row / each as usize * columns as usize;
    if row < rows {
        let mut low = f32::new(0.0);
        let mut high = f32::new(0.0);
        let mut column = first;
        while column < last {
            let mut held = Array::<f32>::new(AHEAD);
            #[unroll]
            for i in 0..AHEAD {
                // Beyond the group's end its last column is read again, which does not change
                // minimum and maximum.
                let here = (column + i).min(last - 1);
                let mut at = here;
                if comptime!(gathered) {
                    at = position[own + here] as usize;
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

/// Does the same as `parameters_kernel` with a search: a cube is `ROWS` rows of a group by `SLICES`
/// shares of the factors.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn search_kernel(
    weight: &Array<f32>,
    update: &Array<f32>,
    position: &Array<u32>,
    pivots: &Array<f32>,
    factors: &Array<f32>,
    scales: &mut Array<f32>,
    zeros: &mut Array<f32>,
    gained: &mut Array<f32>,
    start: u32,
    end: u32,
    group_columns: u32,
    rows: u32,
    each: u32,
    columns: u32,
    max_code: f32,
    #[comptime] updated: bool,
    #[comptime] gathered: bool,
    #[comptime] symmetric: bool,
) {
    let mut lows = SharedMemory::<f32>::new(SLICES * ROWS);
    let mut highs = SharedMemory::<f32>::new(SLICES * ROWS);
    let mut losses = SharedMemory::<f32>::new(EACH * SLICES * ROWS);
    let x = UNIT_POS_X as usize;
    let y = UNIT_POS_Y as usize;
    let rows = rows as usize;
    // Units beyond the last row repeat it, so that all units reach the barriers.
    let row = (CUBE_POS_X as usize * ROWS + x).min(rows - 1);
    let own = row / each as usize * columns as usize;
    let first = (start + CUBE_POS_Y * group_columns) as usize;
    let last = (first + group_columns as usize).min(end as usize);

    let mut low = f32::new(0.0);
    let mut high = f32::new(0.0);
    let mut column = first + y;
    while column < last {
        let mut at = column;
        if comptime!(gathered) {
            at = position[own + column] as usize;
        }
        let mut w = weight[at * rows + row];
        if comptime!(updated) {
            w += update[(column - start as usize) * rows + row];
        }
        low = low.min(w);
        high = high.max(w);
        column += SLICES;
    }
    lows[y * ROWS + x] = low;
    highs[y * ROWS + x] = high;
    sync_cube();
    #[unroll]
    for slice in 0..SLICES {
        low = low.min(lows[slice * ROWS + x]);
        high = high.max(highs[slice * ROWS + x]);
    }
    let mut sign = f32::new(1.0);
    if symmetric && high > -low {
        sign = f32::new(-1.0);
    }
    if low == 0.0 && high == 0.0 {
        low = f32::new(-1.0);
        high = f32::new(1.0);
    }

    let mut scale = Array::<f32>::new(EACH);
    let mut reciprocal = Array::<f32>::new(EACH);
    let mut zero = Array::<f32>::new(EACH);
    let mut loss = Array::<f32>::new(EACH);
    #[unroll]
    for i in 0..EACH {
        let factor = factors[i * SLICES + y];
        let tried = scale_of(low * factor, high * factor, max_code, symmetric);
        let turned = select(i * SLICES + y == PLAIN, f32::new(1.0), sign);
        scale[i] = tried * turned;
        reciprocal[i] = turned / tried;
        zero[i] = zero_of(low * factor, high * factor, tried, max_code, symmetric);
        loss[i] = f32::new(0.0);
    }
    let mut column = first;
    while column < last {
        let mut at = column;
        if comptime!(gathered) {
            at = position[own + column] as usize;
        }
        let mut w = weight[at * rows + row];
        if comptime!(updated) {
            w += update[(column - start as usize) * rows + row];
        }
        let pivot = pivots[own + at];
        let cost = pivot * pivot;
        #[unroll]
        for i in 0..EACH {
            let code = (divide(w, scale[i], reciprocal[i]).round() + zero[i])
                .max(f32::new(0.0))
                .min(max_code);
            let error = w - scale[i] * (code - zero[i]);
            loss[i] += cost * error * error;
        }
        column += 1;
    }
    #[unroll]
    for i in 0..EACH {
        losses[(i * SLICES + y) * ROWS + x] = loss[i];
    }
    sync_cube();
    if y == 0 {
        let mut best = losses[PLAIN * ROWS + x];
        let mut factor = f32::new(1.0);
        let mut turned = f32::new(1.0);
        #[unroll]
        for i in 0..PLAIN {
            if losses[i * ROWS + x] < best {
                best = losses[i * ROWS + x];
                factor = factors[i];
                turned = sign;
            }
        }
        let chosen = scale_of(low * factor, high * factor, max_code, symmetric);
        let group = first / group_columns as usize;
        scales[group * rows + row] = chosen * turned;
        gained[group * rows + row] = losses[PLAIN * ROWS + x] - best;
        zeros[group * rows + row] =
            zero_of(low * factor, high * factor, chosen, max_code, symmetric);
    }
}

/// Rounds each group of a row to nearest: one plane per group.
#[cube(launch_unchecked)]
fn round_to_nearest_kernel<F: Float>(
    weight: &Array<F>,
    out: &mut Array<F>,
    columns: u32,
    group_columns: u32,
    groups: u32,
    total: u32,
    max_code: f32,
    #[comptime] symmetric: bool,
    #[define(F)] _dtype: StorageType,
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
            out[base + column] = F::cast_from(scale * (code - zero));
            column += PLANE;
        }
    }
}

/// Location of the weights that a group's parameters are computed from.
pub(crate) enum WeightSource<'a> {
    /// The positions themselves, plus this f32 `[columns, rows]` update if present.
    Positions(Option<&'a Buffer>),
    /// The positions of the original columns of each problem, listed here.
    Original(&'a Buffer),
}

/// Inputs of the scale search besides the weights.
pub(crate) struct Search {
    /// `M`'s diagonal, by position, `[problems, in]`.
    pivots: Buffer,
    factors: Buffer,
}

impl Search {
    pub(crate) fn new(pivots: &Buffer, settings: &Settings) -> Self {
        let factors = scale_factors(settings).map(|f| f as f32);
        Self {
            pivots: pivots.clone(),
            factors: buffer::upload(pivots, &factors, DType::F32),
        }
    }
}

/// Finds the parameters of the groups that start in `columns`, a range of whole groups of positions
/// or of original columns; with a `search`, scales are searched.
pub(crate) fn parameters(
    swept: &Swept,
    source: WeightSource<'_>,
    columns: Range<usize>,
    group_columns: usize,
    settings: Settings,
    search: Option<&Search>,
) {
    let groups = columns.len().div_ceil(group_columns) as u32;
    let rows = swept.rows as u32;
    let (update, position) = match source {
        WeightSource::Positions(update) => (update, None),
        WeightSource::Original(position) => (None, Some(position)),
    };
    let max_code = f32::from(settings.bits.max_code());
    // SAFETY: columns stay inside the range, rows below `rows`; arguments that are switched off are
    // not read. In the search, shared indices stay below the arrays' lengths, pivots are read at
    // positions, and factors below their count.
    unsafe {
        match search {
            None => parameters_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &swept.weight.client,
                CubeCount::new_2d(rows.div_ceil(UNITS as u32), groups),
                CubeDim::new_1d(UNITS as u32),
                array(&swept.weight),
                array(update.unwrap_or(&swept.group_of)),
                array(position.unwrap_or(&swept.group_of)),
                array(&swept.scales),
                array(&swept.zeros),
                columns.start as u32,
                columns.end as u32,
                group_columns as u32,
                rows,
                swept.rows_each() as u32,
                swept.weight.meta.shape()[0] as u32,
                max_code,
                update.is_some(),
                position.is_some(),
                settings.sym,
            ),
            Some(search) => search_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &swept.weight.client,
                CubeCount::new_2d(rows.div_ceil(ROWS as u32), groups),
                CubeDim::new_2d(ROWS as u32, SLICES as u32),
                array(&swept.weight),
                array(update.unwrap_or(&search.pivots)),
                array(position.unwrap_or(&swept.group_of)),
                array(&search.pivots),
                array(&search.factors),
                array(&swept.scales),
                array(&swept.zeros),
                array(&swept.gained),
                columns.start as u32,
                columns.end as u32,
                group_columns as u32,
                rows,
                swept.rows_each() as u32,
                swept.weight.meta.shape()[0] as u32,
                max_code,
                update.is_some(),
                position.is_some(),
                settings.sym,
            ),
        }
    }
}

/// Rounds the weights, f16 or bf16 `[out, in]`, to nearest in groups of their original columns, and
/// dequantizes them.
pub(crate) fn round_to_nearest(weight: &Buffer, settings: Settings) -> Buffer {
    let [rows, columns] = [weight.meta.shape()[0], weight.meta.shape()[1]];
    let out = buffer::empty(weight, [rows, columns], weight.dtype);
    let groups = settings.group_size.groups(columns);
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
            settings.group_size.columns(columns).min(columns) as u32,
            groups as u32,
            total,
            f32::from(settings.bits.max_code()),
            settings.sym,
            weight.dtype.into(),
        );
    }
    out
}

const _: () = assert!(SLICES * EACH == 32, "one factor each");
