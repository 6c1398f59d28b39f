//! One pass over the blocks: the blocks of an interrupted run replayed, the others solved, every branch put in
//! place.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use gptq_format::Checkpoint;
use gptq_kernels::Engine;
use gptq_model::{Flow, Model, ModelError};
use gptq_plan::{BranchReport, Places, Plan};

use crate::block_loop::BlockLoop;
use crate::finish::{About, finish};
use crate::model_files::ModelHash;
use crate::options::check_stop;
use crate::peers::Peers;
use crate::profile::Clock;
use crate::read_ahead::Ahead;
use crate::replay::Replay;
use crate::resume::Restored;
use crate::scratch::Scratch;
use crate::solve::{Solve, SolvedSink};
use crate::states::{Embedded, Sample, States};
use crate::write_behind::WriteBehind;
use crate::{Event, RunError};

/// A pass, and what it works with.
pub(crate) struct Run<'a, 'scope, B: Engine> {
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model<B>,
    pub(crate) peers: Peers<'a, B>,
    pub(crate) model_hash: &'a mut ModelHash,
    /// The writer of rank 0.
    pub(crate) writer: Option<WriteBehind<'scope>>,
    /// The finished blocks of an interrupted run.
    pub(crate) restored: Restored,
    /// The branches' files, where there is anything to restore.
    pub(crate) partials: Vec<Checkpoint>,
    pub(crate) clock: &'a mut Clock,
    pub(crate) frugal: bool,
    pub(crate) stop: &'a AtomicBool,
    pub(crate) save_every: Duration,
    pub(crate) on_event: &'a mut dyn FnMut(Event<'_>),
}

impl<B: Engine> Run<'_, '_, B> {
    /// Takes hidden states through all blocks, and puts every branch in place; there are no reports on other ranks than
    /// rank 0, which does that.
    pub(crate) fn carry_out(
        mut self,
        embedded: Embedded<impl Iterator<Item = Result<Flow<B>, ModelError>>>,
        sample: Option<Sample<'_, B>>,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        blocks: &Receiver<Ahead>,
        about: About<'_>,
    ) -> Result<Vec<BranchReport>, RunError> {
        let (plan, model, peers, stop) = (self.plan, self.model, self.peers, self.stop);
        let layers = plan.config.layers;
        let last_saved = Instant::now();
        let (first, kept) = (self.restored.first(), self.restored.kept.take());
        let mut progress = self.restored.progress();
        let mut replay = Replay {
            plan,
            model,
            peers,
            restored: &self.restored,
            partials: &self.partials,
            progress: &mut progress,
            stop,
            on_event: self.on_event,
        };
        // Where only the last files were missing there is nothing to run, only to look at.
        if self.restored.layers == layers {
            replay.reread(layers)?;
        } else {
            let mut states = match kept {
                Some(kept) => {
                    replay.reread(kept.layers)?;
                    kept.read(plan, places, scratch, peers.ranks, model.device())?
                }
                None => States::begin(plan, embedded, places, scratch, sample)?,
            };
            self.clock.add_start();
            let model_hash = &mut *self.model_hash;
            let mut pass = BlockLoop {
                plan,
                model,
                peers,
                clock: self.clock,
                frugal: self.frugal,
                gram_bytes: places.gram_bytes,
                check: &mut || {
                    check_stop(stop, layers)?;
                    peers.check()?;
                    model_hash.check()
                },
            };
            pass.run(
                first..self.restored.layers,
                &mut states,
                blocks,
                &mut replay,
            )?;
            let mut solve = Solve {
                plan,
                model,
                sink: self
                    .writer
                    .as_mut()
                    .map(|writer| writer as &mut dyn SolvedSink),
                peers,
                progress: &mut progress,
                save_every: self.save_every,
                last_saved,
                stop,
                on_event: self.on_event,
                waiting: VecDeque::new(),
                tuning: None,
            };
            pass.run(
                self.restored.layers..layers,
                &mut states,
                blocks,
                &mut solve,
            )?;
        }
        let started = Instant::now();
        let Some(writer) = self.writer else {
            return Ok(Vec::new());
        };
        let writers = writer.finish()?;
        let model_files = self.model_hash.wait(stop, layers)?;
        let branches = progress.into_iter().zip(writers);
        let phases = self.clock.profile().phases();
        let reports = finish(
            plan,
            branches,
            model_files,
            phases,
            &about,
            stop,
            self.on_event,
        );
        self.clock
            .add(crate::Phase::Write, started.elapsed().as_secs_f64());
        reports
    }
}
