//! A validated recipe: every setting resolved and checked against the model's shapes.

use std::path::{Path, PathBuf};

use gptq_calibration::CalibrationSettings;
use gptq_format::{Checkpoint, FormatError, Half, QuantizeConfig, read_json};
use gptq_spec::{BlockSpec, Census, ModelConfig};
use toml::Spanned;

use crate::byte_size::parse_size;
use crate::inputs::{calibration_settings, looks_like_repo, model_source};
use crate::recipe_file::{OnOverflow, Propagate};
use crate::share::{dense_step, step_windows};
use crate::written_config::written_config;
use crate::{
    BranchPlan, Chunking, ExpertTokens, FetchedInputs, InputSource, PlanError, Recipe, RecipeError,
    RecipeOverrides, Share, branch_resolution, limits,
};

/// Source of the hidden states for a branch's Hessians.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// The branch's own, quantization errors included.
    Quantized,
    /// The dense model's, shared by all branches.
    Dense,
}

/// Handling of numbers that are out of range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Numerics {
    /// Clamp hidden states beyond the range of their storage type; otherwise they end the run.
    pub clamp_overflow: bool,
    /// Maximum damping of a linear layer, as a fraction of the mean diagonal.
    pub max_damping: f64,
}

/// Numbers of checked weight files and tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weights {
    /// Number of files.
    pub files: usize,
    /// Number of tensors in them.
    pub tensors: usize,
}

/// A validated run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Directory of the dense checkpoint.
    pub model_dir: PathBuf,
    /// The base model's public name, for `quantize_config.json`.
    pub model_name: String,
    /// Its shapes.
    pub config: ModelConfig,
    /// Its weights according to their headers; `None` if not downloaded yet.
    pub weights: Option<Weights>,
    /// 16-bit dtype that weights are converted to, and written in if they stay unquantized.
    pub half: Half,
    /// Calibration data and windows.
    pub calibration: CalibrationSettings,
    /// Source of the propagated hidden states.
    pub propagation: Propagation,
    /// Directory of the branch directories.
    pub output: PathBuf,
    /// Maximum size of a weight file in bytes.
    pub shard_size: Option<u64>,
    /// Text and window for measuring perplexity.
    pub evaluation: Option<(PathBuf, usize)>,
    /// Handling of numbers that are out of range.
    pub numerics: Numerics,
    /// The branches, in the recipe's order.
    pub branches: Vec<BranchPlan>,
    /// Warnings that do not stop a run.
    pub warnings: Vec<String>,
    /// The recipe's text.
    pub recipe: String,
    /// The text without local directories, for the report.
    pub public_recipe: String,
    /// Path of the recipe, for messages.
    pub recipe_path: PathBuf,
    /// Changes by the command line.
    pub overrides: RecipeOverrides,
    /// Command line of the run for the report, without local paths.
    pub command: Option<String>,
}

impl Plan {
    /// Resolves and checks `recipe` against its model; `fetched` holds the inputs from the Hub. If
    /// the weights are present, their headers are compared with the config.
    pub fn new(recipe: &Recipe, fetched: &FetchedInputs) -> Result<Plan, PlanError> {
        let dir = match (&fetched.model, model_source(recipe)?) {
            (Some(dir), _) => dir.clone(),
            (None, InputSource::Local(dir)) => dir,
            (None, InputSource::Hub { repo, .. }) => {
                let source = &recipe.file.model.source;
                return Err(recipe
                    .refuse(source, format!("{repo} was not downloaded"))
                    .into());
            }
        };
        // A Hub model's weights are downloaded after its plan.
        let (config, weights, warnings) = look(&dir, fetched.model.is_some())?;
        let calibration = calibration_settings(recipe, fetched)?;
        let mut plan = Plan::for_config(recipe, config)?;
        let base = read_json(&dir.join("config.json"))?;
        if let Ok((_, notes)) = written_config(base, plan.half) {
            plan.warnings.extend(notes);
        }
        (plan.model_dir, plan.calibration, plan.weights) = (dir, calibration, weights);
        plan.warnings.extend(warnings);
        Ok(plan)
    }

    /// Resolves and checks `recipe` against shapes alone, without reading its `source`.
    pub fn for_config(recipe: &Recipe, config: ModelConfig) -> Result<Plan, RecipeError> {
        let file = &recipe.file;
        let calibration = calibration_settings(recipe, &FetchedInputs::default())?;
        let mut branches: Vec<BranchPlan> = Vec::new();
        for branch in &file.branch {
            let plan = branch_resolution::resolve(recipe, branch, &config)?;
            if branches.iter().any(|b| b.name == plan.name) {
                let at = &branch.get_ref().name;
                return Err(recipe.refuse(at, format!("a second branch is named {:?}", plan.name)));
            }
            branches.push(plan);
        }
        if branches.is_empty() {
            let start = Spanned::new(0..0, ());
            return Err(recipe.refuse(&start, "no [[branch]]; a recipe needs at least one"));
        }
        let linears = branches.iter().map(|b| b.planned_linears(&config).len());
        let linears: Vec<usize> = linears.collect();
        limits::check_plan(&linears).map_err(|why| recipe.refuse(&Spanned::new(0..0, ()), why))?;
        let numerics = Numerics {
            clamp_overflow: file.numerics.overflow == OnOverflow::Clamp,
            max_damping: match &file.numerics.max_damping {
                None => 1.0,
                Some(most) if (0.0..=1.0).contains(most.get_ref()) => *most.get_ref(),
                Some(most) => {
                    let reason = format!("max_damping = {} is not between 0 and 1", most.get_ref());
                    return Err(recipe.refuse(most, reason));
                }
            },
        };
        if let Some(branch) = (branches.iter()).find(|b| b.damp_percent > numerics.max_damping) {
            let start = Spanned::new(0..0, ());
            let at = file.numerics.max_damping.as_ref().map(Spanned::span);
            let place = at.map_or(start, |span| Spanned::new(span, ()));
            let reason = format!(
                "max_damping = {} is below the damp_percent = {} of branch {}",
                numerics.max_damping, branch.damp_percent, branch.name
            );
            return Err(recipe.refuse(&place, reason));
        }
        let mut warnings: Vec<String> = recipe.old_spellings().collect();
        if config.wide && file.model.dtype == Half::F16 {
            warnings.push(
                "hidden states of this family exceed f16, which CUDA and most readers would compute in; use dtype = \
                 \"bf16\" under [model]"
                    .to_owned(),
            );
        }
        if calibration.seq_len > config.max_positions {
            warnings.push(format!(
                "windows of {} tokens are longer than the model's context of {}; calibrating at \
                 positions it was not trained for",
                calibration.seq_len, config.max_positions
            ));
        }
        warnings.extend(experts_note(&config, &branches));
        let propagation = match file.propagate {
            Propagate::Quantized => Propagation::Quantized,
            Propagate::Dense => Propagation::Dense,
        };
        if propagation == Propagation::Dense {
            // The inputs are the dense model's, so there is no mismatch to correct. Tuning needs the branch's own.
            for branch in &mut branches {
                branch.method.mismatch_correction = 0.0;
                branch.method.tune = 0;
            }
        }
        let source = file.model.source.get_ref();
        Ok(Plan {
            model_dir: source.into(),
            model_name: public_name(source),
            config,
            weights: None,
            half: file.model.dtype,
            calibration,
            propagation,
            output: file.output.dir.get_ref().clone(),
            shard_size: file
                .output
                .shard_size
                .as_ref()
                .map(|size| parse_size(size.get_ref()).map_err(|why| recipe.refuse(size, why)))
                .transpose()?,
            evaluation: file
                .evaluation
                .as_ref()
                .map(|e| (e.text.get_ref().clone(), *e.window.get_ref())),
            numerics,
            branches,
            warnings,
            recipe: recipe.text.clone(),
            public_recipe: recipe.public_text.clone(),
            recipe_path: recipe.path.clone(),
            overrides: recipe.overrides.clone(),
            command: None,
        })
    }

    /// Returns the directory of a branch.
    pub fn branch_dir(&self, branch: &BranchPlan) -> PathBuf {
        self.output.join(&branch.name)
    }

    /// Returns the plan for these branches only.
    pub fn only(&self, branches: &[usize]) -> Plan {
        let branches = branches.iter().map(|&i| self.branches[i].clone());
        Plan {
            branches: branches.collect(),
            ..self.clone()
        }
    }

    /// Returns the number of calibration tokens.
    pub fn tokens(&self) -> usize {
        self.calibration.samples * self.calibration.seq_len
    }

    /// True if any branch needs the dense model beside its own.
    pub fn needs_dense(&self) -> bool {
        self.branches.iter().any(|b| b.method.needs_dense())
    }

    /// Returns the stride of the chunks that also run through the dense model where it does so.
    pub fn dense_step(&self) -> usize {
        dense_step(self.tokens())
    }

    /// Returns the number of windows in a step of tuning, if there are as many.
    pub fn step_windows(&self) -> usize {
        let tokens = self.tokens() / self.dense_step();
        step_windows(tokens, self.calibration.seq_len)
    }

    /// Returns the bytes of an expert's Gram matrices at `tap`, in one lane: of all tokens, and for mismatch correction
    /// those of the dense model's tokens, with its inputs and with its residual stream.
    pub(crate) fn expert_gram_bytes(&self, block: &BlockSpec, tap: usize) -> u128 {
        let n = block.in_features(tap) as u128;
        let (hidden, down) = (self.config.hidden_size as u128, !block.dispatches(tap));
        let corrects = self.branches.iter().any(|it| it.method.corrects_mismatch());
        let rows = match corrects {
            true => 4 * n + if down { hidden } else { 0 },
            false => 2 * n,
        };
        rows * n * 4
    }

    /// Returns the number of experts at `tap` whose Gram matrices are taken together, with a limit on their bytes.
    pub fn expert_slice(
        &self,
        block: &BlockSpec,
        tap: usize,
        chunking: Chunking,
        limit: u64,
    ) -> usize {
        let one = chunking.expert_sums(self.expert_gram_bytes(block, tap));
        let slice = u128::from(limit) / one.max(1);
        (slice as usize).clamp(1, block.inputs(tap))
    }

    /// Returns the calibration tokens used for output errors.
    pub fn share(&self) -> Share {
        Share::of(self.calibration.samples, self.calibration.seq_len)
    }
}

/// States what it costs to give every token to every expert, if a branch asks for that.
fn experts_note(config: &ModelConfig, branches: &[BranchPlan]) -> Option<String> {
    let mut routes = config.blocks().iter().flat_map(|block| {
        let taps = block.taps().filter_map(|tap| block.experts_at(tap));
        taps.map(|route| route.how)
    });
    let how = routes.next()?;
    let mut branches = branches.iter();
    let branch = branches.find(|it| it.method.experts == ExpertTokens::All)?;
    Some(format!(
        "branch {}: experts = \"all\" gives every token to all {} experts to calibrate them, where the router gives it to \
         {}: {:.0} times the products and Gram sums",
        branch.name,
        how.experts,
        how.top_k,
        how.experts as f64 / how.top_k as f64
    ))
}

/// Reads the config of the model in `dir` and, if present, its weights' headers; also returns
/// warnings. `partial` weights count as missing.
fn look(
    dir: &Path,
    partial: bool,
) -> Result<(ModelConfig, Option<Weights>, Vec<String>), PlanError> {
    let config = ModelConfig::read(&dir.join("config.json"))?;
    let quantized = || PlanError::Quantized { dir: dir.into() };
    let checkpoint = match Checkpoint::open(dir) {
        Ok(checkpoint) if !partial || checkpoint.absent_files().is_empty() => checkpoint,
        Err(FormatError::NoCheckpoint { .. }) | Ok(_) => {
            return match QuantizeConfig::read(dir)? {
                Some(_) => Err(quantized()),
                None => Ok((config, None, Vec::new())),
            };
        }
        // The index names a file that is missing.
        Err(FormatError::Malformed { .. }) if partial => return Ok((config, None, Vec::new())),
        Err(error) => return Err(error.into()),
    };
    let weights = Weights {
        files: checkpoint.files().len(),
        tensors: checkpoint.names().count(),
    };
    let census = Census::of(config, checkpoint);
    match census.fault {
        Some(fault) => Err(fault.into()),
        None if census.checkpoint.quantize_config().is_some() => Err(quantized()),
        None => Ok((census.config, Some(weights), census.warnings)),
    }
}

/// Returns a directory's last component, or a Hub id unchanged, so that no local path is published.
fn public_name(source: &str) -> String {
    let path = Path::new(source);
    let is_repo = !path.exists() && looks_like_repo(source);
    match path.file_name() {
        Some(name) if !is_repo => name.to_string_lossy().into_owned(),
        _ => source.to_owned(),
    }
}

#[cfg(test)]
mod reader_tests;
#[cfg(test)]
mod tests;
