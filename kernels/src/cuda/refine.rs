//! Coordinate descent on the codes after the sweep (`gptq_solver::refine`), one row per unit.
//!
//! With `D = W - Q` and `R = H D` (all column by column, `[in, rows]`, `H` damped, in the sweep's
//! order), each column in turn is rounded to the code nearest to `q_j + r_j / H_jj`; a step `δ`
//! subtracts `δ H_jk` from `r_k` for the later columns of the panel. A panel's steps are then
//! subtracted from all of `R` by one product. Registers and shared memory are used as in the sweep.

use std::ops::Range;

use burn::tensor::DType;
use cubecl::{cuda::CudaRuntime, prelude::*};
use gptq_solver::Settings;

use super::{
    blas::{Element, Matrices, MatrixAt, product_of_each},
    buffer::{self, Buffer, array},
    error::Error,
    factor::{PANEL, panels},
    stream::on_stream_later,
    sweep::{Swept, divide},
};

const UNITS: usize = 64;
/// Columns held in registers.
const HELD: usize = 32;
/// Values per shared-memory access.
const QUAD: usize = 4;

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn refine_kernel(
    h: &Array<Vector<f32, Const<4>>>,
    residual: &Array<f32>,
    scales: &Array<f32>,
    zeros: &Array<f32>,
    group_of: &Array<u32>,
    off: &mut Array<f32>,
    codes: &mut Array<u8>,
    back: &mut Array<f32>,
    gained: &mut Array<f32>,
    unrounded: &mut Array<f32>,
    start: u32,
    width: u32,
    columns: u32,
    rows: u32,
    cubes: u32,
    max_code: f32,
    keep: u32,
) {
    let mut block = SharedMemory::<Vector<f32, Const<4>>>::new(PANEL * PANEL / QUAD);
    let mut inverse = SharedMemory::<f32>::new(PANEL);
    let mut steps = SharedMemory::<f32>::new(PANEL * UNITS);
    let unit = UNIT_POS as usize;
    let each = rows as usize;
    let rows = each * (CUBE_COUNT_X / cubes) as usize;
    let start = start as usize;
    let width = width as usize;
    let columns = columns as usize;
    let problem = (CUBE_POS_X / cubes) as usize;
    let of_problem = problem * columns;
    #[unroll]
    for turn in 0..PANEL * PANEL / QUAD / UNITS {
        let at = turn * UNITS + unit;
        let i = at * QUAD / PANEL;
        let j = at * QUAD % PANEL;
        // A panel's width is a multiple of 32 columns.
        let mut four = Vector::<f32, Const<4>>::new(0.0);
        if i < width && j < width {
            four = h[((of_problem + start + i) * columns + start + j) / QUAD];
        }
        block[at] = four;
    }
    sync_cube();
    #[unroll]
    for half in 0..PANEL / UNITS {
        let column = half * UNITS + unit;
        let quad = block[(column * PANEL + column) / QUAD];
        let mut value = quad[0];
        #[unroll]
        for lane in 1..QUAD {
            if column % QUAD == lane {
                value = quad[lane];
            }
        }
        inverse[column] = 0.0;
        if column < width {
            inverse[column] = 1.0 / value;
        }
    }
    sync_cube();

    let in_problem = (CUBE_POS_X % cubes) as usize * UNITS + unit;
    let row = problem * each + in_problem;
    if in_problem < each {
        let mut lower = gained[row];
        let mut first = 0;
        while first < width {
            let mut r = Array::<f32>::new(HELD);
            let mut scale = Array::<f32>::new(HELD);
            let mut zero = Array::<f32>::new(HELD);
            let mut code = Array::<f32>::new(HELD);
            #[unroll]
            for c in 0..HELD {
                let at = start + first + c;
                let group = group_of[of_problem + at] as usize * rows + row;
                scale[c] = scales[group];
                zero[c] = zeros[group];
                code[c] = f32::cast_from(codes[at * rows + row]);
                r[c] = residual[at * rows + row];
            }
            let mut j = 0;
            while j < first {
                let step = steps[j * UNITS + unit];
                #[unroll]
                for quad in 0..HELD / QUAD {
                    let factors = block[(j * PANEL + first) / QUAD + quad];
                    #[unroll]
                    for lane in 0..QUAD {
                        r[quad * QUAD + lane] -= step * factors[lane];
                    }
                }
                j += 1;
            }
            #[unroll]
            for c in 0..HELD {
                let column = first + c;
                let best = scale[c] * (code[c] - zero[c]) + r[c] * inverse[column];
                let steps_of_zero = divide(best, scale[c], 1.0 / scale[c]);
                let new = (steps_of_zero.round() + zero[c])
                    .max(f32::new(0.0))
                    .min(max_code);
                let step = scale[c] * (new - zero[c]) - scale[c] * (code[c] - zero[c]);
                // `first` is a multiple of 32, so this is the column's index in its quad.
                let pivot = block[(column * PANEL + column) / QUAD][c % QUAD];
                lower += step * (r[c] + r[c] - step * pivot);
                #[unroll]
                for quad in 0..HELD / QUAD {
                    if comptime!(quad * QUAD + 3 > c) {
                        let factors = block[(column * PANEL + first) / QUAD + quad];
                        #[unroll]
                        for lane in 0..QUAD {
                            if comptime!(quad * QUAD + lane > c) {
                                r[quad * QUAD + lane] -= step * factors[lane];
                            }
                        }
                    }
                }
                steps[column * UNITS + unit] = step;
                back[column * rows + row] = -step;
                let at = (start + column) * rows + row;
                codes[at] = u8::cast_from(new);
                off[at] -= step;
                // A runtime switch, because this kernel takes long to compile.
                if keep == 1 {
                    unrounded[at] = (steps_of_zero + zero[c]).max(new - 0.5).min(new + 0.5);
                }
            }
            first += HELD;
        }
        gained[row] = lower;
    }
}

/// Refines the codes in `settings.refine` passes; `h` is each problem's damped Gram matrix in the sweep's
/// order, `[problems, in, in]`. Returns the reduction of each row's loss, f32 `[rows]`, and with `keep` the numbers that the last pass
/// rounded to the codes, f32 `[in, rows]`.
pub(crate) fn refine(
    h: &Buffer,
    swept: &Swept,
    settings: Settings,
    keep: bool,
) -> Result<(Buffer, Option<Buffer>), Error> {
    let n = swept.weight.meta.shape()[0];
    let unrounded = keep.then(|| buffer::empty(&swept.weight, [n, swept.rows], DType::F32));
    let residual = buffer::empty(&swept.weight, [n, swept.rows], DType::F32);
    let back = buffer::empty(&swept.weight, [PANEL, swept.rows], DType::F32);
    let gained = buffer::upload(h, &vec![0.0_f32; swept.rows], DType::F32);
    add_product(h, swept, 0..n, &swept.weight, &residual, 0.0)?;
    for _ in 0..settings.refine {
        for panel in panels(n, PANEL) {
            let unrounded = unrounded.as_ref();
            launch(
                h,
                &residual,
                swept,
                [&back, &gained],
                unrounded,
                &panel,
                settings,
            );
            add_product(h, swept, panel, &back, &residual, 1.0)?;
        }
    }
    Ok((gained, unrounded))
}

fn launch(
    h: &Buffer,
    residual: &Buffer,
    swept: &Swept,
    [back, gained]: [&Buffer; 2],
    unrounded: Option<&Buffer>,
    panel: &Range<usize>,
    settings: Settings,
) {
    let cubes = swept.cubes(UNITS);
    // SAFETY: the panel is a multiple of 32 columns (the number of columns is), all of them columns of
    // every buffer; rows stay below `rows`, shared indices below PANEL² and PANEL * UNITS. Without a buffer
    // for unrounded numbers its argument is not written.
    unsafe {
        refine_kernel::launch_unchecked::<CudaRuntime>(
            &h.client,
            CubeCount::new_1d(cubes * swept.problems as u32),
            CubeDim::new_1d(UNITS as u32),
            array(h),
            array(residual),
            array(&swept.scales),
            array(&swept.zeros),
            array(&swept.group_of),
            array(&swept.weight),
            array(&swept.codes),
            array(back),
            array(gained),
            array(unrounded.unwrap_or(gained)),
            panel.start as u32,
            panel.len() as u32,
            swept.weight.meta.shape()[0] as u32,
            swept.rows_each() as u32,
            cubes,
            f32::from(settings.bits.max_code()),
            u32::from(unrounded.is_some()),
        );
    }
}

/// Computes `out = H[:, columns] · x + beta · out` for `x` f32 `[columns, rows]`, each problem's rows with its `H`.
fn add_product(
    h: &Buffer,
    swept: &Swept,
    columns: Range<usize>,
    x: &Buffer,
    out: &Buffer,
    beta: f32,
) -> Result<(), Error> {
    let [n, rows] = [out.meta.shape()[0], out.meta.shape()[1]];
    let (problems, each) = (swept.problems, swept.rows_each());
    let spans = swept.spans.clone();
    on_stream_later(&[h, x, out], move |libraries, pointers| {
        let matrices = |at: usize, start, stride, step| Matrices {
            first: MatrixAt::at(pointers[at], start, stride, Element::F32),
            step,
        };
        let h = matrices(0, columns.start, n, n * n);
        for [first, width] in spans {
            let [x, out] = [1, 2].map(|at| matrices(at, first, rows, each));
            let dimensions = [n, width, columns.len()];
            // SAFETY: the columns lie inside H, x has as many rows, out is `[n, rows]`, and the span inside the rows of each
            // problem.
            unsafe { product_of_each(libraries, problems, dimensions, [h, x], beta, out)? };
        }
        Ok(())
    })
}
