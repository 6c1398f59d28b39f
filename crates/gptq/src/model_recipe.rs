//! Recipes by path or by model: a file as it is, or one made from a model and flags, as `gptq init` writes it.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use gptq_plan::{
    DraftedBranches, InputSource, Recipe, RecipeDraft, RecipeError, RecipeOverrides, find_model,
};

use crate::hub;
use crate::recipe_args::{ChangeArgs, DraftArgs, InputArgs, NamedMatrix};

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
            Some(NamedMatrix::Published) => DraftedBranches::Published,
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
