//! Looks for finished branches and a stopped run in the output directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gptq_calibration::is_date;
use gptq_format::{Checkpoint, FormatError, PackedLinear, StagedDir};
use gptq_plan::{
    BranchPlan, BranchReport, Fingerprint, FinishedBlock, LinearReport, ModelFiles, Origin, Plan,
    PlanError, PlannedLinear, REPORT, Recipe, RecipeOverrides, RecordedRun, check_name,
};

use crate::branch_progress::BranchProgress;
use crate::fingerprint::{Fingerprints, WEIGHTS};
use crate::journal::Journal;
use crate::model_files::ModelHash;
use crate::options::RunOptions;
use crate::saved_states::{SavedStates, prune};
use crate::{RunError, sources};

/// Key in a fingerprint of the date that chat templates were given.
const DATE: &str = "calibration.date";

/// Work left to do, and work done before.
pub(crate) struct WorkLeft {
    /// Reports of the branches that are finished, in the plan's order.
    pub(crate) finished: Vec<Option<BranchReport>>,
    /// Branches that go through the model together, by their index in the plan: those of the
    /// unfinished run, then those nobody has begun.
    pub(crate) passes: Vec<Pass>,
}

/// Branches to make in one pass over the blocks.
pub(crate) struct Pass {
    pub(crate) branches: Vec<usize>,
    /// Finished blocks of these branches, from an earlier run.
    pub(crate) recorded: Option<RecordedRun>,
}

impl WorkLeft {
    /// Returns no work, for a rank that rank 0 tells its own.
    pub(crate) fn none(plan: &Plan) -> WorkLeft {
        WorkLeft {
            finished: vec![None; plan.branches.len()],
            passes: Vec::new(),
        }
    }

    /// Looks, and changes nothing.
    ///
    /// # Errors
    /// The output directory holds a branch or run that was made, or begun, with fingerprints other than
    /// `prints`, and that is not to be made again.
    pub(crate) fn look(
        plan: &Plan,
        checkpoint: &Checkpoint,
        prints: &Fingerprints,
        model_hash: &mut ModelHash,
        options: &RunOptions<'_>,
    ) -> Result<WorkLeft, RunError> {
        let mut found = WorkLeft {
            finished: vec![None; plan.branches.len()],
            passes: Vec::new(),
        };
        let mut rest: Vec<usize> = (0..plan.branches.len()).collect();
        if options.restart {
            found.passes.push(Pass::new(rest, None));
            return Ok(found);
        }
        // A run that has not finished a block has nothing to go on with.
        let recorded = RecordedRun::read(&plan.output)?.filter(|found| !found.blocks.is_empty());
        for (i, branch) in plan.branches.iter().enumerate() {
            let dir = plan.branch_dir(branch);
            // What the unfinished run is to replace does not count.
            let begun = |it: &RecordedRun| it.header.branches.contains_key(&branch.name);
            if !(recorded.as_ref().is_some_and(begun) && StagedDir::is_begun(&dir)) {
                let mut model = || model_hash.now(options.stop, plan.config.layers).cloned();
                found.finished[i] = finished(&dir, &prints.branches[i], &mut model)?;
            }
        }
        rest.retain(|&i| found.finished[i].is_none());
        if let Some(recorded) = recorded {
            check(plan, checkpoint, prints, &recorded)?;
            let begun = |i: &usize| {
                let name = &plan.branches[*i].name;
                recorded.header.branches.contains_key(name)
            };
            let (begun, unbegun) = rest.into_iter().partition(begun);
            rest = unbegun;
            found.passes.push(Pass::new(begun, Some(recorded)));
        }
        found.passes.push(Pass::new(rest, None));
        found.passes.retain(|pass| !pass.branches.is_empty());
        Ok(found)
    }
}

impl Pass {
    pub(crate) fn new(branches: Vec<usize>, recorded: Option<RecordedRun>) -> Self {
        Pass { branches, recorded }
    }
}

/// The report of a finished branch, if there is one. `model` hashes the model's files, which takes time:
/// where the fingerprint differs already, it is not asked.
fn finished(
    dir: &Path,
    print: &Fingerprint,
    model: &mut dyn FnMut() -> Result<ModelFiles, RunError>,
) -> Result<Option<BranchReport>, RunError> {
    let changed = |difference: String| RunError::Finished {
        dir: dir.into(),
        difference,
    };
    if !dir.join(REPORT).exists() {
        return Ok(None);
    }
    let report = BranchReport::read(dir)?;
    let made = report.fingerprint.as_ref();
    let made = made.ok_or_else(|| changed("it does not say with which".to_owned()))?;
    let mut difference = made.difference(print);
    if let (None, Some(files)) = (&difference, &report.model_files) {
        let then = Fingerprint::of("model", files);
        difference = then.difference(&Fingerprint::of("model", &model()?));
    }
    match difference {
        Some(difference) => Err(changed(difference)),
        None => Ok(Some(report)),
    }
}

/// Checks that an unfinished run is the one asked for. The model's files may differ if the tensors that its
/// finished blocks came from are the same.
fn check(
    plan: &Plan,
    checkpoint: &Checkpoint,
    prints: &Fingerprints,
    recorded: &RecordedRun,
) -> Result<(), RunError> {
    let changed = |difference: String| {
        Err(RunError::Unfinished {
            dir: plan.output.clone(),
            difference,
        })
    };
    let header = &recorded.header;
    for (name, begun) in &header.branches {
        match plan.branches.iter().position(|branch| &branch.name == name) {
            None => return changed(format!("branch {name} was asked for, is not")),
            Some(i) => {
                let now = prints.branches[i].clone().without(WEIGHTS);
                if let Some(difference) = begun.clone().without(WEIGHTS).difference(&now) {
                    return changed(format!("branch {name}: {difference}"));
                }
            }
        }
    }
    if let Some(difference) = header.run.difference(&prints.run) {
        return changed(difference);
    }
    let Some(files) = header.files.difference(&prints.files) else {
        return Ok(());
    };
    // Budgets are spent by looking at every block.
    if !header.allocations.is_empty() {
        return changed(format!(
            "the model's files, by which a budget is spent: {files}"
        ));
    }
    if header.embedding != prints.embedding {
        return changed(format!("the embedding, in the model's files: {files}"));
    }
    let layers = plan.config.layers;
    for block in recorded.blocks.iter().take_while(|it| it.layer < layers) {
        if sources::block(checkpoint, &plan.config, block.layer)? != block.source {
            let layer = block.layer;
            return changed(format!(
                "the weights of block {layer}, which is finished, in the model's files: {files}"
            ));
        }
    }
    Ok(())
}

/// The date that a chat template was told when what lies in the output directory was begun, so that it is
/// gone on with, or kept, on any other day: that of the unfinished run, else that of a finished branch.
pub(crate) fn date_told(plan: &Plan) -> Result<Option<String>, RunError> {
    let recorded = RecordedRun::read(&plan.output)?.filter(|found| !found.blocks.is_empty());
    let begun = recorded
        .iter()
        .flat_map(|found| found.header.branches.values());
    let mut told = begun.filter_map(|print| print.text(DATE)).next();
    for branch in &plan.branches {
        let dir = plan.branch_dir(branch);
        if told.is_none() && dir.join(REPORT).exists() {
            let report = BranchReport::read(&dir)?;
            told = report.fingerprint.and_then(|print| print.text(DATE));
        }
    }
    Ok(told.filter(|date| is_date(date)))
}

/// Removes what an unfinished run left: its journal, and the beginnings of its branches and of
/// those of `plan`.
pub(crate) fn discard(plan: &Plan) -> Result<(), RunError> {
    let mut names: Vec<String> = plan.branches.iter().map(|b| b.name.clone()).collect();
    if let Ok(Some(recorded)) = RecordedRun::read(&plan.output) {
        // Names from a file: only what could have been a branch becomes a path.
        let begun = recorded.header.branches.into_keys();
        names.extend(begun.filter(|name| check_name(name).is_ok()));
    }
    Journal::remove(&plan.output)?;
    for name in names {
        StagedDir::discard(&plan.output.join(name))?;
    }
    Ok(())
}

/// The recipe of the unfinished run in `output` with what flags changed in it, and the directory
/// that its paths start from. `evaluation` replaces the text to measure on.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn unfinished(
    output: &Path,
    evaluation: Option<PathBuf>,
) -> Result<(Recipe, PathBuf), RunError> {
    let recorded = RecordedRun::read(output)?
        .ok_or_else(|| RunError::NothingUnfinished { dir: output.into() })?;
    let origin = recorded.header.origin;
    let mut recipe = Recipe::parse(&origin.path, origin.recipe).map_err(PlanError::from)?;
    let overrides = RecipeOverrides {
        output: Some(output.into()),
        evaluation: evaluation.or(origin.overrides.evaluation),
        ..origin.overrides
    };
    recipe.apply(overrides).map_err(PlanError::from)?;
    Ok((recipe, origin.directory))
}

/// The finished blocks of some branches.
pub(crate) struct Restored {
    /// Number of finished blocks.
    pub(crate) layers: usize,
    /// Hidden states to continue from; without them, all of the blocks are run again.
    pub(crate) kept: Option<SavedStates>,
    /// Each branch of the pass, in its order.
    pub(crate) branches: Vec<RestoredBranch>,
}

/// One branch's part of the finished blocks.
#[derive(Default)]
pub(crate) struct RestoredBranch {
    pub(crate) progress: BranchProgress,
    /// Positions in its linears, by name.
    places: BTreeMap<String, usize>,
}

impl Restored {
    /// A run from the start.
    pub(crate) fn none(plan: &Plan) -> Self {
        let branches = plan.branches.iter().map(|_| RestoredBranch::default());
        Restored {
            layers: 0,
            kept: None,
            branches: branches.collect(),
        }
    }

    /// Progress that rank 0 has restored, as it tells the others: so many finished blocks, and the block to begin with.
    pub(crate) fn of_rank_0(plan: &Plan, [layers, first]: [usize; 2]) -> Self {
        Restored {
            layers,
            kept: (first > 0).then(|| SavedStates::of_rank_0(first)),
            ..Restored::none(plan)
        }
    }

    /// The block to begin with.
    pub(crate) fn first(&self) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.layers)
    }

    /// The progress that each branch begins with.
    pub(crate) fn progress(&self) -> Vec<BranchProgress> {
        let branches = self.branches.iter();
        branches.map(|branch| branch.progress.clone()).collect()
    }

    /// Restores the branches of `plan` from a recorded run.
    pub(crate) fn new(plan: &Plan, recorded: RecordedRun) -> Result<Self, RunError> {
        let layers = recorded.blocks.len();
        // With the last block done there is nothing to go over.
        let kept = match layers < plan.config.layers {
            true => SavedStates::find(&plan.output, &recorded.blocks),
            false => None,
        };
        let damaged = |reason: String| {
            RunError::from(PlanError::Journal {
                path: plan.output.clone(),
                reason,
            })
        };
        let mut found: BTreeMap<String, RestoredBranch> = BTreeMap::new();
        for FinishedBlock {
            layer, branches, ..
        } in recorded.blocks
        {
            for (name, block) in branches {
                (block.check(layer)).map_err(|why| damaged(format!("branch {name}: {why}")))?;
                let branch = found.entry(name).or_default();
                branch.progress.blocks.extend(block.report(layer));
                branch.progress.seconds = block.seconds;
                branch.progress.linears.extend(block.linears);
                branch.progress.clamped.extend(block.clamped);
            }
        }
        if layers > plan.config.layers {
            return Err(damaged(format!("the model has no {layers} blocks")));
        }
        let branches = plan.branches.iter().map(|branch| {
            let mut restored = found.remove(&branch.name).unwrap_or_default();
            let names = restored
                .progress
                .linears
                .iter()
                .map(|linear| linear.name.clone());
            restored.places = names.zip(0..).collect();
            match restored.fits(plan, branch, layers) {
                Ok(()) => Ok(restored),
                Err(why) => Err(damaged(format!("branch {}: {why}", branch.name))),
            }
        });
        let branches = branches.collect::<Result<_, _>>()?;
        prune(&plan.output, kept.as_ref().map(|kept| kept.layers - 1))?;
        Ok(Restored {
            layers,
            kept,
            branches,
        })
    }
}

impl RestoredBranch {
    /// Checks that these are the linears that the first `layers` blocks of `branch` have.
    fn fits(&self, plan: &Plan, branch: &BranchPlan, layers: usize) -> Result<(), String> {
        let planned = branch.planned_linears(&plan.config).into_iter();
        let planned = planned.filter(|linear| linear.layer < layers);
        let mut missing: BTreeMap<String, PlannedLinear> = planned
            .map(|linear| (linear.module.clone(), linear))
            .collect();
        for linear in &self.progress.linears {
            let name = &linear.name;
            let found = missing.remove(name).is_some_and(|own| {
                let (n_in, n_out) = own.shape;
                let settings = (own.settings.bits, own.settings.group_size);
                (linear.layer, linear.shape) == (own.layer, [n_out, n_in])
                    && (linear.bits, linear.group_size) == settings
            });
            if !found {
                return Err(format!("{name} is not as planned, or there twice"));
            }
        }
        if let Some((name, _)) = missing.first_key_value() {
            return Err(format!("{name} is missing"));
        }
        Ok(())
    }

    /// A linear that was done, by its name.
    pub(crate) fn linear(&self, module: &str) -> Option<&LinearReport> {
        self.places
            .get(module)
            .map(|&at| &self.progress.linears[at])
    }

    /// Reads a linear back from the branch's unfinished files.
    ///
    /// # Errors
    /// It is not what was written.
    pub(crate) fn read(
        &self,
        partial: &Checkpoint,
        report: &LinearReport,
    ) -> Result<PackedLinear, RunError> {
        let [n_out, n_in] = report.shape;
        let digests = partial.digests(&report.name, n_in, n_out)?;
        let packed = partial.packed(&report.name, n_in, n_out)?;
        packed.filter(|_| digests == report.digests).ok_or_else(|| {
            let path = partial.dir().into();
            let reason = format!("{} is not what was written", report.name);
            PlanError::Journal { path, reason }.into()
        })
    }
}

/// Returns the command's inputs, for going on with the run from its output alone.
pub(crate) fn origin(plan: &Plan) -> Result<Origin, FormatError> {
    let here = Path::new(".");
    Ok(Origin {
        path: plan.recipe_path.clone(),
        recipe: plan.recipe.clone(),
        overrides: plan.overrides.clone(),
        directory: here.canonicalize().map_err(FormatError::io(here))?,
    })
}
