//! A recipe made valid: every setting resolved, checked against the model's shapes.

use std::path::{Path, PathBuf};

use gptq_calibration::{CalibrationSettings, RowRange, Template};
use gptq_format::{
    Bits, CheckpointFormat, Dynamic, GroupSize, LinearShape, QuantizeConfig, Support, TensorSpec,
    client_support,
};
use gptq_model::{ModelConfig, Projection};
use gptq_solver::Settings;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::recipe::{Branch, Override, Propagate};
use crate::{Memory, Recipe, RecipeError};

/// Longest branch name taken: it becomes a directory and a Hub revision.
const MAX_NAME: usize = 96;

/// Which hidden states a branch's Hessians are computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// The branch's own, quantisation errors included.
    Quantised,
    /// The dense model's, shared by all branches.
    Dense,
}

/// How codes and scales are found; the format is the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Exactly AutoGPTQ's method: every scale just spans its group.
    Autogptq,
    /// Each scale searched for the least error, weighted by what the solver pays for it.
    #[default]
    Standard,
}

/// A valid run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Directory of the dense checkpoint.
    pub model_dir: PathBuf,
    /// The base model's public name, for `quantize_config.json`.
    pub model_name: String,
    /// Its shapes.
    pub config: ModelConfig,
    /// What to calibrate on.
    pub calibration: CalibrationSettings,
    /// Which hidden states are propagated.
    pub propagation: Propagation,
    /// Where branch directories go.
    pub output: PathBuf,
    /// Largest weight file, bytes.
    pub shard_size: Option<u64>,
    /// Text and window to measure perplexity on.
    pub evaluation: Option<(PathBuf, usize)>,
    /// The branches, in the recipe's order.
    pub branches: Vec<BranchPlan>,
    /// Things a user should know but that do not stop a run.
    pub warnings: Vec<String>,
    /// The recipe's text.
    pub recipe: String,
}

/// One branch, every setting known.
#[derive(Clone, Debug)]
pub struct BranchPlan {
    /// Directory name, and later the Hub revision.
    pub name: String,
    /// Code width.
    pub bits: Bits,
    /// Columns per group.
    pub group_size: GroupSize,
    /// Act order.
    pub desc_act: bool,
    /// Groups fixed from the original weights.
    pub static_groups: bool,
    /// Symmetric codes.
    pub sym: bool,
    /// Damping as a fraction of the mean diagonal.
    pub damp_percent: f64,
    /// Later linears of a block see the error of earlier ones.
    pub true_sequential: bool,
    /// How codes and scales are found.
    pub preset: Preset,
    overrides: Vec<ModuleOverride>,
}

#[derive(Clone, Debug)]
struct ModuleOverride {
    pattern: String,
    /// `None`: left in full precision.
    settings: Option<(Bits, GroupSize)>,
}

impl Plan {
    /// Resolves and checks `recipe` against the model in its `source` directory.
    pub fn new(recipe: &Recipe) -> Result<Plan, crate::PipelineError> {
        let source = &recipe.file.model.source;
        let dir = Path::new(source.get_ref());
        if !dir.is_dir() {
            return Err(recipe
                .refuse(
                    source,
                    format!(
                        "model source {:?} is not a directory here; download the checkpoint and \
                         name its directory",
                        source.get_ref()
                    ),
                )
                .into());
        }
        if let Some(revision) = &recipe.file.model.revision {
            return Err(recipe
                .refuse(
                    revision,
                    "a revision means nothing for a local directory; remove it",
                )
                .into());
        }
        let config = ModelConfig::read(&dir.join("config.json"))?;
        Ok(Plan::for_config(recipe, config)?)
    }

    /// Resolves and checks `recipe` against shapes alone: nothing is read from its `source`.
    pub fn for_config(recipe: &Recipe, config: ModelConfig) -> Result<Plan, RecipeError> {
        let file = &recipe.file;
        let calibration = calibration(recipe)?;
        let mut branches: Vec<BranchPlan> = Vec::new();
        for branch in &file.branch {
            let plan = BranchPlan::new(recipe, branch, &config)?;
            if branches.iter().any(|b| b.name == plan.name) {
                let at = &branch.get_ref().name;
                return Err(recipe.refuse(at, format!("a second branch named {:?}", plan.name)));
            }
            branches.push(plan);
        }
        if branches.is_empty() {
            let start = Spanned::new(0..0, ());
            return Err(recipe.refuse(&start, "no [[branch]]; a recipe needs at least one"));
        }
        let mut warnings = Vec::new();
        if calibration.seq_len > config.max_positions {
            warnings.push(format!(
                "windows of {} tokens are longer than the model's context of {}; calibrating at \
                 positions it was not trained for",
                calibration.seq_len, config.max_positions
            ));
        }
        let source = file.model.source.get_ref();
        Ok(Plan {
            model_dir: source.into(),
            model_name: public_name(source),
            config,
            calibration,
            propagation: match file.propagate {
                Propagate::Quantised => Propagation::Quantised,
                Propagate::Dense => Propagation::Dense,
            },
            output: file.output.dir.clone(),
            shard_size: file
                .output
                .shard_size
                .as_ref()
                .map(|size| parse_size(size.get_ref()).map_err(|why| recipe.refuse(size, why)))
                .transpose()?,
            evaluation: file.evaluation.as_ref().map(|e| (e.text.clone(), e.window)),
            branches,
            warnings,
            recipe: recipe.text.clone(),
        })
    }

    /// Where a branch goes.
    pub fn branch_dir(&self, branch: &BranchPlan) -> PathBuf {
        self.output.join(&branch.name)
    }

    /// Calibration tokens.
    pub fn tokens(&self) -> usize {
        self.calibration.samples * self.calibration.seq_len
    }

    /// What the run will hold at once.
    pub fn memory(&self) -> Memory {
        Memory::of(self)
    }
}

/// A directory's last component, or a Hub id as it is: never a path of this machine.
fn public_name(source: &str) -> String {
    let path = Path::new(source);
    let is_hub_id =
        !path.exists() && source.matches('/').count() == 1 && !source.starts_with(['.', '/']);
    match path.file_name() {
        Some(name) if !is_hub_id => name.to_string_lossy().into_owned(),
        _ => source.to_owned(),
    }
}

fn calibration(recipe: &Recipe) -> Result<CalibrationSettings, RecipeError> {
    let file = &recipe.file.calibration;
    let rows: RowRange =
        file.rows
            .get_ref()
            .parse()
            .map_err(|e: gptq_calibration::CalibrationError| {
                recipe.refuse(&file.rows, e.to_string())
            })?;
    let template = Template::parse(file.template.get_ref())
        .map_err(|e| recipe.refuse(&file.template, e.to_string()))?;
    let at_least = |value: &Spanned<usize>, least: usize, name: &str| match *value.get_ref() {
        v if v >= least && v <= 1 << 24 => Ok(v),
        v => Err(recipe.refuse(
            value,
            format!("{name} = {v} is not between {least} and 2^24"),
        )),
    };
    Ok(CalibrationSettings {
        source: file.source.get_ref().clone(),
        template,
        rows,
        samples: at_least(&file.samples, 1, "samples")?,
        seq_len: at_least(&file.seq_len, 2, "seq_len")?,
        seed: file.seed,
        sampling: file.sampling,
    })
}

/// `"4GB"`, `"512MiB"`, `"1000000"` in bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let error = || format!("{text:?} is not a size like \"4GB\" or \"512MiB\"");
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(error()),
    };
    let number: u64 = number.parse().map_err(|_| error())?;
    number
        .checked_mul(factor)
        .filter(|&bytes| bytes > 0)
        .ok_or_else(error)
}

impl BranchPlan {
    fn new(
        recipe: &Recipe,
        branch: &Spanned<Branch>,
        config: &ModelConfig,
    ) -> Result<BranchPlan, RecipeError> {
        let place = branch;
        let branch = branch.get_ref();
        let defaults = &recipe.file.defaults;
        check_name(branch.name.get_ref()).map_err(|why| recipe.refuse(&branch.name, why))?;

        let bits = branch.bits.as_ref().or(defaults.bits.as_ref());
        let bits = bits.ok_or_else(|| {
            recipe.refuse(
                place,
                "bits is set neither here nor in [defaults]; valid are 2, 3, 4, 8",
            )
        })?;
        let default_group = Spanned::new(branch.name.span(), GroupSize::Columns(128));
        let group_size = branch
            .group_size
            .as_ref()
            .or(defaults.group_size.as_ref())
            .unwrap_or(&default_group);
        let damp = branch
            .damp_percent
            .as_ref()
            .or(defaults.damp_percent.as_ref());
        let damp_percent = match damp {
            None => 0.1,
            Some(damp) if (0.0..=1.0).contains(damp.get_ref()) => *damp.get_ref(),
            Some(damp) => {
                let reason = format!("damp_percent = {} is not between 0 and 1", damp.get_ref());
                return Err(recipe.refuse(damp, reason));
            }
        };
        let mut plan = BranchPlan {
            name: branch.name.get_ref().clone(),
            bits: *bits.get_ref(),
            group_size: *group_size.get_ref(),
            desc_act: branch.desc_act.or(defaults.desc_act).unwrap_or(true),
            static_groups: branch
                .static_groups
                .or(defaults.static_groups)
                .unwrap_or(false),
            sym: branch.sym.or(defaults.sym).unwrap_or(true),
            damp_percent,
            true_sequential: branch
                .true_sequential
                .or(defaults.true_sequential)
                .unwrap_or(true),
            preset: branch.preset.or(defaults.preset).unwrap_or_default(),
            overrides: Vec::new(),
        };
        for own in &branch.overrides {
            plan.add_override(recipe, own, config)?;
        }
        for (module, (n_in, n_out), settings) in plan.quantised_modules(config) {
            if n_in % 32 != 0 || n_out % 32 != 0 {
                let reason = format!(
                    "{module} is {n_in} x {n_out}: packing needs multiples of 32; skip it with an override"
                );
                return Err(recipe.refuse(place, reason));
            }
            // An override's own group size was checked when it was added.
            if !settings.group_size.divides(n_in) {
                return Err(
                    recipe.refuse(group_size, group_reason(settings.group_size, &module, n_in))
                );
            }
        }
        if plan.quantised_modules(config).is_empty() {
            return Err(recipe.refuse(
                place,
                "its overrides skip every linear; nothing is left to quantise",
            ));
        }
        Ok(plan)
    }

    fn add_override(
        &mut self,
        recipe: &Recipe,
        own: &Override,
        config: &ModelConfig,
    ) -> Result<(), RecipeError> {
        let pattern = own.pattern.get_ref();
        let matched: Vec<(String, usize)> = modules(config)
            .filter(|(module, _)| matches(pattern, module))
            .map(|(module, projection)| (module, projection.shape(config).0))
            .collect();
        if matched.is_empty() {
            let reason = format!(
                "match = {pattern:?} matches no linear; names are like {:?}, and * stands for anything",
                Projection::Down.module(0)
            );
            return Err(recipe.refuse(&own.pattern, reason));
        }
        if own.skip && (own.bits.is_some() || own.group_size.is_some()) {
            return Err(recipe.refuse(
                &own.pattern,
                "skip = true leaves no use for bits or group_size; keep one",
            ));
        }
        let group_size = own
            .group_size
            .as_ref()
            .map_or(self.group_size, |g| *g.get_ref());
        if !own.skip {
            for (module, n_in) in &matched {
                if !group_size.divides(*n_in) {
                    let reason = group_reason(group_size, module, *n_in);
                    return Err(match &own.group_size {
                        Some(at) => recipe.refuse(at, reason),
                        None => recipe.refuse(&own.pattern, reason),
                    });
                }
            }
        }
        let bits = own.bits.as_ref().map_or(self.bits, |b| *b.get_ref());
        self.overrides.push(ModuleOverride {
            pattern: pattern.clone(),
            settings: (!own.skip).then_some((bits, group_size)),
        });
        Ok(())
    }

    /// Solver settings of a module, or `None` when it stays in full precision.
    pub fn module(&self, module: &str) -> Option<Settings> {
        let own = self.overrides.iter().find(|o| matches(&o.pattern, module));
        let (bits, group_size) = match own {
            Some(own) => own.settings?,
            None => (self.bits, self.group_size),
        };
        Some(Settings {
            bits,
            group_size,
            sym: self.sym,
            static_groups: self.static_groups,
            scale_search: self.preset == Preset::Standard,
            f16_scales: true,
        })
    }

    /// Name, `(in, out)` and settings of every quantised linear.
    pub fn quantised_modules(
        &self,
        config: &ModelConfig,
    ) -> Vec<(String, (usize, usize), Settings)> {
        modules(config)
            .filter_map(|(module, projection)| {
                let settings = self.module(&module)?;
                Some((module, projection.shape(config), settings))
            })
            .collect()
    }

    /// How zero points are stored: asymmetric branches may have a zero of 0, which v1 cannot hold.
    pub fn format(&self) -> CheckpointFormat {
        match self.sym {
            true => CheckpointFormat::Gptq,
            false => CheckpointFormat::GptqV2,
        }
    }

    /// What readers are told.
    pub fn quantize_config(&self, model_name: &str) -> QuantizeConfig {
        let dynamic = self.overrides.iter().map(|own| {
            let expression = expression(&own.pattern);
            match own.settings {
                None => (format!("-:{expression}"), Dynamic::default()),
                Some((bits, group_size)) => (
                    format!("+:{expression}"),
                    Dynamic {
                        bits: Some(bits),
                        group_size: Some(group_size),
                    },
                ),
            }
        });
        QuantizeConfig {
            bits: self.bits,
            group_size: self.group_size,
            damp_percent: self.damp_percent,
            desc_act: self.desc_act,
            static_groups: self.static_groups,
            sym: self.sym,
            true_sequential: self.true_sequential,
            model_name_or_path: Some(model_name.to_owned()),
            model_file_base_name: Some("model".to_owned()),
            quant_method: "gptq".to_owned(),
            checkpoint_format: self.format(),
            dynamic: (!self.overrides.is_empty()).then(|| dynamic.collect()),
        }
    }

    /// Every tensor of the branch's files, in model order.
    pub fn tensors(&self, config: &ModelConfig) -> Vec<TensorSpec> {
        let mut specs = Vec::new();
        let mut add = |name: String, dtype, shape: &[usize]| {
            specs.push(TensorSpec {
                name,
                dtype,
                shape: shape.into(),
            });
        };
        let hidden = config.hidden_size;
        add(
            "model.embed_tokens.weight".into(),
            Dtype::F16,
            &[config.vocabulary, hidden],
        );
        for layer in 0..config.layers {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(
                    format!("model.layers.{layer}.{norm}.weight"),
                    Dtype::F16,
                    &[hidden],
                );
            }
            for projection in Projection::ALL {
                let module = projection.module(layer);
                let (n_in, n_out) = projection.shape(config);
                match self.module(&module) {
                    Some(settings) => {
                        let (b, groups) = (settings.bits.get(), settings.group_size.groups(n_in));
                        add(
                            format!("{module}.qweight"),
                            Dtype::I32,
                            &[n_in * b / 32, n_out],
                        );
                        add(
                            format!("{module}.qzeros"),
                            Dtype::I32,
                            &[groups, n_out * b / 32],
                        );
                        add(format!("{module}.scales"), Dtype::F16, &[groups, n_out]);
                        add(format!("{module}.g_idx"), Dtype::I32, &[n_in]);
                    }
                    None => add(format!("{module}.weight"), Dtype::F16, &[n_out, n_in]),
                }
                if projection.has_bias(config) {
                    add(format!("{module}.bias"), Dtype::F16, &[n_out]);
                }
            }
        }
        add("model.norm.weight".into(), Dtype::F16, &[hidden]);
        if !config.tied_embeddings {
            add(
                "lm_head.weight".into(),
                Dtype::F16,
                &[config.vocabulary, hidden],
            );
        }
        specs
    }

    /// Bytes of all tensors; the files' headers come on top.
    pub fn bytes(&self, config: &ModelConfig) -> usize {
        self.tensors(config).iter().map(TensorSpec::bytes).sum()
    }

    /// Who can load the branch.
    pub fn clients(&self, config: &ModelConfig) -> Vec<Support> {
        let linears: Vec<LinearShape> = self
            .quantised_modules(config)
            .into_iter()
            .map(|(_, (in_features, out_features), settings)| LinearShape {
                in_features,
                out_features,
                bits: settings.bits,
                group_size: settings.group_size,
            })
            .collect();
        client_support(&linears, self.sym, !self.overrides.is_empty())
    }
}

fn group_reason(group_size: GroupSize, module: &str, n_in: usize) -> String {
    let valid: Vec<String> = [32, 64, 128, 256, 512, 1024]
        .into_iter()
        .filter(|g| n_in.is_multiple_of(*g))
        .map(|g| g.to_string())
        .collect();
    format!(
        "group_size = {group_size} does not divide the {n_in} inputs of {module}; valid are -1, {}",
        valid.join(", ")
    )
}

/// Every linear of the model, in order.
fn modules(config: &ModelConfig) -> impl Iterator<Item = (String, Projection)> {
    (0..config.layers)
        .flat_map(|layer| Projection::ALL.map(|projection| (projection.module(layer), projection)))
}

/// Whether a glob (`*` stands for any run of characters) matches a whole module name.
fn matches(pattern: &str, module: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = module.strip_prefix(first) else {
        return false;
    };
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return rest.is_empty();
    }
    while let Some(part) = parts.next() {
        if parts.peek().is_none() {
            return rest.ends_with(part);
        }
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    true
}

/// The same glob as a regular expression that matches from a name's start to its end.
fn expression(pattern: &str) -> String {
    format!("{}$", pattern.replace('.', "\\.").replace('*', ".*"))
}

fn check_name(name: &str) -> Result<(), String> {
    let valid = "use letters, digits, '.', '_' and '-', starting with a letter or digit, without \
                 \"..\" and not ending in '.', .lock, .partial or .old";
    let fits = name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        && !name.contains("..")
        && ![".", ".lock", ".partial", ".old"]
            .iter()
            .any(|end| name.ends_with(end));
    match fits {
        true => Ok(()),
        false => Err(format!(
            "branch name {name:?} is not safe as a directory and revision; {valid}"
        )),
    }
}

#[cfg(test)]
mod tests;
