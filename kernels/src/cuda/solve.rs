//! GPTQ for all linear layers that share an input: one factorisation, one sweep per setting; for several inputs that
//! are alike, such as experts', in the same launches.
//!
//! Left-looking, in panels of at most 128 columns. Before panel `b`, with `D = W - Q` of the
//! columns swept so far,
//!
//! `W_b += D[:, <b] · M[<b, b] · inv(M_bb)`,
//!
//! two true-f32 products (`M` as in the factor); the part of the first that comes from before
//! the current stretch of [`STRETCH`] columns is taken for the whole stretch at once, where
//! cuBLAS has more to do in parallel. Group parameters are those of the weights at this point,
//! before the panel's own sweep. A group wider than a panel gets its parameters from the same
//! formula with the whole group as the block, solved as a triangular system.

use std::{ops::Range, time::Instant};

use burn::tensor::{DType, Int, Tensor, TensorData};
use cudarc::cublas::sys as cublas;
use gptq_solver::{Gains, Settings};

use super::{
    Cuda,
    arrange::{codes, dequantize, into_columns},
    blas::{Element, Matrices, MatrixAt, product_of_each},
    buffer::{self, Buffer, part},
    cholesky::Failed,
    error::Error,
    factor::{DeviceFactors, PANEL, block_inverses, factor, panels, reordered},
    groups::{Search, WeightSource, parameters, round_to_nearest},
    refine::refine,
    relative_error::{Correlation, Measurement, Sum, Sums},
    stream::on_stream_later,
    sweep::{Swept, sweep},
    target::MismatchTarget,
};
use crate::{Codes, HessianOptions, Problem, Request, SolveTimes, Solved, Subset};

/// Columns whose errors from before them are taken together.
const STRETCH: usize = 8 * PANEL;

/// Rows of the layers that are swept together, about: enough for a device's multiprocessors, few enough that the
/// buffers of the sweep stay small.
const BATCH_ROWS: usize = 32_768;

/// Quantizes the linear layers of each of some inputs; those of inputs that are alike in shapes and settings in batched
/// launches.
///
/// A Gram matrix is f32 `[in, in]`, of which the upper triangle is read; each weight is `[out, in]`, all f16 or
/// all bf16.
/// Waits for the device twice for the factors of a batch and once for its errors.
///
/// # Errors
///
/// The problem, and: dtypes, shapes or settings that do not fit, a Gram matrix without a factor, or a library's
/// failure.
pub fn solve(
    problems: Vec<Problem<Cuda>>,
    hessian: HessianOptions,
) -> Result<Vec<Subset<Cuda>>, Failed> {
    let mut subsets = Vec::with_capacity(problems.len());
    let mut left = problems.into_iter().peekable();
    while let Some(first) = left.next() {
        let rows: usize = first.requests.iter().map(|it| it.weight.dims()[0]).sum();
        let most = (BATCH_ROWS / rows.max(1)).max(1);
        let mut batch = vec![first];
        while batch.len() < most
            && let Some(next) = left.next_if(|next| next.is_like(&batch[0]))
        {
            batch.push(next);
        }
        let before = subsets.len();
        subsets.extend(solve_batch(batch, hessian).map_err(|failed| failed.after(before))?);
    }
    Ok(subsets)
}

/// Buffers of a solved layer whose sums have not been read.
struct Unread {
    codes: Codes<Cuda>,
    weight: Buffer,
    nearest: Buffer,
    unrounded: Option<Tensor<Cuda, 2>>,
}

/// Does the same for problems that are alike.
fn solve_batch(
    problems: Vec<Problem<Cuda>>,
    hessian: HessianOptions,
) -> Result<Vec<Subset<Cuda>>, Failed> {
    let started = Instant::now();
    let (count, n) = (problems.len(), problems[0].gram.dims()[0]);
    check(&problems[0])?;
    let (mut grams, mut mismatches, mut requests) = (Vec::new(), Vec::new(), Vec::new());
    for problem in problems {
        grams.push(buffer::float("solve", "gram", problem.gram, DType::F32)?);
        mismatches.extend(problem.mismatch);
        requests.push(problem.requests);
    }
    let weights = requests.iter().map(|requests| {
        let weights = requests.iter().map(|it| it.weight.clone());
        let weights = weights.map(|weight| buffer::half("solve", "weight", weight));
        weights.collect::<Result<Vec<_>, _>>()
    });
    let weights: Vec<Vec<Buffer>> = weights.collect::<Result<_, _>>()?;
    let factors = factor(&grams, hessian.act_order, hessian.damping)?;
    let targets = match mismatches.is_empty() {
        true => Vec::new(),
        false => MismatchTarget::each(mismatches, n, hessian.damping)?,
    };
    let factored = Instant::now();
    let settings: Vec<Settings> = requests[0].iter().map(|it| it.settings).collect();
    let refined = settings.iter().any(|settings| settings.refine > 0);
    let h = refined.then(|| reordered(&grams, &factors));
    let columns = &factors.columns;
    let position: Vec<u32> = columns.iter().flat_map(|it| it.position.clone()).collect();
    let diagonal: Vec<f32> = columns.iter().flat_map(|it| it.diagonal.clone()).collect();
    let position = buffer::upload(&grams[0], &position, DType::U32);
    let diagonal = buffer::upload(&grams[0], &diagonal, DType::F32);
    let of = |all: &Buffer, problem: usize| part(all, problem * n, [n]);
    let correlations = grams.iter().zip(columns);
    let correlations: Vec<Correlation> = correlations
        .map(|(gram, columns)| Correlation::new(gram, &columns.diagonal))
        .collect();
    drop(grams);

    let each = settings.len();
    let measurement = Measurement::new(&position, count * each);
    let mut unread: Vec<Option<Unread>> = (0..count * each).map(|_| None).collect();
    for (first, &settings_here) in settings.iter().enumerate() {
        if unread[first].is_some() {
            continue;
        }
        let settings_of = &settings;
        let members: Vec<usize> = (first..each)
            .filter(|&at| settings_of[at] == settings_here)
            .collect();
        let settings = settings_here;
        let rows_of = |at: usize| weights[0][at].meta.shape()[0];
        let rows: usize = members.iter().map(|&at| rows_of(at)).sum();
        let all = buffer::empty(&position, [n, count * rows], DType::F32);
        let mut rounded = Vec::with_capacity(count * members.len());
        for problem in 0..count {
            let mut offset = problem * rows;
            for &at in &members {
                let own = &weights[problem][at];
                let target = targets.get(problem).map(|target| {
                    let residual = requests[problem][at].residual.as_ref();
                    target.of(own, residual, &measurement, problem * each + at)
                });
                let target = target.transpose()?;
                let weight = target.as_ref().unwrap_or(own);
                let order = [of(&position, problem), of(&diagonal, problem)];
                into_columns(weight, &order[0], &order[1], &all, offset);
                offset += rows_of(at);
                rounded.push(target);
            }
        }
        let swept = sweep_all(&factors, &position, all, settings)?;
        let keep = members.iter().any(|&at| requests[0][at].keep_unrounded);
        let refined = (h.as_ref().filter(|_| settings.refine > 0))
            .map(|h| refine(h, &swept.swept, settings, keep))
            .transpose()?;
        let (refined, unrounded) = match refined {
            Some((gained, unrounded)) => (Some(gained), unrounded),
            None => (None, None),
        };
        let mut rounded = rounded.into_iter();
        for problem in 0..count {
            let (swept, g_idx) = (&swept.swept, &swept.g_idx[problem]);
            let position = of(&position, problem);
            let group_of = of(&swept.group_of, problem);
            let correlation = &correlations[problem];
            let mut offset = problem * rows;
            for (&at, rounded) in members.iter().zip(&mut rounded) {
                let (own, slot) = (&weights[problem][at], problem * each + at);
                let span = [offset, rows_of(at)];
                let weight = dequantize(swept, [&position, &group_of], span, own.dtype);
                let nearest = round_to_nearest(own, settings);
                measurement.energy(correlation, own, (slot, Sum::Output))?;
                measurement.loss(correlation, [own, &weight], (slot, Sum::Lost))?;
                measurement.loss(correlation, [own, &nearest], (slot, Sum::Nearest))?;
                if let Some(rounded) = rounded {
                    let found: Tensor<Cuda, 2> = buffer::into_float(weight.clone());
                    let found =
                        buffer::float("solve", "weight", found.cast(DType::F32), DType::F32)?;
                    measurement.loss(correlation, [&rounded, &found], (slot, Sum::Objective))?;
                }
                if settings.scale_search {
                    measurement.columns(&swept.gained, span, (slot, Sum::Searched));
                }
                if let Some(refined) = &refined {
                    measurement.columns(refined, span, (slot, Sum::Refined));
                }
                let codes = codes(swept, &position, g_idx, span, settings.bits);
                let unrounded = requests[problem][at]
                    .keep_unrounded
                    .then(|| match &unrounded {
                        Some(unrounded) => {
                            in_own_order(unrounded, &columns[problem].position, span)
                        }
                        None => codes.codes.clone().transpose().float().cast(DType::F32),
                    });
                unread[slot] = Some(Unread {
                    codes,
                    weight,
                    nearest,
                    unrounded,
                });
                offset += rows_of(at);
            }
        }
    }
    let mut sums = measurement.read()?.into_iter();
    let mut unread = unread.into_iter();
    // Several at the same time: their shares of it.
    let share = |seconds: f64| seconds / count as f64;
    let times = SolveTimes {
        factor: share((factored - started).as_secs_f64()),
        sweep: share(factored.elapsed().as_secs_f64()),
    };
    let subsets = (0..count).map(|problem| {
        let target = targets.get(problem);
        let solved = unread.by_ref().take(each).zip(sums.by_ref()).zip(&settings);
        let solved = solved.map(|((unread, sums), settings)| {
            let unread = unread.expect("every layer is a member of its settings");
            finished(unread, sums, settings, target)
        });
        Subset {
            solved: solved.collect(),
            damping: factors.damping[problem],
            dead_columns: columns[problem].dead,
            times,
        }
    });
    Ok(subsets.collect())
}

/// Joins a layer with its sums.
fn finished(
    unread: Unread,
    sums: Sums,
    settings: &Settings,
    target: Option<&MismatchTarget>,
) -> Solved<Cuda> {
    let output = sums.of(Sum::Output);
    let rounded = match target {
        Some(_) => Sum::Objective,
        None => Sum::Lost,
    };
    Solved {
        codes: unread.codes,
        weight: buffer::into_float(unread.weight),
        nearest: buffer::into_float(unread.nearest),
        unrounded: unread.unrounded,
        relative_error: Sums::part(sums.of(Sum::Lost), output),
        rtn_error: Sums::part(sums.of(Sum::Nearest), output),
        objective: Some(Sums::part(sums.of(rounded), output)),
        gains: gains(settings, target, sums),
    }
}

/// Computes the gains of the options from the sums.
fn gains(settings: &Settings, target: Option<&MismatchTarget>, sums: Sums) -> Gains {
    let output = sums.of(Sum::Output);
    let part = |sum| Sums::part(sums.of(sum), output);
    Gains {
        scale_search: settings.scale_search.then(|| part(Sum::Searched)),
        mismatch_correction: target.map(|target| {
            let gain = target.gain(sums.of(Sum::Toward), sums.of(Sum::Shift));
            Sums::part(gain, sums.of(Sum::Drifted))
        }),
        refine: (settings.refine > 0).then(|| part(Sum::Refined)),
    }
}

/// Returns some rows of `columns`, f32 `[in, rows]` in the sweep's order, as `[out, in]` in the columns' own order:
/// `span` is the first row and how many.
fn in_own_order(columns: &Buffer, position: &[u32], span: [usize; 2]) -> Tensor<Cuda, 2> {
    let columns: Tensor<Cuda, 2> = buffer::into_float(columns.clone());
    let position: Vec<i32> = position.iter().map(|&at| at as i32).collect();
    let position = Tensor::<Cuda, 1, Int>::from_data(
        TensorData::new(position, [columns.dims()[0]]),
        (&columns.device(), DType::I32),
    );
    let rows = columns.narrow(1, span[0], span[1]);
    rows.select(0, position).transpose()
}

fn check(problem: &Problem<Cuda>) -> Result<(), Error> {
    let refuse = |reason| {
        Err(Error::Shape {
            operation: "solve",
            reason,
        })
    };
    let [n, columns] = problem.gram.dims();
    if n != columns || n == 0 || !n.is_multiple_of(32) {
        return refuse(format!(
            "a Gram matrix [{n}, {columns}]: not square, or not of a multiple of 32 columns"
        ));
    }
    for Request {
        weight, settings, ..
    } in &problem.requests
    {
        let [out, inside] = weight.dims();
        if inside != n || !out.is_multiple_of(32) {
            return refuse(format!(
                "a weight [{out}, {inside}] with {n} input columns, or not of a multiple of 32 \
                 rows"
            ));
        }
        if !settings.f16_scales {
            return refuse("scales that are not rounded to f16".into());
        }
    }
    Ok(())
}

/// Buffers after a sweep, and the group of each original column of each problem.
struct SweptGroups {
    swept: Swept,
    g_idx: Vec<Vec<i32>>,
}

/// Sweeps all columns of `weight`, f32 `[in, rows]`, the rows of one problem after the other.
fn sweep_all(
    factors: &DeviceFactors,
    position: &Buffer,
    weight: Buffer,
    settings: Settings,
) -> Result<SweptGroups, Error> {
    let [n, rows] = [weight.meta.shape()[0], weight.meta.shape()[1]];
    let group = settings.group_size.columns(n).min(n);
    let groups = settings.group_size.groups(n);
    let search = settings
        .scale_search
        .then(|| Search::new(&factors.pivots, &settings));
    let search = search.as_ref();
    let by_original = settings.static_groups;
    let group_of = factors.columns.iter().map(|columns| {
        let groups = (0..n).map(|at| match by_original {
            true => columns.order[at] / group as u32,
            false => (at / group) as u32,
        });
        groups.collect::<Vec<u32>>()
    });
    let group_of: Vec<Vec<u32>> = group_of.collect();
    let g_idx = factors.columns.iter().zip(&group_of);
    let g_idx = g_idx.map(|(columns, group_of)| {
        let groups = columns.position.iter();
        groups.map(|&at| group_of[at as usize] as i32).collect()
    });
    let g_idx = g_idx.collect();
    let swept = Swept {
        codes: buffer::empty(&weight, [n, rows], DType::U8),
        scales: buffer::empty(&weight, [groups, rows], DType::F32),
        zeros: buffer::empty(&weight, [groups, rows], DType::F32),
        gained: buffer::empty(&weight, [groups, rows], DType::F32),
        group_of: buffer::upload(&weight, &group_of.concat(), DType::U32),
        weight,
        rows,
        problems: factors.columns.len(),
    };
    if by_original {
        let source = WeightSource::Original(position);
        parameters(&swept, source, 0..n, group, settings, search);
    }
    let panels = panels(n, if by_original { PANEL } else { group });
    let inverses = block_inverses(factors, &panels);
    let raw = buffer::empty(&swept.weight, [n.min(STRETCH), rows], DType::F32);
    let update = buffer::empty(&swept.weight, [PANEL, rows], DType::F32);
    let mut stretch = 0..0;
    for (block, panel) in panels.iter().enumerate() {
        if panel.end > stretch.end {
            let end = panels[block..]
                .iter()
                .map(|it| it.end)
                .take_while(|&end| end - panel.start <= STRETCH)
                .last()
                .unwrap_or(panel.end);
            stretch = panel.start..end;
            let before = 0..stretch.start;
            let into = (&raw, 0);
            carry(factors, &swept, before, stretch.clone(), into, 0.0)?;
        }
        if !by_original && group > PANEL && panel.start.is_multiple_of(group) {
            let whole = panel.start..n.min(panel.start + group);
            wide_group(factors, &swept, whole, settings, search)?;
        }
        let update = (panel.start > 0).then_some(&update);
        if let Some(update) = update {
            let at = panel.start - stretch.start;
            let inside = stretch.start..panel.start;
            // Nothing lies before the first stretch, so nothing was written for it.
            let beta = if stretch.start == 0 { 0.0 } else { 1.0 };
            let into = (&raw, at);
            carry(factors, &swept, inside, panel.clone(), into, beta)?;
            apply_inverse(&swept, &inverses, block, into, panel.len(), update)?;
        }
        if !by_original && group <= PANEL {
            let source = WeightSource::Positions(update);
            parameters(&swept, source, panel.clone(), group, settings, search);
        }
        sweep(&swept, update, &inverses, block, panel, settings);
    }
    Ok(SweptGroups { swept, g_idx })
}

/// `into[at..] = M[from, columns]ᵀ · D[from] + beta · into[at..]`, f32 `[columns, rows]`, for each problem's rows.
fn carry(
    factors: &DeviceFactors,
    swept: &Swept,
    from: Range<usize>,
    columns: Range<usize>,
    (into, at): (&Buffer, usize),
    beta: f32,
) -> Result<(), Error> {
    if from.is_empty() {
        return Ok(());
    }
    let n = factors.size();
    let (rows, each, problems) = (swept.rows, swept.rows_each(), swept.problems);
    let buffers = [&factors.m, &swept.weight, into];
    on_stream_later(&buffers, move |libraries, pointers| {
        let matrices = |at: usize, start, stride, step| Matrices {
            first: MatrixAt::at(pointers[at], start, stride, Element::F32),
            step,
        };
        let m = matrices(0, columns.start * n + from.start, n, n * n);
        let d = matrices(1, from.start * rows, rows, each);
        let out = matrices(2, at * rows, rows, each);
        let dimensions = [columns.len(), each, from.len()];
        // SAFETY: `from` and `columns` lie inside each M and D, and `at + columns.len()` rows
        // inside `into`.
        unsafe { product_of_each(libraries, problems, dimensions, [m, d], beta, out) }
    })
}

/// `update = inv(M_bb)ᵀ · raw[at..at + width]`, f32 `[width, rows]`, for each problem's rows.
fn apply_inverse(
    swept: &Swept,
    inverses: &Buffer,
    block: usize,
    (raw, at): (&Buffer, usize),
    width: usize,
    update: &Buffer,
) -> Result<(), Error> {
    let (rows, each, problems) = (swept.rows, swept.rows_each(), swept.problems);
    let panels = inverses.meta.shape()[1];
    let buffers = [inverses, raw, update];
    on_stream_later(&buffers, move |libraries, pointers| {
        let matrices = |at: usize, start, stride, step| Matrices {
            first: MatrixAt::at(pointers[at], start, stride, Element::F32),
            step,
        };
        let inverse = matrices(0, block * PANEL * PANEL, PANEL, panels * PANEL * PANEL);
        let raw = matrices(1, at * rows, rows, each);
        let out = matrices(2, 0, rows, each);
        let dimensions = [width, each, width];
        // SAFETY: the block's leading `width` square, `width` rows of raw and of update.
        unsafe {
            product_of_each(
                libraries,
                problems,
                dimensions,
                [inverse.t(), raw],
                0.0,
                out,
            )
        }
    })
}

/// The parameters of one group wider than a panel.
fn wide_group(
    factors: &DeviceFactors,
    swept: &Swept,
    group: Range<usize>,
    settings: Settings,
    search: Option<&Search>,
) -> Result<(), Error> {
    let n = factors.size();
    let columns = settings.group_size.columns(n).min(n);
    if group.start == 0 {
        let source = WeightSource::Positions(None);
        parameters(swept, source, group, columns, settings, search);
        return Ok(());
    }
    let rows = swept.rows;
    let update = buffer::empty(&swept.weight, [group.len(), rows], DType::F32);
    let from = 0..group.start;
    carry(factors, swept, from, group.clone(), (&update, 0), 0.0)?;
    let (start, width) = (group.start, group.len());
    let (each, problems) = (swept.rows_each(), swept.problems);
    on_stream_later(&[&factors.m, &update], move |libraries, pointers| {
        let one = 1.0_f32;
        for problem in 0..problems {
            let corner = problem * n * n + start * (n + 1);
            let m = MatrixAt::at(pointers[0], corner, n, Element::F32);
            let x = MatrixAt::at(pointers[1], problem * each, rows, Element::F32);
            // X · M_gg = T: column-major, T is the update's `[rows, group]`, and M is stored so.
            // SAFETY: the group's square lies inside M, and the problem's rows in the update, `[group, rows]`.
            unsafe {
                cublas::cublasStrsm_v2(
                    libraries.cublas,
                    cublas::cublasSideMode_t::CUBLAS_SIDE_RIGHT,
                    cublas::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                    cublas::cublasOperation_t::CUBLAS_OP_N,
                    cublas::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
                    each as i32,
                    width as i32,
                    &raw const one,
                    m.pointer as *const f32,
                    n as i32,
                    x.pointer as *mut f32,
                    rows as i32,
                )
            }
            .result()
            .map_err(|source| Error::Cublas {
                operation: "cublasStrsm",
                source,
            })?;
        }
        Ok(())
    })?;
    let source = WeightSource::Positions(Some(&update));
    parameters(swept, source, group, columns, settings, search);
    Ok(())
}
