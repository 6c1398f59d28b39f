//! Flags of recipes: those that change one, and those that describe the branches of a model without one.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use gptq_calibration::OnError;
use gptq_format::{Bits, FormatName, GroupSize, Half};
use gptq_plan::{Preset, Recipe, RecipeOverrides, RenderingOverride};
use serde::de::value::{Error as WordError, StrDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer};

/// Flags that change a recipe.
#[derive(Args)]
#[group(id = "changes", multiple = true)]
pub(crate) struct ChangeArgs {
    /// Quantize only this branch; may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) branch: Vec<String>,
    #[command(flatten)]
    pub(crate) inputs: InputArgs,
}

/// Calibration data and the output directory.
#[derive(Args)]
#[group(id = "inputs", multiple = true)]
pub(crate) struct InputArgs {
    /// Calibrate on this: a file, a glob, or a dataset on the Hub
    #[arg(short, long, value_name = "SOURCE")]
    pub(crate) calibration: Option<String>,
    #[command(flatten)]
    pub(crate) rows: RowArgs,
    /// Write branches below this directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Number of calibration windows
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) samples: Option<usize>,
    /// Tokens per calibration window
    #[arg(long, value_name = "N")]
    pub(crate) seq_len: Option<usize>,
    /// Seed of the calibration draw
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
}

/// Selection and interpretation of calibration rows.
#[derive(Args)]
#[group(id = "reading", multiple = true)]
pub(crate) struct RowArgs {
    /// Make each row's text from its columns, as in "{question}\n{answer}"
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["column", "messages", "tokens"])]
    template: Option<String>,
    /// Use the text in this column
    #[arg(long, value_name = "NAME", conflicts_with_all = ["messages", "tokens"])]
    column: Option<String>,
    /// Use the conversation in this column
    #[arg(long, value_name = "NAME", conflicts_with = "tokens")]
    messages: Option<String>,
    /// Use the token ids in this column
    #[arg(long, value_name = "NAME")]
    tokens: Option<String>,
    /// Use only these rows, such as 0:1000
    #[arg(long, value_name = "RANGE")]
    pub(crate) rows: Option<String>,
    /// Action on a row that the chat template refuses: stop the run, or skip the row
    #[arg(long, value_name = "stop|skip")]
    pub(crate) on_error: Option<OnError>,
    /// Date seen by chat templates, such as 2026-11-30 [default: now]
    #[arg(long, value_name = "DATE")]
    pub(crate) date: Option<String>,
}

impl RowArgs {
    /// Returns the rendering that the flags select, if any.
    pub(crate) fn rendering(&self) -> Option<RenderingOverride> {
        let template = self.template.clone().map(RenderingOverride::Template);
        let column = self.column.clone().map(RenderingOverride::Column);
        let messages = self.messages.clone().map(RenderingOverride::Messages);
        let tokens = self.tokens.clone().map(RenderingOverride::Tokens);
        template.or(column).or(messages).or(tokens)
    }
}

impl ChangeArgs {
    /// Applies the flags to a recipe.
    pub(crate) fn apply(
        self,
        mut recipe: Recipe,
        perplexity: Option<PathBuf>,
    ) -> anyhow::Result<Recipe> {
        let InputArgs {
            calibration,
            rows,
            output,
            samples,
            seq_len,
            seed,
        } = self.inputs;
        recipe.apply(RecipeOverrides {
            branches: self.branch,
            model: None,
            calibration,
            rendering: rows.rendering(),
            rows: rows.rows,
            on_error: rows.on_error,
            date: rows.date,
            output,
            samples,
            seq_len,
            seed,
            evaluation: perplexity,
            orders: Default::default(),
        })?;
        Ok(recipe)
    }
}

/// Heading of flags that a recipe has keys for.
const MODEL: &str = "Of a model without a recipe";

/// Flags that describe the branches of a model; a recipe has keys for them.
#[derive(Args, Default)]
#[group(id = "drafts", multiple = true)]
pub(crate) struct DraftArgs {
    /// Bits per weight, 2, 3, 4 or 8; several, as in 4,8, make several branches [default: 4]
    #[arg(help_heading = MODEL, short, long, value_name = "N", value_delimiter = ',')]
    pub(crate) bits: Vec<Bits>,
    /// Columns that share a scale, or -1 for whole rows; several make several branches [default: the largest of
    /// 128, 64 and 32 that fits]
    #[arg(
        help_heading = MODEL,
        short,
        long,
        value_name = "N",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    pub(crate) group_size: Vec<GroupSize>,
    /// autogptq, standard, best or tuned, from fast to accurate [default: best]
    #[arg(help_heading = MODEL, long, value_name = "NAME", value_parser = word::<Preset>)]
    pub(crate) preset: Option<Preset>,
    /// gptq, compressed-tensors, mlx or gguf [default: gptq]
    #[arg(help_heading = MODEL, long, value_name = "NAME", value_parser = word::<FormatName>)]
    pub(crate) format: Option<FormatName>,
    /// true for act order with scattered groups, which not every reader loads; false for none [default: act order
    /// with groups in place]
    #[arg(help_heading = MODEL, long, value_name = "true|false")]
    pub(crate) desc_act: Option<bool>,
    /// The matrix of branches with this name, instead of the flags above
    #[arg(help_heading = MODEL, long, value_name = "NAME", conflicts_with_all = ["bits", "group_size", "preset", "format", "desc_act"])]
    pub(crate) matrix: Option<NamedMatrix>,
    /// f16 or bf16 [default: the model's own]
    #[arg(help_heading = MODEL, long, value_name = "NAME", value_parser = word::<Half>)]
    pub(crate) dtype: Option<Half>,
    /// Branch, tag or commit of a model on the Hub [default: main]
    #[arg(help_heading = MODEL, long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
}

/// A matrix of branches with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum NamedMatrix {
    /// Six branches of 4 and 8 bits with act order, as they are published
    Published,
}

impl DraftArgs {
    /// Returns the first of the flags that is given.
    pub(crate) fn given(&self) -> Option<&'static str> {
        let flags = [
            (!self.bits.is_empty(), "--bits"),
            (!self.group_size.is_empty(), "--group-size"),
            (self.preset.is_some(), "--preset"),
            (self.format.is_some(), "--format"),
            (self.desc_act.is_some(), "--desc-act"),
            (self.matrix.is_some(), "--matrix"),
            (self.dtype.is_some(), "--dtype"),
            (self.revision.is_some(), "--revision"),
        ];
        let given = flags.into_iter().find(|(is_given, _)| *is_given);
        given.map(|(_, flag)| flag)
    }
}

/// Parses a word that recipes have too.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let word: StrDeserializer<'_, WordError> = text.into_deserializer();
    T::deserialize(word).map_err(|error| error.to_string())
}
