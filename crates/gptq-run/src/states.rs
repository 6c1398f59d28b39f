//! All hidden states of a run.

use std::sync::Arc;

use gptq_kernels::{Engine, dtype};
use gptq_model::{Flow, Model, ModelError};
use gptq_plan::{Places, Plan, SHARE};
use gptq_ranks::Collective;

use crate::RunError;
use crate::chunking::chunking;
use crate::gram::Dense;
use crate::output_errors::OutputErrors;
use crate::scratch::Scratch;
use crate::stream::{Span, StateStorage, Stream};

/// Embedded windows, a chunk at a time.
pub(crate) struct Embedded<I> {
    /// The rank's.
    pub(crate) flows: I,
    /// Their place among all ranks'.
    pub(crate) span: Span,
}

/// Embeds a rank's part of `windows`, all of one length.
pub(crate) fn embed<'a, B: Engine>(
    model: &'a Model<B>,
    windows: &'a [Vec<u32>],
    seq_len: usize,
    ranks: &dyn Collective,
) -> Result<Embedded<impl Iterator<Item = Result<Flow<B>, ModelError>> + use<'a, B>>, ModelError> {
    let chunk = chunking::<B>().windows(seq_len);
    let of = windows.len().div_ceil(chunk);
    let own = ranks.share().chunks(of);
    let windows = &windows[own.start * chunk..(own.end * chunk).min(windows.len())];
    Ok(Embedded {
        flows: model.flows(windows, chunk, dtype(model.state_half()))?,
        span: Span {
            first: own.start,
            of,
        },
    })
}

/// Gives the first tokens of some windows, for comparing outputs, from all of the rank's windows.
pub(crate) type Sample<'a, B> = &'a dyn Fn(&Stream<B>) -> Result<Stream<B>, RunError>;

/// Returns the first `tokens` tokens of every [`SHARE`]-th of all `windows`, of which rank 0 has embedded some alone; the
/// rest is as `all` has it.
pub(crate) fn of_all_ranks<B: Engine>(
    model: &Model<B>,
    windows: &[Vec<u32>],
    tokens: usize,
    all: &Stream<B>,
) -> Result<Stream<B>, RunError> {
    let picked: Vec<Vec<u32>> = windows.iter().step_by(SHARE).cloned().collect();
    let flows = model.flows(&picked, 1, dtype(model.state_half()))?;
    let span = Span {
        first: 0,
        of: picked.len(),
    };
    let place = (span, all.hidden);
    let all = Stream::new(flows, place, 1, Vec::new(), &Places::DEVICE, None, all.keep)?;
    Ok(all.sample(1, tokens, model.device())?)
}

/// Hidden states at a block's end.
pub(crate) struct States<B: Engine> {
    pub(crate) streams: Vec<Stream<B>>,
    pub(crate) dense: Option<Dense<B>>,
    /// Streams for comparing outputs with the dense model's, if enabled.
    pub(crate) compared: Option<OutputErrors<B>>,
}

/// Storage of a run's hidden states.
pub(crate) fn state_storage<B: Engine>(plan: &Plan) -> StateStorage {
    StateStorage {
        half: B::state_half(plan.half, plan.config.wide),
        clamp: plan.numerics.clamp_overflow,
    }
}

impl<B: Engine> States<B> {
    /// Begins with the embedded windows. With a `sample`, its tokens are to go through the dense model too.
    pub(crate) fn begin(
        plan: &Plan,
        embedded: Embedded<impl Iterator<Item = Result<Flow<B>, ModelError>>>,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        sample: Option<Sample<'_, B>>,
    ) -> Result<Self, RunError> {
        let all = Stream::new(
            embedded.flows,
            (embedded.span, plan.config.hidden_size),
            1,
            Vec::new(),
            places,
            scratch,
            state_storage::<B>(plan),
        )?;
        let branches = plan.branches.len();
        let compared = sample.map(|sample| sample(&all)).transpose()?;
        let compared = compared.map(|sample| OutputErrors::begin(sample, branches));
        let dense = plan
            .needs_dense()
            .then(|| Dense::new(all.every(plan.dense_step()), plan.dense_step()));
        // Branches that solve a block's taps in different groups cannot share a stream.
        let sequential = |&i: &usize| plan.branches[i].true_sequential;
        let (sequential, not) = (0..plan.branches.len()).partition(sequential);
        let groups: [Vec<usize>; 2] = [sequential, not];
        let groups = groups.into_iter().filter(|branches| !branches.is_empty());
        let streams = groups.map(|branches| {
            let mut own = all.clone();
            own.branches = branches;
            own
        });
        Ok(States {
            streams: streams.collect(),
            dense,
            compared,
        })
    }
}
