//! Sums of matrices over all ranks, in the tree that those over lanes are taken in.
//!
//! Between devices, ranks exchange their sums in pairs, and both add them up: first with the neighbour, then between
//! pairs, then between fours. Of Gram matrices, panels of rows go from the diagonal on. By messages, rank 0 adds up, and
//! sends the sum back.

use std::ops::Range;

use burn::tensor::{DType, Tensor, TensorData};
use gptq_kernels::{DeviceLink, Engine, Parcel, ParcelKind};
use gptq_ranks::{RankError, RankShare};

use crate::RunError;
use crate::peers::Peers;

/// Rows of a panel of an upper triangle.
const PANEL: usize = 1024;

/// Part of a matrix that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SumPart {
    /// The upper triangle: column index at least row index.
    Upper,
    /// All of it.
    Whole,
}

/// A rank's part of a sum over all ranks.
pub(crate) struct Summand<B: Engine> {
    /// f32, if the rank has a part.
    pub(crate) own: Option<Tensor<B, 2>>,
    /// True for each rank that has one.
    pub(crate) given: Vec<bool>,
    pub(crate) part: SumPart,
    pub(crate) shape: [usize; 2],
}

/// Adds up each of some matrices over all ranks, on each; a sum of none is none.
///
/// # Errors
/// The end of the run on another rank, or a failure of the link.
pub(crate) fn sum_ranks<B: Engine>(
    summands: Vec<Summand<B>>,
    peers: &Peers<'_, B>,
    device: &B::Device,
) -> Result<Vec<Option<Tensor<B, 2>>>, RunError> {
    if peers.share().size == 1 {
        return Ok(summands.into_iter().map(|it| it.own).collect());
    }
    match peers.link {
        Some(link) => between_devices(summands, link, peers, device),
        None => summands
            .into_iter()
            .map(|it| Ok(by_messages(it, peers, device)?))
            .collect(),
    }
}

fn between_devices<B: Engine>(
    summands: Vec<Summand<B>>,
    link: &dyn DeviceLink<B>,
    peers: &Peers<'_, B>,
    device: &B::Device,
) -> Result<Vec<Option<Tensor<B, 2>>>, RunError> {
    let RankShare { rank, size } = peers.share();
    let mut sums = Vec::with_capacity(summands.len());
    let mut kinds = Vec::with_capacity(summands.len());
    for Summand {
        own,
        given,
        part,
        shape,
    } in summands
    {
        let panels = panels(part, shape);
        let own = own.map(|own| match &panels[..] {
            [_] => vec![own],
            panels => panels
                .iter()
                .map(|it| own.clone().slice(it.clone()))
                .collect(),
        });
        sums.push(own);
        kinds.push((given, panels, shape));
    }
    let mut width = 1;
    while width < size {
        let first = rank / width * width;
        let (other, partner) = (first ^ width, rank ^ width);
        let theirs = |given: &[bool]| given[other..other + width].contains(&true);
        let sent = sums.iter().flatten().flatten();
        let sent = sent.map(|panel: &Tensor<B, 2>| (partner, panel.clone().into()));
        let expected = kinds.iter().filter(|(given, ..)| theirs(given));
        let expected = expected.flat_map(|(_, panels, _)| panels);
        let expected = expected.map(|[rows, columns]| {
            let (shape, dtype) = ([rows.len(), columns.len()], DType::F32);
            (partner, ParcelKind { shape, dtype })
        });
        let (sent, expected) = (sent.collect(), expected.collect::<Vec<_>>());
        let mut found = peers.exchange(link, sent, &expected)?.into_iter();
        for (sum, (given, panels, _)) in sums.iter_mut().zip(&kinds) {
            if !theirs(given) {
                continue;
            }
            let found = found.by_ref().take(panels.len()).map(Parcel::float);
            *sum = Some(match sum.take() {
                None => found.collect(),
                Some(own) => {
                    let pairs = own.into_iter().zip(found);
                    let add = |(own, found): (Tensor<B, 2>, Tensor<B, 2>)| match first < other {
                        true => own + found,
                        false => found + own,
                    };
                    pairs.map(add).collect()
                }
            });
        }
        width *= 2;
    }
    let whole = sums
        .into_iter()
        .zip(kinds)
        .map(|(sum, (_, panels, shape))| {
            let sum = sum?;
            if sum.len() == 1 {
                return sum.into_iter().next();
            }
            let empty = B::gram_zeros(shape, device);
            let parts = sum.into_iter().zip(panels);
            Some(parts.fold(empty, |whole, (part, at)| whole.slice_assign(at, part)))
        });
    Ok(whole.collect())
}

/// Panels that a matrix is sent in.
fn panels(part: SumPart, [rows, columns]: [usize; 2]) -> Vec<[Range<usize>; 2]> {
    match part {
        SumPart::Whole => vec![[0..rows, 0..columns]],
        SumPart::Upper => (0..rows)
            .step_by(PANEL)
            .map(|row| [row..rows.min(row + PANEL), row..columns])
            .collect(),
    }
}

/// Adds up one matrix by messages; what is not `part` of the sum is zero.
fn by_messages<B: Engine>(
    summand: Summand<B>,
    peers: &Peers<'_, B>,
    device: &B::Device,
) -> Result<Option<Tensor<B, 2>>, RankError> {
    let Summand {
        own, part, shape, ..
    } = summand;
    let columns = shape[1];
    let first = |row: usize| if part == SumPart::Upper { row } else { 0 };
    let own = own.map(|own| {
        let values = own.into_data();
        let values = values.as_slice::<f32>().expect("sums are f32");
        let rows = values.chunks_exact(columns).enumerate();
        rows.flat_map(|(row, values)| &values[first(row)..])
            .copied()
            .collect()
    });
    let sum = peers.sum(own)?;
    Ok(sum.map(|sum| {
        let mut values = vec![0.0; shape[0] * columns];
        let mut rest = &sum[..];
        for (row, values) in values.chunks_exact_mut(columns).enumerate() {
            let (own, others) = rest.split_at(columns - first(row));
            values[first(row)..].copy_from_slice(own);
            rest = others;
        }
        Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
    }))
}

#[cfg(test)]
mod tests;
