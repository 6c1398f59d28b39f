//! The recipe of a model and some options: `gptq init` writes its text, and `gptq quantize MODEL` runs it.
//!
//! Values that the options leave open are taken from the model: group sizes that divide its inputs, windows within its
//! context, its own dtype. The text explains them, and states the memory of a run.

use std::path::{Path, PathBuf};

use gptq_calibration::{OnError, Source};
use gptq_format::{Bits, FormatName, GroupSize, Half, read_json};
use gptq_spec::ModelConfig;
use serde_json::Value;

use crate::branch_plan::linears;
use crate::branch_resolution::DEFAULT_GROUPS;
use crate::inputs::is_local;
use crate::{Memory, Plan, PlanError, Preset, Recipe, RecipeError, RenderingOverride};

/// Calibration text of recipes that name none.
const WIKIDOC: &str = "medalpaca/medical_meadow_wikidoc";

/// Tokens per window, if the model's context has as many.
const SEQ_LEN: usize = 2048;

/// Tokens per window of published branches, whatever the model's context.
const PUBLISHED_SEQ_LEN: usize = 4096;

/// Settings of the published branches in their order; the first is `main`.
const PUBLISHED: [(Bits, GroupSize); 6] = [
    (Bits::Four, GroupSize::Columns(128)),
    (Bits::Four, GroupSize::Columns(32)),
    (Bits::Eight, GroupSize::Row),
    (Bits::Eight, GroupSize::Columns(128)),
    (Bits::Eight, GroupSize::Columns(32)),
    (Bits::Four, GroupSize::Columns(64)),
];

/// Options of a recipe; what is `None` or empty follows from the model.
#[derive(Clone, Debug, Default)]
pub struct RecipeDraft {
    /// Directory of the model, or `owner/name` on the Hub.
    pub model: String,
    /// Branch, tag or commit of a Hub model.
    pub revision: Option<String>,
    /// 16-bit dtype of weights and of tensors that stay unquantized.
    pub dtype: Option<Half>,
    /// Calibration text: a file, a glob, or a dataset on the Hub.
    pub calibration: Option<String>,
    /// Conversion of its rows to documents.
    pub rendering: Option<RenderingOverride>,
    /// Range of rows.
    pub rows: Option<String>,
    /// Action for a row that its chat template refuses.
    pub on_error: Option<OnError>,
    /// Date seen by chat templates.
    pub date: Option<String>,
    /// Number of windows.
    pub samples: Option<usize>,
    /// Tokens per window.
    pub seq_len: Option<usize>,
    /// Seed of the draw.
    pub seed: Option<u64>,
    /// Output directory.
    pub output: Option<PathBuf>,
    /// Text for measuring the perplexity of each finished branch.
    pub evaluation: Option<PathBuf>,
    /// Settings of the branches.
    pub branches: DraftedBranches,
}

/// Branches of a [`RecipeDraft`].
#[derive(Clone, Debug)]
pub enum DraftedBranches {
    /// The six published ones: 4 and 8 bits, act order, several group sizes.
    Published,
    /// One for each width and group size.
    Each {
        /// Code widths; 4 bits if empty.
        bits: Vec<Bits>,
        /// Group sizes; if empty, the largest usual one that fits.
        group_sizes: Vec<GroupSize>,
        /// Act order with scattered groups, or stored order.
        desc_act: Option<bool>,
        /// Method of finding codes and scales.
        preset: Option<Preset>,
        /// Layout of the files.
        format: Option<FormatName>,
    },
}

impl Default for DraftedBranches {
    fn default() -> Self {
        DraftedBranches::Each {
            bits: Vec::new(),
            group_sizes: Vec::new(),
            desc_act: None,
            preset: None,
            format: None,
        }
    }
}

/// A group size with its reason, if it is not the usual one.
type FittingGroup = (GroupSize, Option<String>);

impl RecipeDraft {
    /// Makes the recipe for the model whose `config.json` is at `config`.
    ///
    /// # Errors
    /// A config that cannot be read, calibration text whose columns are not recognized, or options that do not fit the
    /// model.
    pub fn recipe(&self, config: &Path) -> Result<Recipe, PlanError> {
        let shapes = ModelConfig::read(config)?;
        let body = self.body(&shapes, trained_dtype(&read_json(config)?))?;
        let checked = parse(body.clone())?;
        let plan = Plan::for_config(&checked, shapes).map_err(unplaced)?;
        Ok(parse(self.heading(&plan) + &body)?)
    }

    /// States in comments what the recipe makes, and the memory that takes.
    fn heading(&self, plan: &Plan) -> String {
        let memory = Memory::of(plan);
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
        let branches = match plan.branches.len() {
            1 => "one branch".to_owned(),
            n => format!("{n} branches"),
        };
        format!(
            "# Recipe for {}, {:.1} million parameters in {} blocks: {branches}.\n\
             # `gptq plan FILE` shows sizes and readers, `gptq quantize FILE` makes the branches; configs/README.md explains\n\
             # every key. Paths are relative to the working directory of gptq.\n\
             #\n\
             # Peak memory: {} on the GPU and {} on the host with CUDA, {} on the host without. Of that {} are hidden\n\
             # states, which --device-memory and --host-memory limit: those beyond them go to the host and to disk.\n\n",
            plan.model_name,
            plan.config.parameters() as f64 / 1e6,
            plan.config.layers,
            gib(memory.device),
            gib(memory.host),
            gib(memory.cpu),
            gib(memory.states),
        )
    }

    fn body(&self, config: &ModelConfig, trained: Option<Half>) -> Result<String, PlanError> {
        let parts = [
            self.model_table(config, trained),
            self.calibration_table(config)?,
            self.output_tables(),
            self.branch_tables(config),
        ];
        Ok(parts.join("\n"))
    }

    fn model_table(&self, config: &ModelConfig, trained: Option<Half>) -> String {
        let mut text = format!("[model]\nsource = {}\n", quoted(&self.model));
        if let Some(revision) = &self.revision {
            text += &format!("revision = {}\n", quoted(revision));
        }
        let published = matches!(self.branches, DraftedBranches::Published);
        let (half, why) = match (self.dtype, trained) {
            (Some(half), _) => (half, "chosen".to_owned()),
            (None, _) if config.wide => {
                let why = "hidden states of this family exceed f16".to_owned();
                (Half::Bf16, why)
            }
            (None, Some(Half::Bf16)) if !published => {
                let why =
                    "the model's own; \"f16\" for readers that compute in it, as ExLlama does";
                (Half::Bf16, why.to_owned())
            }
            _ => (Half::F16, "what every reader takes".to_owned()),
        };
        let name = match half {
            Half::F16 => "f16",
            Half::Bf16 => "bf16",
        };
        text + &format!("# Tensors that stay unquantized: {why}.\ndtype = \"{name}\"\n")
    }

    fn calibration_table(&self, config: &ModelConfig) -> Result<String, PlanError> {
        let published = matches!(self.branches, DraftedBranches::Published);
        let mut text = String::from("[calibration]\n");
        if self.calibration.is_none() {
            text += "# Medical questions and answers. Better: text like that which the model will see.\n";
        }
        let source = self.calibration.as_deref().unwrap_or(WIKIDOC);
        text += &format!("source = {}\n", quoted(source));
        text += &self.rendering_line(source)?;
        if let Some(rows) = &self.rows {
            text += &format!("rows = {}\n", quoted(rows));
        }
        if self.on_error == Some(OnError::Skip) {
            text += "on_error = \"skip\"\n";
        }
        if let Some(date) = &self.date {
            text += &format!("date = {}\n", quoted(date));
        }
        text += &format!("samples = {}\n", self.samples.unwrap_or(128));
        let fitting = match published {
            true => PUBLISHED_SEQ_LEN,
            false => config.max_positions.clamp(2, SEQ_LEN),
        };
        text += &format!(
            "# Tokens per window; the model's context is {}.\nseq_len = {}\n",
            config.max_positions,
            self.seq_len.unwrap_or(fitting)
        );
        if let Some(seed) = self.seed {
            text += &format!("seed = {seed}\n");
        }
        Ok(text)
    }

    /// The key that says how a row becomes text: as asked for, or by the usual names of columns in a local file.
    fn rendering_line(&self, source: &str) -> Result<String, PlanError> {
        let line = |key: &str, value: &str| Ok(format!("{key} = {}\n", quoted(value)));
        match &self.rendering {
            Some(RenderingOverride::Template(value)) => return line("template", value),
            Some(RenderingOverride::Column(value)) => return line("column", value),
            Some(RenderingOverride::Messages(value)) => return line("messages", value),
            Some(RenderingOverride::Tokens(value)) => return line("tokens", value),
            None => {}
        }
        if !is_local(source) {
            let own = "# Text of a row, from its columns; or column, messages or tokens with the name of one.\n";
            return Ok(own.to_owned() + &line("template", "{input}\n{output}")?);
        }
        let columns = Source::Local(source.into()).columns()?;
        let has = |name: &str| columns.iter().any(|column| column == name);
        if has("messages") {
            return line("messages", "messages");
        }
        if has("text") {
            return line("column", "text");
        }
        if has("input") && has("output") {
            return line("template", "{input}\n{output}");
        }
        if has("input_ids") {
            return line("tokens", "input_ids");
        }
        let reason = format!(
            "{source}: has no column text, messages, input and output, or input_ids; its columns are {}; choose with \
             --column, --messages, --template or --tokens",
            columns.join(", ")
        );
        Err(RecipeError::Draft { reason }.into())
    }

    fn output_tables(&self) -> String {
        let dir = match &self.output {
            Some(dir) => dir.to_string_lossy().into_owned(),
            None => format!("out/{}-GPTQ", last_name(&self.model)),
        };
        let mut text = format!("[output]\ndir = {}\n", quoted(&dir));
        if let Some(path) = &self.evaluation {
            let path = quoted(&path.to_string_lossy());
            text += &format!(
                "\n# Held-out text: perplexity of the branches and of the model.\n[evaluation]\ntext = {path}\n"
            );
        }
        text
    }

    fn branch_tables(&self, config: &ModelConfig) -> String {
        match &self.branches {
            DraftedBranches::Published => {
                let settings = PUBLISHED.map(|(bits, size)| (bits, within(config, size)));
                "# As the published branches of this kind: act order, groups scattered over the columns. Neither key, and\n\
                 # vLLM loads them too.\n\
                 [defaults]\ndesc_act = true\nsym = true\ndamp_percent = 0.1\ntrue_sequential = true\n"
                    .to_owned()
                    + &tables(&settings, true)
            }
            DraftedBranches::Each {
                bits,
                group_sizes,
                desc_act,
                preset,
                format,
            } => {
                let preset = preset.unwrap_or_default().name();
                let mut text = format!(
                    "[defaults]\n# \"standard\" takes less time, \"tuned\" more, for more accuracy.\npreset = \"{preset}\"\n"
                );
                if let Some(format) = format {
                    text += &format!("format = \"{}\"\n", format.name());
                }
                match desc_act {
                    Some(true) => text += "# Not for vLLM and AutoRound.\ndesc_act = true\n",
                    Some(false) => text += "desc_act = false\n",
                    None => {}
                }
                let bits = if bits.is_empty() {
                    &[Bits::Four][..]
                } else {
                    bits
                };
                let usual = [within(config, GroupSize::Columns(DEFAULT_GROUPS[0]))];
                let asked = group_sizes.iter().map(|size| (*size, None));
                let asked: Vec<FittingGroup> = asked.collect();
                let groups = if asked.is_empty() { &usual[..] } else { &asked };
                let settings = bits
                    .iter()
                    .flat_map(|bits| groups.iter().map(|group| (*bits, group.clone())));
                let settings: Vec<(Bits, FittingGroup)> = settings.collect();
                text + &tables(&settings, *desc_act == Some(true))
            }
        }
    }
}

/// Returns the last part of a model's name: its directory's, or that on the Hub.
pub fn last_name(model: &str) -> String {
    let path = Path::new(model);
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = whole.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Writes a table for each setting that differs from those before it.
fn tables(settings: &[(Bits, FittingGroup)], act_order: bool) -> String {
    let mut written: Vec<(Bits, GroupSize)> = Vec::new();
    let mut text = String::new();
    for (bits, (size, why)) in settings {
        if written.contains(&(*bits, *size)) {
            continue;
        }
        let name = match (written.is_empty(), act_order) {
            (true, _) => "main".to_owned(),
            (false, true) => format!("gptq-{bits}bit-{size}g-actorder_True"),
            (false, false) => format!("gptq-{bits}bit-{size}g"),
        };
        written.push((*bits, *size));
        text += &format!("\n[[branch]]\nname = \"{name}\"\nbits = {bits}\n");
        if let Some(why) = why {
            text += &format!("# {why}.\n");
        }
        text += &format!("group_size = {size}\n");
    }
    text
}

/// Returns `wanted` or, if it does not divide the inputs of every linear layer, the largest smaller default that does, with
/// the reason; the smallest if none does, which the plan then refuses.
fn within(config: &ModelConfig, wanted: GroupSize) -> FittingGroup {
    let GroupSize::Columns(wanted) = wanted else {
        return (wanted, None);
    };
    let odd = |size: usize| {
        let mut all = linears(config);
        all.find(|(_, _, linear)| !linear.in_features.is_multiple_of(size))
    };
    let Some((layer, _, linear)) = odd(wanted) else {
        return (GroupSize::Columns(wanted), None);
    };
    let smaller = DEFAULT_GROUPS.into_iter().filter(|size| *size < wanted);
    let smaller: Vec<usize> = smaller.collect();
    let found = smaller.iter().find(|size| odd(**size).is_none());
    let why = format!(
        "{wanted} does not divide the {} inputs of {}",
        linear.in_features,
        linear.module(layer)
    );
    let size = found.or(smaller.last()).copied().unwrap_or(wanted);
    (GroupSize::Columns(size), Some(why))
}

/// Returns the 16-bit dtype that a config names, at its top or in the part of its language model.
fn trained_dtype(config: &Value) -> Option<Half> {
    let parts = [config, &config["text_config"]];
    let mut names = parts
        .into_iter()
        .flat_map(|part| [&part["dtype"], &part["torch_dtype"]]);
    let name = names.find_map(Value::as_str)?;
    [Half::F16, Half::Bf16]
        .into_iter()
        .find(|half| half.torch_name() == name)
}

fn parse(text: String) -> Result<Recipe, RecipeError> {
    Recipe::parse(Path::new("recipe of the options"), text)
}

/// Leaves out a place in a text that the user has not seen.
fn unplaced(error: RecipeError) -> RecipeError {
    match error {
        RecipeError::Invalid { reason, .. } => RecipeError::Draft { reason },
        other => other,
    }
}

/// Quotes a text on one line: what JSON escapes means the same in TOML, which escapes DEL as well.
fn quoted(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests;
