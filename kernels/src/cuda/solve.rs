//! GPTQ for all linear layers that share an input: one factorisation, one sweep per setting; for several inputs that
//! are alike, such as experts', in the same launches.

use std::time::Instant;

use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_solver::{Gains, Settings};

use super::{
    Cuda,
    arrange::{codes, dequantize, into_columns},
    buffer::{self, Buffer, part},
    cholesky::Failed,
    error::Error,
    factor::{factor, reordered},
    groups::round_to_nearest,
    panels::sweep_all,
    refine::refine,
    relative_error::{Correlation, Measurement, Sum, Sums},
    target::MismatchTarget,
};
use crate::{Codes, Engine, HessianOptions, Problem, Request, SolveTimes, Solved, Subset};

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
        let most = (Cuda::BATCH_ROWS / rows.max(1)).max(1);
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
        let layers: Vec<usize> = members.iter().map(|&at| rows_of(at)).collect();
        let swept = sweep_all(&factors, &position, all, &layers, settings)?;
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
        sums: Vec::new(),
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
