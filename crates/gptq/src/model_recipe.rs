//! Recipes by path or by model: a file as it is, or one made from a model and flags, as `gptq init` writes it.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};
use gptq_format::{Bits, FormatName, GroupSize, Half};
use gptq_plan::{
    DraftedBranches, InputSource, Preset, Recipe, RecipeDraft, RecipeError, RecipeOverrides,
    find_model,
};
use serde::de::DeserializeOwned;
use serde::de::IntoDeserializer;
use serde::de::value::Error as WordError;

use crate::cli::{ChangeArgs, InputArgs};
use crate::hub;

/// Flags that describe the branches of a model; a recipe has keys for them.
#[derive(Args, Default)]
#[group(id = "drafts", multiple = true)]
pub(crate) struct DraftArgs {
    /// For a model: bits per weight, 2, 3, 4 or 8; several, as in 4,8, make several branches [default: 4]
    #[arg(short, long, value_name = "N", value_delimiter = ',')]
    bits: Vec<Bits>,
    /// For a model: columns that share a scale, or -1 for whole rows; several make several branches [default: the largest of
    /// 128, 64 and 32 that fits]
    #[arg(
        short,
        long,
        value_name = "N",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    group_size: Vec<GroupSize>,
    /// For a model: autogptq, standard, best or tuned, from fast to accurate [default: best]
    #[arg(long, value_name = "NAME", value_parser = word::<Preset>)]
    preset: Option<Preset>,
    /// For a model: gptq, compressed-tensors, mlx or gguf [default: gptq]
    #[arg(long, value_name = "NAME", value_parser = word::<FormatName>)]
    format: Option<FormatName>,
    /// For a model: true for act order with scattered groups, which not every reader loads; false for none [default: act order
    /// with groups in place]
    #[arg(long, value_name = "true|false")]
    desc_act: Option<bool>,
    /// For a model: the matrix of branches with this name, instead of the flags above
    #[arg(long, value_name = "NAME", conflicts_with_all = ["bits", "group_size", "preset", "format", "desc_act"])]
    matrix: Option<Matrix>,
    /// For a model: f16 or bf16 [default: the model's own]
    #[arg(long, value_name = "NAME", value_parser = word::<Half>)]
    dtype: Option<Half>,
    /// For a model on the Hub: its branch, tag or commit [default: main]
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
}

/// A matrix of branches with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Matrix {
    /// Six branches of 4 and 8 bits with act order, as they are published
    Published,
}

/// A recipe, and whether it was made from flags.
pub(crate) struct FoundRecipe {
    pub(crate) recipe: Recipe,
    /// True if no file has it.
    pub(crate) drafted: bool,
}

/// Reads the recipe at `path`, or makes one of the model there, and applies the flags. With `config`, a model's config is
/// that file.
///
/// # Errors
/// A path that is neither; flags that the other kind takes.
pub(crate) fn find_recipe(
    path: &Path,
    draft: DraftArgs,
    changes: ChangeArgs,
    evaluation: Option<PathBuf>,
    config: Option<&Path>,
) -> Result<FoundRecipe> {
    let name = path.to_string_lossy();
    let is_toml = path.extension().is_some_and(|end| end == "toml");
    if path.is_dir() || (!path.exists() && !is_toml) {
        ensure!(
            changes.inputs.calibration.is_some(),
            "{name} is a model, not a recipe, and no calibration text is named: add --calibration with a file, a glob or \
             owner/name on the Hub, or write a recipe with gptq init"
        );
        let mut recipe = draft_recipe(&name, draft, changes.inputs, evaluation, config)?;
        recipe.apply(RecipeOverrides {
            branches: changes.branch,
            ..RecipeOverrides::default()
        })?;
        return Ok(FoundRecipe {
            recipe,
            drafted: true,
        });
    }
    if let Some(flag) = draft.given() {
        bail!("{name} is a recipe, which has a key for {flag}; change it there, or name a model");
    }
    let recipe = Recipe::read(path).map_err(|error| match error {
        RecipeError::Unreadable { .. } | RecipeError::Invalid { .. } if !is_toml => {
            anyhow::anyhow!(
                "{name} is neither a recipe (TOML), nor a model: its directory, or owner/name on the Hub"
            )
        }
        error => error.into(),
    })?;
    let recipe = changes.apply(recipe, evaluation)?;
    Ok(FoundRecipe {
        recipe,
        drafted: false,
    })
}

/// Makes a recipe of the model in the directory `model` or on the Hub, from the flags.
///
/// # Errors
/// No such model, or flags that do not fit it.
pub(crate) fn draft_recipe(
    model: &str,
    draft: DraftArgs,
    inputs: InputArgs,
    evaluation: Option<PathBuf>,
    config: Option<&Path>,
) -> Result<Recipe> {
    let dir = match find_model(model, draft.revision.as_deref()) {
        Some(InputSource::Local(_)) if draft.revision.is_some() => {
            bail!("--revision is of a model on the Hub; {model} is a directory")
        }
        Some(InputSource::Local(dir)) => dir,
        Some(InputSource::Hub { .. }) if config.is_some() => PathBuf::new(),
        Some(InputSource::Hub { repo, revision }) => hub::model_shapes(&repo, &revision)?,
        None => bail!(
            "{model} is neither a recipe (TOML), nor a model: its directory, or owner/name on the Hub"
        ),
    };
    let draft = RecipeDraft {
        model: model.trim_end_matches('/').to_owned(),
        revision: draft.revision,
        dtype: draft.dtype,
        rendering: inputs.rows.rendering(),
        calibration: inputs.calibration,
        rows: inputs.rows.rows,
        on_error: inputs.rows.on_error,
        date: inputs.rows.date,
        samples: inputs.samples,
        seq_len: inputs.seq_len,
        seed: inputs.seed,
        output: inputs.output,
        evaluation,
        branches: match draft.matrix {
            Some(Matrix::Published) => DraftedBranches::Published,
            None => DraftedBranches::Each {
                bits: draft.bits,
                group_sizes: draft.group_size,
                desc_act: draft.desc_act,
                preset: draft.preset,
                format: draft.format,
            },
        },
    };
    let own = dir.join("config.json");
    Ok(draft.recipe(config.unwrap_or(&own))?)
}

impl DraftArgs {
    /// Returns the first of the flags that is given.
    fn given(&self) -> Option<&'static str> {
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
    let word: serde::de::value::StrDeserializer<'_, WordError> = text.into_deserializer();
    T::deserialize(word).map_err(|error| error.to_string())
}
