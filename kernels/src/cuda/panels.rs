//! The sweep over all columns of linear layers, panel by panel.
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

use std::ops::Range;

use burn::tensor::DType;
use cudarc::cublas::sys as cublas;
use gptq_solver::Settings;

use super::{
    blas::{Element, Matrices, MatrixAt, product_of_each},
    buffer::{self, Buffer},
    error::Error,
    factor::{DeviceFactors, PANEL, block_inverses, panels},
    groups::{Search, WeightSource, parameters},
    stream::on_stream_later,
    sweep::{Swept, sweep},
};

/// Columns whose errors from before them are taken together.
const STRETCH: usize = 8 * PANEL;

/// Buffers after a sweep, and the group of each original column of each problem.
pub(crate) struct SweptGroups {
    pub(crate) swept: Swept,
    pub(crate) g_idx: Vec<Vec<i32>>,
}

/// Sweeps all columns of `weight`, f32 `[in, rows]`, the rows of one problem after the other, of which `layers` has the
/// number in each layer.
pub(crate) fn sweep_all(
    factors: &DeviceFactors,
    position: &Buffer,
    weight: Buffer,
    layers: &[usize],
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
        spans: Swept::spans(layers, factors.columns.len()),
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
    let spans = swept.spans.clone();
    let buffers = [&factors.m, &swept.weight, into];
    on_stream_later(&buffers, move |libraries, pointers| {
        let matrices = |at: usize, start, stride, step| Matrices {
            first: MatrixAt::at(pointers[at], start, stride, Element::F32),
            step,
        };
        let m = matrices(0, columns.start * n + from.start, n, n * n);
        for [first, width] in spans {
            let d = matrices(1, from.start * rows + first, rows, each);
            let out = matrices(2, at * rows + first, rows, each);
            let dimensions = [columns.len(), width, from.len()];
            // SAFETY: `from` and `columns` lie inside each M and D, `at + columns.len()` rows inside `into`, and the span
            // inside the rows of each problem.
            unsafe { product_of_each(libraries, problems, dimensions, [m, d], beta, out)? };
        }
        Ok(())
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
    let spans = swept.spans.clone();
    let panels = inverses.meta.shape()[1];
    let buffers = [inverses, raw, update];
    on_stream_later(&buffers, move |libraries, pointers| {
        let matrices = |at: usize, start, stride, step| Matrices {
            first: MatrixAt::at(pointers[at], start, stride, Element::F32),
            step,
        };
        let inverse = matrices(0, block * PANEL * PANEL, PANEL, panels * PANEL * PANEL);
        for [first, wide] in spans {
            let raw = matrices(1, at * rows + first, rows, each);
            let out = matrices(2, first, rows, each);
            let (dimensions, factors) = ([width, wide, width], [inverse.t(), raw]);
            // SAFETY: the block's leading `width` square, `width` rows of raw and of update, and the span inside the rows of
            // each problem.
            unsafe { product_of_each(libraries, problems, dimensions, factors, 0.0, out)? };
        }
        Ok(())
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
    let spans = swept.spans.clone();
    on_stream_later(&[&factors.m, &update], move |libraries, pointers| {
        let one = 1.0_f32;
        let all = (0..problems).flat_map(|it| spans.iter().map(move |&span| (it, span)));
        for (problem, [first, wide]) in all {
            let corner = problem * n * n + start * (n + 1);
            let m = MatrixAt::at(pointers[0], corner, n, Element::F32);
            let x = MatrixAt::at(pointers[1], problem * each + first, rows, Element::F32);
            // X · M_gg = T: column-major, T is the update's `[rows, group]`, and M is stored so.
            // SAFETY: the group's square lies inside M, and the span of the problem's rows in the update, `[group, rows]`.
            unsafe {
                cublas::cublasStrsm_v2(
                    libraries.cublas,
                    cublas::cublasSideMode_t::CUBLAS_SIDE_RIGHT,
                    cublas::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                    cublas::cublasOperation_t::CUBLAS_OP_N,
                    cublas::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
                    wide as i32,
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
