//! All hidden states of a run.

use std::sync::Arc;

use gptq_kernels::Engine;
use gptq_model::{Flow, ModelError};
use gptq_plan::{Places, Plan};

use crate::RunError;
use crate::gram::Dense;
use crate::output_errors::OutputErrors;
use crate::scratch::Scratch;
use crate::stream::{StateStorage, Stream};

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
    /// Begins with the embedded windows. `compare`: a share of them is to go through the dense model too.
    pub(crate) fn begin(
        plan: &Plan,
        flows: impl Iterator<Item = Result<Flow<B>, ModelError>>,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        compare: Option<&B::Device>,
    ) -> Result<Self, RunError> {
        let all = Stream::new(
            flows,
            1,
            Vec::new(),
            places,
            scratch,
            state_storage::<B>(plan),
        )?;
        let branches = plan.branches.len();
        let compared = compare
            .map(|device| OutputErrors::begin(&all, plan.share(), branches, device))
            .transpose()?;
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
