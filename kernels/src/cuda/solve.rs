//! GPTQ for all linear layers that share an input: one factorisation, one sweep per setting.
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
    blas::{Element, MatrixAt, product},
    buffer::{self, Buffer},
    error::Error,
    factor::{DeviceFactor, PANEL, block_inverses, factor, panels, reordered},
    groups::{Search, WeightSource, parameters, round_to_nearest},
    refine::refine,
    relative_error::{Correlation, Measurement, Sum, Sums},
    stream::on_stream_later,
    sweep::{Swept, sweep},
    target::MismatchTarget,
};
use crate::{HessianOptions, Mismatch, Request, SolveTimes, Solved, Subset};

/// Columns whose errors from before them are taken together.
const STRETCH: usize = 8 * PANEL;

/// Quantizes linear layers that share an input.
///
/// `gram` is f32 `[in, in]`, of which the upper triangle is read; each weight is `[out, in]`, all f16 or
/// all bf16.
/// Waits for the device twice for the factor and once for the errors.
///
/// # Errors
///
/// Dtypes, shapes or settings that do not fit, a Gram matrix without a factor, or a library's
/// failure.
pub fn solve(
    gram: Tensor<Cuda, 2>,
    mismatch: Option<Mismatch<Cuda>>,
    hessian: HessianOptions,
    requests: &[Request<Cuda>],
) -> Result<Subset<Cuda>, Error> {
    let started = Instant::now();
    let n = gram.dims()[0];
    check(gram.dims(), requests)?;
    let gram = buffer::float("solve", "gram", gram, DType::F32)?;
    let weights = requests
        .iter()
        .map(|request| buffer::half("solve", "weight", request.weight.clone()))
        .collect::<Result<Vec<_>, _>>()?;
    let factor = factor(&gram, hessian.act_order, hessian.damping)?;
    let target = mismatch
        .map(|mismatch| MismatchTarget::new(mismatch, n, hessian.damping))
        .transpose()?;
    let factored = Instant::now();
    let refined = requests.iter().any(|request| request.settings.refine > 0);
    let h = refined.then(|| reordered(&gram, &factor));
    let position = buffer::upload(&gram, &factor.columns.position, DType::U32);
    let diagonal = buffer::upload(&gram, &factor.columns.diagonal, DType::F32);
    let correlation = Correlation::new(&gram, &factor.columns.diagonal);
    drop(gram);

    let measurement = Measurement::new(&position, requests.len());
    let mut order = Vec::with_capacity(requests.len());
    let mut unread = Vec::with_capacity(requests.len());
    for (first, &Request { settings, .. }) in requests.iter().enumerate() {
        if order.contains(&first) {
            continue;
        }
        let members: Vec<usize> = (first..requests.len())
            .filter(|&at| requests[at].settings == settings)
            .collect();
        let rows = members.iter().map(|&at| weights[at].meta.shape()[0]).sum();
        let all = buffer::empty(&position, [n, rows], DType::F32);
        let mut targets = Vec::with_capacity(members.len());
        let mut offset = 0;
        for &at in &members {
            let target = target.as_ref();
            let residual = requests[at].residual.as_ref();
            let target = target.map(|it| it.of(&weights[at], residual, &measurement, at));
            let target = target.transpose()?;
            let weight = target.as_ref().unwrap_or(&weights[at]);
            into_columns(weight, &position, &diagonal, &all, offset);
            offset += weights[at].meta.shape()[0];
            targets.push(target);
        }
        let (swept, g_idx) = sweep_all(&factor, &position, all, settings)?;
        let keep = members.iter().any(|&at| requests[at].keep_unrounded);
        let refined = (h.as_ref().filter(|_| settings.refine > 0))
            .map(|h| refine(h, &swept, settings, keep))
            .transpose()?;
        let (refined, unrounded) = match refined {
            Some((gained, unrounded)) => (Some(gained), unrounded),
            None => (None, None),
        };
        let mut offset = 0;
        for (at, rounded) in members.into_iter().zip(targets) {
            let rows = weights[at].meta.shape()[0];
            let span = [offset, rows];
            let weight = dequantize(&swept, &position, span, weights[at].dtype);
            let nearest = round_to_nearest(&weights[at], settings);
            let own = &weights[at];
            measurement.energy(&correlation, own, (at, Sum::Output))?;
            measurement.loss(&correlation, [own, &weight], (at, Sum::Lost))?;
            measurement.loss(&correlation, [own, &nearest], (at, Sum::Nearest))?;
            if let Some(rounded) = rounded {
                let found: Tensor<Cuda, 2> = buffer::into_float(weight.clone());
                let found = buffer::float("solve", "weight", found.cast(DType::F32), DType::F32)?;
                measurement.loss(&correlation, [&rounded, &found], (at, Sum::Objective))?;
            }
            if settings.scale_search {
                measurement.columns(&swept.gained, span, (at, Sum::Searched));
            }
            if let Some(refined) = &refined {
                measurement.columns(refined, span, (at, Sum::Refined));
            }
            let codes = codes(&swept, &position, &g_idx, span, settings.bits);
            let unrounded = requests[at].keep_unrounded.then(|| match &unrounded {
                Some(unrounded) => in_own_order(unrounded, &factor.columns.position, span),
                None => codes.codes.clone().transpose().float().cast(DType::F32),
            });
            unread.push((codes, [weight, nearest].map(buffer::into_float), unrounded));
            order.push(at);
            offset += rows;
        }
    }
    let sums = measurement.read()?;
    let mut solved = Vec::with_capacity(requests.len());
    for (at, (codes, [weight, nearest], unrounded)) in order.into_iter().zip(unread) {
        let sums = sums[at];
        let output = sums.of(Sum::Output);
        let rounded = if target.is_some() {
            Sum::Objective
        } else {
            Sum::Lost
        };
        let layer = Solved {
            codes,
            weight,
            nearest,
            unrounded,
            relative_error: Sums::part(sums.of(Sum::Lost), output),
            rtn_error: Sums::part(sums.of(Sum::Nearest), output),
            objective: Some(Sums::part(sums.of(rounded), output)),
            gains: gains(&requests[at].settings, target.as_ref(), sums),
        };
        solved.push((at, layer));
    }
    solved.sort_by_key(|&(at, _)| at);
    Ok(Subset {
        solved: solved.into_iter().map(|(_, layer)| layer).collect(),
        damping: factor.damping,
        dead_columns: factor.columns.dead,
        times: SolveTimes {
            factor: (factored - started).as_secs_f64(),
            sweep: factored.elapsed().as_secs_f64(),
        },
    })
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

fn check([n, columns]: [usize; 2], requests: &[Request<Cuda>]) -> Result<(), Error> {
    let refuse = |reason| {
        Err(Error::Shape {
            operation: "solve",
            reason,
        })
    };
    if n != columns || n == 0 || !n.is_multiple_of(32) {
        return refuse(format!(
            "a Gram matrix [{n}, {columns}]: not square, or not of a multiple of 32 columns"
        ));
    }
    for Request {
        weight, settings, ..
    } in requests
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

/// Sweeps all columns; the buffers swept and the group of each original column.
fn sweep_all(
    factor: &DeviceFactor,
    position: &Buffer,
    weight: Buffer,
    settings: Settings,
) -> Result<(Swept, Vec<i32>), Error> {
    let [n, rows] = [weight.meta.shape()[0], weight.meta.shape()[1]];
    let group = settings.group_size.columns(n).min(n);
    let groups = settings.group_size.groups(n);
    let search = settings
        .scale_search
        .then(|| Search::new(&factor.pivots, &settings));
    let search = search.as_ref();
    let by_original = settings.static_groups;
    let group_of: Vec<u32> = (0..n)
        .map(|at| {
            let column = if by_original {
                factor.columns.order[at] as usize
            } else {
                at
            };
            (column / group) as u32
        })
        .collect();
    let g_idx = factor
        .columns
        .position
        .iter()
        .map(|&at| group_of[at as usize] as i32)
        .collect();
    let swept = Swept {
        codes: buffer::empty(&weight, [n, rows], DType::U8),
        scales: buffer::empty(&weight, [groups, rows], DType::F32),
        zeros: buffer::empty(&weight, [groups, rows], DType::F32),
        gained: buffer::empty(&weight, [groups, rows], DType::F32),
        group_of: buffer::upload(&weight, &group_of, DType::U32),
        weight,
        rows,
    };
    if by_original {
        let source = WeightSource::Original(position);
        parameters(&swept, source, 0..n, group, settings, search);
    }
    let panels = panels(n, if by_original { PANEL } else { group });
    let inverses = block_inverses(factor, &panels);
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
            carry(factor, &swept, before, stretch.clone(), into, 0.0)?;
        }
        if !by_original && group > PANEL && panel.start.is_multiple_of(group) {
            let whole = panel.start..n.min(panel.start + group);
            wide_group(factor, &swept, whole, settings, search)?;
        }
        let update = (panel.start > 0).then_some(&update);
        if let Some(update) = update {
            let at = panel.start - stretch.start;
            let inside = stretch.start..panel.start;
            // Nothing lies before the first stretch, so nothing was written for it.
            let beta = if stretch.start == 0 { 0.0 } else { 1.0 };
            let into = (&raw, at);
            carry(factor, &swept, inside, panel.clone(), into, beta)?;
            apply_inverse(&inverses, block, into, panel.len(), update)?;
        }
        if !by_original && group <= PANEL {
            let source = WeightSource::Positions(update);
            parameters(&swept, source, panel.clone(), group, settings, search);
        }
        sweep(&swept, update, &inverses, block, panel, settings);
    }
    Ok((swept, g_idx))
}

/// `into[at..] = M[from, columns]ᵀ · D[from] + beta · into[at..]`, f32 `[columns, rows]`.
fn carry(
    factor: &DeviceFactor,
    swept: &Swept,
    from: Range<usize>,
    columns: Range<usize>,
    (into, at): (&Buffer, usize),
    beta: f32,
) -> Result<(), Error> {
    if from.is_empty() {
        return Ok(());
    }
    let n = factor.columns.order.len();
    let rows = swept.rows;
    let buffers = [&factor.m, &swept.weight, into];
    on_stream_later(&buffers, move |libraries, pointers| {
        let m = MatrixAt::at(pointers[0], columns.start * n + from.start, n, Element::F32);
        let d = MatrixAt::at(pointers[1], from.start * rows, rows, Element::F32);
        let out = MatrixAt::at(pointers[2], at * rows, rows, Element::F32);
        let dimensions = [columns.len(), rows, from.len()];
        // SAFETY: `from` and `columns` lie inside M and D, and `at + columns.len()` rows
        // inside `into`.
        unsafe { product(libraries, dimensions, m, d, beta, out) }
    })
}

/// `update = inv(M_bb)ᵀ · raw[at..at + width]`, f32 `[width, rows]`.
fn apply_inverse(
    inverses: &Buffer,
    block: usize,
    (raw, at): (&Buffer, usize),
    width: usize,
    update: &Buffer,
) -> Result<(), Error> {
    let rows = raw.meta.shape()[1];
    let buffers = [inverses, raw, update];
    on_stream_later(&buffers, move |libraries, pointers| {
        let inverse = MatrixAt::at(pointers[0], block * PANEL * PANEL, PANEL, Element::F32);
        let raw = MatrixAt::at(pointers[1], at * rows, rows, Element::F32);
        let out = MatrixAt::at(pointers[2], 0, rows, Element::F32);
        // SAFETY: the block's leading `width` square, `width` rows of raw and of update.
        unsafe { product(libraries, [width, rows, width], inverse.t(), raw, 0.0, out) }
    })
}

/// The parameters of one group wider than a panel.
fn wide_group(
    factor: &DeviceFactor,
    swept: &Swept,
    group: Range<usize>,
    settings: Settings,
    search: Option<&Search>,
) -> Result<(), Error> {
    let n = factor.columns.order.len();
    let columns = settings.group_size.columns(n).min(n);
    if group.start == 0 {
        let source = WeightSource::Positions(None);
        parameters(swept, source, group, columns, settings, search);
        return Ok(());
    }
    let rows = swept.rows;
    let update = buffer::empty(&swept.weight, [group.len(), rows], DType::F32);
    let from = 0..group.start;
    carry(factor, swept, from, group.clone(), (&update, 0), 0.0)?;
    let (start, width) = (group.start, group.len());
    on_stream_later(&[&factor.m, &update], move |libraries, pointers| {
        let m = MatrixAt::at(pointers[0], start * (n + 1), n, Element::F32);
        let one = 1.0_f32;
        // X · M_gg = T: column-major, T is the update's `[rows, group]`, and M is stored so.
        // SAFETY: the group's square lies inside M, and the update is `[group, rows]`.
        unsafe {
            cublas::cublasStrsm_v2(
                libraries.cublas,
                cublas::cublasSideMode_t::CUBLAS_SIDE_RIGHT,
                cublas::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                cublas::cublasOperation_t::CUBLAS_OP_N,
                cublas::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
                rows as i32,
                width as i32,
                &raw const one,
                m.pointer as *const f32,
                n as i32,
                pointers[1] as *mut f32,
                rows as i32,
            )
        }
        .result()
        .map_err(|source| Error::Cublas {
            operation: "cublasStrsm",
            source,
        })
    })?;
    let source = WeightSource::Positions(Some(&update));
    parameters(swept, source, group, columns, settings, search);
    Ok(())
}
