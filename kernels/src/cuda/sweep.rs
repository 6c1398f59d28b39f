//! One panel of GPTQ's column sweep: one launch for all rows, one row per unit.
//!
//! Weights, codes and group parameters are stored column by column, `[in, rows]`, so that the units
//! of a plane access adjacent elements. The panel's columns start as `W + T`, where `T` carries the
//! errors of earlier panels; then, for each column `j`,
//!
//! `q = clamp(round(w_j / scale) + zero)`, `err = (w_j - scale (q - zero)) / U_jj`,
//! `w_k -= err U_jk` for the columns `k > j` of the panel,
//!
//! rounding half to even (the inner loop of AutoGPTQ's `fasterquant`). Thirty-two columns at a time
//! are held in registers; the errors of the panel's earlier columns are read from shared memory.
//! The weights are overwritten by `W - Q`, which later panels' products read.

use std::ops::Range;

use cubecl::prelude::*;
use gptq_solver::Settings;

use super::{
    buffer::{Buffer, array},
    factor::PANEL,
};

const UNITS: usize = 64;
/// Columns held in registers.
const HELD: usize = 32;
/// Values per shared-memory access.
const QUAD: usize = 4;

/// Computes `w / scale`, correctly rounded, from the correctly rounded reciprocal: one Newton step
/// on the quotient (Markstein). A true division costs several times as long, and a plain product
/// would break the ties that symmetric scales make common.
#[cube]
pub(crate) fn divide(w: f32, scale: f32, reciprocal: f32) -> f32 {
    let quotient = w * reciprocal;
    let remainder = fma(-quotient, scale, w);
    fma(remainder, reciprocal, quotient)
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn sweep_kernel(
    weight: &mut Array<f32>,
    update: &Array<f32>,
    inverse: &Array<Vector<f32, Const<4>>>,
    scales: &Array<f32>,
    zeros: &Array<f32>,
    group_of: &Array<u32>,
    codes: &mut Array<u8>,
    block: u32,
    start: u32,
    width: u32,
    rows: u32,
    columns: u32,
    cubes: u32,
    panels: u32,
    max_code: f32,
    updated: u32,
) {
    let mut u = SharedMemory::<Vector<f32, Const<4>>>::new(PANEL * PANEL / QUAD);
    let mut diagonal = SharedMemory::<f32>::new(PANEL);
    let mut errors = SharedMemory::<f32>::new(PANEL * UNITS);
    let unit = UNIT_POS as usize;
    let problem = CUBE_POS_X / cubes;
    let base = (problem * panels + block) as usize * PANEL * PANEL / QUAD;
    #[unroll]
    for turn in 0..PANEL * PANEL / QUAD / UNITS {
        let at = turn * UNITS + unit;
        u[at] = inverse[base + at];
    }
    sync_cube();
    #[unroll]
    for half in 0..PANEL / UNITS {
        let column = half * UNITS + unit;
        let quad = u[(column * PANEL + column) / QUAD];
        let mut value = quad[0];
        #[unroll]
        for lane in 1..QUAD {
            if column % QUAD == lane {
                value = quad[lane];
            }
        }
        diagonal[column] = 1.0 / value;
    }
    sync_cube();

    let each = rows as usize;
    let rows = each * (CUBE_COUNT_X / cubes) as usize;
    let start = start as usize;
    let width = width as usize;
    let of_problem = (CUBE_POS_X % cubes) as usize * UNITS + unit;
    let row = problem as usize * each + of_problem;
    let groups = problem as usize * columns as usize + start;
    if of_problem < each {
        let mut first = 0;
        while first < width {
            let mut w = Array::<f32>::new(HELD);
            let mut original = Array::<f32>::new(HELD);
            let mut scale = Array::<f32>::new(HELD);
            let mut zero = Array::<f32>::new(HELD);
            #[unroll]
            for c in 0..HELD {
                let column = first + c;
                w[c] = f32::new(0.0);
                original[c] = f32::new(0.0);
                scale[c] = f32::new(1.0);
                zero[c] = f32::new(0.0);
                if column < width {
                    let group = group_of[groups + column] as usize * rows + row;
                    scale[c] = scales[group];
                    zero[c] = zeros[group];
                    original[c] = weight[(start + column) * rows + row];
                    // A runtime switch, because this kernel takes long to compile.
                    if updated == 1 {
                        w[c] = update[column * rows + row];
                    }
                }
            }
            #[unroll]
            for c in 0..HELD {
                w[c] += original[c];
            }
            let mut j = 0;
            while j < first {
                let err = errors[j * UNITS + unit];
                #[unroll]
                for quad in 0..HELD / QUAD {
                    let factors = u[(j * PANEL + first) / QUAD + quad];
                    #[unroll]
                    for lane in 0..QUAD {
                        w[quad * QUAD + lane] -= err * factors[lane];
                    }
                }
                j += 1;
            }
            #[unroll]
            for c in 0..HELD {
                let column = first + c;
                let code = (divide(w[c], scale[c], 1.0 / scale[c]).round() + zero[c])
                    .max(f32::new(0.0))
                    .min(max_code);
                let q = scale[c] * (code - zero[c]);
                let err = (w[c] - q) * diagonal[column];
                #[unroll]
                for quad in 0..HELD / QUAD {
                    if comptime!(quad * QUAD + 3 > c) {
                        let factors = u[(column * PANEL + first) / QUAD + quad];
                        #[unroll]
                        for lane in 0..QUAD {
                            if comptime!(quad * QUAD + lane > c) {
                                w[quad * QUAD + lane] -= err * factors[lane];
                            }
                        }
                    }
                }
                errors[column * UNITS + unit] = err;
                if column < width {
                    let at = (start + column) * rows + row;
                    codes[at] = u8::cast_from(code);
                    weight[at] = original[c] - q;
                }
            }
            first += HELD;
        }
    }
}

/// Buffers of a sweep, all column by column: `[in, rows]`, parameters `[groups, rows]`. The rows are those of one
/// problem after the other, as many of each.
pub(crate) struct Swept {
    /// f32 weights in the sweep's order; `W - Q` in finished panels.
    pub(crate) weight: Buffer,
    /// u8 codes in the sweep's order.
    pub(crate) codes: Buffer,
    /// f32 scales, already rounded to f16.
    pub(crate) scales: Buffer,
    /// f32 zero points.
    pub(crate) zeros: Buffer,
    /// f32 reduction of each group's loss by the scale search; undefined without one.
    pub(crate) gained: Buffer,
    /// u32 group of each position of the sweep, `[problems, in]`.
    pub(crate) group_of: Buffer,
    /// Rows of all layers of all problems together.
    pub(crate) rows: usize,
    /// Runs of rows of a problem that products take at once, as `[first, number]`: see [`Swept::spans`].
    pub(crate) spans: Vec<[usize; 2]>,
    /// Number of problems, each with a Gram matrix of its own.
    pub(crate) problems: usize,
}

impl Swept {
    /// Returns the runs of a problem's rows that products take at once: those of each layer, because cuBLAS chooses its
    /// kernel by the number of rows, and a layer's codes are not to depend on which other layers are solved beside it. A
    /// batch of several problems is always solved whole, and takes all rows of each.
    pub(crate) fn spans(layers: &[usize], problems: usize) -> Vec<[usize; 2]> {
        if problems > 1 {
            return vec![[0, layers.iter().sum()]];
        }
        let mut first = 0;
        let spans = layers.iter().map(|&rows| {
            first += rows;
            [first - rows, rows]
        });
        spans.collect()
    }

    /// Rows of a problem.
    pub(crate) fn rows_each(&self) -> usize {
        self.rows / self.problems
    }

    /// Cubes of `units` rows that a problem takes.
    pub(crate) fn cubes(&self, units: usize) -> u32 {
        self.rows_each().div_ceil(units) as u32
    }
}

/// Sweeps one panel; `update` is f32 `[panel, rows]`, `None` for the first panel; `inverses` is as
/// [`block_inverses`](super::factor::block_inverses) gives it.
pub(crate) fn sweep(
    swept: &Swept,
    update: Option<&Buffer>,
    inverses: &Buffer,
    block: usize,
    panel: &Range<usize>,
    settings: Settings,
) {
    let cubes = swept.cubes(UNITS);
    let panels = inverses.meta.shape()[1] as u32;
    // SAFETY: columns stay inside the panel, rows below `rows`, shared indices below PANEL²
    // and PANEL * UNITS; without an update its argument is not read.
    unsafe {
        sweep_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
            &swept.weight.client,
            CubeCount::new_1d(cubes * swept.problems as u32),
            CubeDim::new_1d(UNITS as u32),
            array(&swept.weight),
            array(update.unwrap_or(&swept.scales)),
            array(inverses),
            array(&swept.scales),
            array(&swept.zeros),
            array(&swept.group_of),
            array(&swept.codes),
            block as u32,
            panel.start as u32,
            panel.len() as u32,
            swept.rows_each() as u32,
            swept.weight.meta.shape()[0] as u32,
            cubes,
            panels,
            f32::from(settings.bits.max_code()),
            u32::from(update.is_some()),
        );
    }
}
