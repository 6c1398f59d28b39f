//! Linears of a tap shared out over ranks, where matrices go from device to device.
//!
//! A rank solves whole linears, as an engine's products depend on how many rows there are. Those of one input are shared
//! out one by one; inputs that an engine solves together, as experts', a batch at a time. Every rank is brought all
//! weights, and rank 0 codes, scales and errors besides.

use std::ops::Range;

use burn::tensor::{DType, Tensor};
use gptq_kernels::{
    Codes, DeviceLink, Engine, Parcel, ParcelKind, Shipment, SolveTimes, Solved, Subset,
};
use gptq_plan::PlannedLinear;
use gptq_ranks::RankError;
use gptq_solver::Gains;
use serde::{Deserialize, Serialize};

use crate::RunError;
use crate::peers::Peers;
use crate::row_parts::TapWeights;

/// The linears of a tap's inputs that are solved, input by input.
pub(crate) type TapLinears = [Vec<PlannedLinear>];

/// Inputs of a tap that an engine solves together, and who solves which of their linears.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InputBatch {
    /// Indices of the inputs.
    pub(crate) inputs: Range<usize>,
    /// The rank that solves each linear of each input.
    pub(crate) owners: Vec<Vec<usize>>,
}

/// Takes a tap's inputs in batches of those that are alike in shapes and settings, of [`Engine::BATCH_ROWS`] rows, and
/// shares them out over so many ranks by their operations.
pub(crate) fn batches<B: Engine>(linears: &TapLinears, ranks: usize) -> Vec<InputBatch> {
    let alike = |a: &[PlannedLinear], b: &[PlannedLinear]| {
        let settings = |of: &[PlannedLinear]| -> Vec<_> {
            of.iter().map(|it| (it.shape, it.settings)).collect()
        };
        settings(a) == settings(b)
    };
    let mut busy = vec![0.0; ranks];
    let mut batches = Vec::new();
    let mut first = 0;
    while first < linears.len() {
        let rows: usize = linears[first].iter().map(|it| it.shape.1).sum();
        let most = (B::BATCH_ROWS / rows.max(1)).max(1);
        let next = linears[first..].iter().take(most);
        let count = next
            .take_while(|it| alike(it.as_slice(), &linears[first]))
            .count();
        let inputs = first..first + count;
        first += count;
        let work = |linear: &PlannedLinear| {
            let (n_in, n_out) = linear.shape;
            n_out as f64 * n_in as f64 * n_in as f64
        };
        let mut owner = |work: f64| {
            let least = (0..ranks).min_by(|&a, &b| f64::total_cmp(&busy[a], &busy[b]));
            let owner = least.expect("there is at least one rank");
            busy[owner] += work;
            owner
        };
        let of = &linears[inputs.clone()];
        let owners = match of {
            [one] => vec![one.iter().map(|linear| owner(work(linear))).collect()],
            several => {
                let owner = owner(several.iter().flatten().map(work).sum());
                several.iter().map(|of| vec![owner; of.len()]).collect()
            }
        };
        batches.push(InputBatch { inputs, owners });
    }
    batches
}

/// Results of a linear beside its matrices.
#[derive(Serialize, Deserialize)]
struct SolvedRecord {
    /// Position in the tap: input and linear of it.
    at: [usize; 2],
    /// Bits of the damping.
    damping: u64,
    dead_columns: usize,
    /// Bits of the relative errors, own and round to nearest's, and of the objective.
    errors: [u64; 2],
    objective: Option<u64>,
    /// Bits of the scale search's, the mismatch correction's and refinement's gains.
    gains: [Option<u64>; 3],
    g_idx: Vec<i32>,
}

/// Results of a tap's linears that a rank is brought.
pub(crate) enum Brought<B: Engine> {
    /// Rank 0: all that is known of each input's.
    All(Vec<Subset<B>>),
    /// Other ranks: weights by the linear's index in the block.
    Weights(TapWeights<B>),
}

/// Brings every rank what all have solved: `own` has this one's linears of each input, `None` where it has none.
///
/// # Errors
/// The end of the run on another rank, or a failure of the link.
pub(crate) fn bring<B: Engine>(
    linears: &TapLinears,
    batches: &[InputBatch],
    own: Vec<Option<Subset<B>>>,
    (dtype, keeps_unrounded): (DType, bool),
    link: &dyn DeviceLink<B>,
    peers: &Peers<'_, B>,
) -> Result<Brought<B>, RunError> {
    let share = peers.share();
    let owners: Vec<&Vec<usize>> = batches.iter().flat_map(|it| &it.owners).collect();
    let mut records = Vec::new();
    let mut mine = Vec::new();
    for (input, subset) in own.into_iter().enumerate() {
        let Some(subset) = subset else { continue };
        let (damping, dead_columns) = (subset.damping, subset.dead_columns);
        let places = (0..linears[input].len()).filter(|&at| owners[input][at] == share.rank);
        for (at, solved) in places.zip(subset.solved) {
            records.push(SolvedRecord::of(
                [input, at],
                damping,
                dead_columns,
                &solved,
            ));
            mine.push(([input, at], solved));
        }
    }
    // Whoever failed has said so before anyone waits for a matrix.
    let text = serde_json::to_vec(&records).expect("plain values always serialize");
    let texts = peers.gather(text)?;
    peers.broadcast(Vec::new())?;

    let root = |to: usize| to == 0;
    let mut sent: Shipment<Parcel<B>> = Vec::new();
    for (_, solved) in &mine {
        for to in (0..share.size).filter(|&to| to != share.rank) {
            sent.push((to, solved.weight.clone().into()));
            if root(to) {
                let parcels = parcels(solved);
                sent.extend(parcels.into_iter().map(|parcel| (to, parcel)));
            }
        }
    }
    let mut expected = Vec::new();
    let positions = || {
        let inputs = linears.iter().enumerate();
        inputs.flat_map(|(input, of)| of.iter().enumerate().map(move |(at, it)| ([input, at], it)))
    };
    for ([input, at], linear) in positions() {
        let owner = owners[input][at];
        if owner != share.rank {
            let (n_in, n_out) = linear.shape;
            let shape = [n_out, n_in];
            expected.push((owner, ParcelKind { shape, dtype }));
            if root(share.rank) {
                let kinds = kinds(linear, dtype, keeps_unrounded);
                expected.extend(kinds.into_iter().map(|kind| (owner, kind)));
            }
        }
    }
    let mut found = peers.exchange(link, sent, &expected)?.into_iter();
    let mut mine = mine.into_iter().peekable();
    let mut own = |at: [usize; 2]| mine.next_if(|it| it.0 == at).map(|it| it.1);
    if !root(share.rank) {
        let weights = positions().map(|(at, linear)| {
            let weight = match own(at) {
                Some(solved) => solved.weight,
                None => found.next().expect("as many as were expected").float(),
            };
            (linear.linear, weight)
        });
        return Ok(Brought::Weights(weights.collect()));
    }
    let mut records = Vec::new();
    for (from, text) in texts.iter().enumerate() {
        let of: Vec<SolvedRecord> = serde_json::from_slice(text).map_err(|_| {
            RunError::Ranks(RankError::Length {
                from,
                found: text.len(),
                wanted: 0,
            })
        })?;
        records.extend(of);
    }
    records.sort_by_key(|it| it.at);
    let mut records = records.into_iter();
    let mut subsets = Vec::with_capacity(linears.len());
    for (input, of) in linears.iter().enumerate() {
        let mut subset: Option<Subset<B>> = None;
        for (at, linear) in of.iter().enumerate() {
            let record = records.next().filter(|it| it.at == [input, at]);
            let record = record.ok_or(RunError::Ranks(RankError::Length {
                from: owners[input][at],
                found: 0,
                wanted: 1,
            }))?;
            let (damping, dead_columns) = (f64::from_bits(record.damping), record.dead_columns);
            let solved = match own([input, at]) {
                Some(solved) => solved,
                None => {
                    let mut next = || found.next().expect("as many as were expected");
                    record.solved(linear, &mut next, keeps_unrounded)
                }
            };
            let subset = subset.get_or_insert_with(|| Subset {
                solved: Vec::new(),
                damping,
                dead_columns,
                times: SolveTimes::default(),
            });
            subset.solved.push(solved);
        }
        subsets.extend(subset);
    }
    Ok(Brought::All(subsets))
}

/// Matrices of a linear that rank 0 is sent beside its weights.
fn parcels<B: Engine>(solved: &Solved<B>) -> Vec<Parcel<B>> {
    let codes = &solved.codes;
    let parcels = [
        codes.codes.clone().into(),
        codes.scales.clone().into(),
        codes.zeros.clone().into(),
        solved.nearest.clone().into(),
    ];
    let unrounded = solved.unrounded.clone().map(Parcel::from);
    parcels.into_iter().chain(unrounded).collect()
}

/// Shapes and dtypes of [`parcels`].
fn kinds(linear: &PlannedLinear, dtype: DType, keeps_unrounded: bool) -> Vec<ParcelKind> {
    let (n_in, n_out) = linear.shape;
    let groups = linear.settings.group_size.groups(n_in);
    let mut kinds = vec![
        ([n_in, n_out], DType::U8),
        ([groups, n_out], DType::F16),
        ([groups, n_out], DType::U8),
        ([n_out, n_in], dtype),
    ];
    if keeps_unrounded {
        kinds.push(([n_out, n_in], DType::F32));
    }
    let kinds = kinds.into_iter();
    kinds
        .map(|(shape, dtype)| ParcelKind { shape, dtype })
        .collect()
}

impl SolvedRecord {
    fn of<B: Engine>(
        at: [usize; 2],
        damping: f64,
        dead_columns: usize,
        solved: &Solved<B>,
    ) -> SolvedRecord {
        let Gains {
            scale_search,
            mismatch_correction,
            refine,
        } = solved.gains;
        SolvedRecord {
            at,
            damping: damping.to_bits(),
            dead_columns,
            errors: [solved.relative_error, solved.rtn_error].map(f64::to_bits),
            objective: solved.objective.map(f64::to_bits),
            gains: [scale_search, mismatch_correction, refine].map(|it| it.map(f64::to_bits)),
            g_idx: solved.codes.g_idx.clone(),
        }
    }

    /// Returns the linear, whose matrices are the `next` ones.
    fn solved<B: Engine>(
        self,
        linear: &PlannedLinear,
        next: &mut dyn FnMut() -> Parcel<B>,
        keeps_unrounded: bool,
    ) -> Solved<B> {
        let weight = next().float();
        let codes = Codes {
            bits: linear.settings.bits,
            codes: next().int(),
            scales: next().float(),
            zeros: next().int(),
            g_idx: self.g_idx,
        };
        let [relative_error, rtn_error] = self.errors.map(f64::from_bits);
        let [scale_search, mismatch_correction, refine] =
            self.gains.map(|it| it.map(f64::from_bits));
        Solved {
            codes,
            weight,
            nearest: next().float(),
            unrounded: keeps_unrounded.then(|| next().float()),
            relative_error,
            rtn_error,
            objective: self.objective.map(f64::from_bits),
            gains: Gains {
                scale_search,
                mismatch_correction,
                refine,
            },
            sums: Vec::new(),
        }
    }
}

/// Sends weights from rank 0 to all others.
///
/// # Errors
/// The end of the run on another rank, or a failure of the link.
pub(crate) fn send_weights<B: Engine>(
    weights: Vec<Tensor<B, 2>>,
    link: &dyn DeviceLink<B>,
    peers: &Peers<'_, B>,
) -> Result<(), RunError> {
    peers.broadcast(Vec::new())?;
    let sent = (1..peers.share().size).flat_map(|to| {
        let parcels = weights.iter().cloned().map(Parcel::from);
        parcels.map(move |parcel| (to, parcel))
    });
    peers.exchange(link, sent.collect(), &[])?;
    Ok(())
}

/// Receives the weights of linears that rank 0 sends.
///
/// # Errors
/// The end of the run on another rank, or a failure of the link.
pub(crate) fn receive_weights<B: Engine>(
    linears: &[PlannedLinear],
    dtype: DType,
    link: &dyn DeviceLink<B>,
    peers: &Peers<'_, B>,
) -> Result<TapWeights<B>, RunError> {
    peers.broadcast(Vec::new())?;
    let expected = linears.iter().map(|linear| {
        let (n_in, n_out) = linear.shape;
        let shape = [n_out, n_in];
        (0, ParcelKind { shape, dtype })
    });
    let found = peers.exchange(link, Vec::new(), &expected.collect::<Vec<_>>())?;
    let weights = found.into_iter().map(Parcel::float);
    Ok(linears.iter().map(|it| it.linear).zip(weights).collect())
}

#[cfg(test)]
mod tests;
