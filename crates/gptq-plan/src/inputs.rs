//! Sources of a recipe's inputs, and their local copies.
//!
//! A model source that is an existing directory is that directory; any other of the form
//! `owner/name` is a model on the Hub. A calibration source that exists locally, is a glob, or is
//! named like a file of rows is local; any other of the form `owner/name` is a dataset on the Hub.

use std::path::{Path, PathBuf};

use gptq_calibration::{CalibrationSettings, Rendering, RowRange, Source, Template, is_date};
use toml::Spanned;

use crate::recipe_file::ChatChoice;
use crate::{Recipe, RecipeError};

/// Maximum number of calibration tokens: a million windows of 16384, far beyond any benefit.
const MAX_TOKENS: usize = 1 << 34;

/// Location of an input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InputSource {
    /// A local path.
    Local(PathBuf),
    /// A repository on the Hub.
    Hub {
        /// `owner/name`.
        repo: String,
        /// A branch, tag or commit.
        revision: String,
    },
}

/// Local copies of inputs from the Hub.
#[derive(Clone, Debug, Default)]
pub struct FetchedInputs {
    /// Directory of the model.
    pub model: Option<PathBuf>,
    /// Files of the dataset.
    pub calibration: Option<Source>,
}

/// Returns the location of the model.
pub fn model_source(recipe: &Recipe) -> Result<InputSource, RecipeError> {
    let model = &recipe.file.model;
    let source = model.source.get_ref();
    let revision = model.revision.as_ref().map(|it| it.get_ref().as_str());
    match find_model(source, revision) {
        Some(InputSource::Local(_)) => local(recipe, &model.source, &model.revision),
        Some(found) => Ok(found),
        None => Err(recipe.refuse(
            &model.source,
            format!(
                "model source {source:?} is neither a local directory nor owner/name on the Hub; \
                 download the checkpoint and name its directory"
            ),
        )),
    }
}

/// Returns the location of a model by its directory, or `owner/name` on the Hub; `None` if `source` is neither.
pub fn find_model(source: &str, revision: Option<&str>) -> Option<InputSource> {
    if Path::new(source).is_dir() {
        return Some(InputSource::Local(source.into()));
    }
    looks_like_repo(source).then(|| InputSource::Hub {
        repo: source.to_owned(),
        revision: revision.unwrap_or("main").to_owned(),
    })
}

/// Returns the location of the calibration rows.
pub fn calibration_source(recipe: &Recipe) -> Result<InputSource, RecipeError> {
    let calibration = &recipe.file.calibration;
    let source = calibration.source.get_ref();
    if !is_local(source) {
        return Ok(hub(&calibration.source, &calibration.revision));
    }
    if let Some(files) = &calibration.files {
        let reason = "files applies only to datasets on the Hub; name local files with source";
        return Err(recipe.refuse(files, reason));
    }
    local(recipe, &calibration.source, &calibration.revision)
}

/// Returns true if calibration rows of this name are local files.
pub(crate) fn is_local(source: &str) -> bool {
    Path::new(source).exists()
        || source.contains(['*', '?', '['])
        || Source::reads(source)
        || !looks_like_repo(source)
}

fn local(
    recipe: &Recipe,
    source: &Spanned<String>,
    revision: &Option<Spanned<String>>,
) -> Result<InputSource, RecipeError> {
    match revision {
        None => Ok(InputSource::Local(source.get_ref().into())),
        Some(revision) => Err(recipe.refuse(
            revision,
            "a revision does not apply to a local source; remove it",
        )),
    }
}

/// Validates the `[calibration]` part.
pub(crate) fn calibration_settings(
    recipe: &Recipe,
    fetched: &FetchedInputs,
) -> Result<CalibrationSettings, RecipeError> {
    let file = &recipe.file.calibration;
    let rows: RowRange =
        file.rows
            .get_ref()
            .parse()
            .map_err(|e: gptq_calibration::CalibrationError| {
                recipe.refuse(&file.rows, e.to_string())
            })?;
    let at_least = |value: &Spanned<usize>, least: usize, name: &str| match *value.get_ref() {
        v if v >= least && v <= 1 << 24 => Ok(v),
        v => Err(recipe.refuse(
            value,
            format!("{name} = {v} is not between {least} and 2^24"),
        )),
    };
    let samples = at_least(&file.samples, 1, "samples")?;
    let seq_len = at_least(&file.seq_len, 2, "seq_len")?;
    if samples * seq_len > MAX_TOKENS {
        let reason = format!(
            "samples = {samples} windows of seq_len = {seq_len} are over 2^34 tokens; use fewer or \
             shorter ones"
        );
        return Err(recipe.refuse(&file.samples, reason));
    }
    let date = match &file.date {
        Some(date) if !is_date(date.get_ref()) => {
            let reason = format!(
                "date = {:?} is not a date like \"2026-11-30\" or \"2026-11-30T08:15:00\"",
                date.get_ref()
            );
            return Err(recipe.refuse(date, reason));
        }
        date => date.as_ref().map(|date| date.get_ref().clone()),
    };
    let source = match (&fetched.calibration, calibration_source(recipe)?) {
        (Some(fetched), _) => fetched.clone(),
        (None, InputSource::Local(path)) => Source::Local(path),
        (None, InputSource::Hub { repo, revision }) => Source::Dataset {
            name: repo,
            revision,
            files: Vec::new(),
        },
    };
    Ok(CalibrationSettings {
        source,
        rendering: rendering(recipe)?,
        rows,
        min_tokens: file.min_tokens,
        dedupe: file.dedupe,
        on_error: file.on_error,
        date,
        samples,
        seq_len,
        seed: file.seed,
        sampling: file.sampling,
    })
}

fn rendering(recipe: &Recipe) -> Result<Rendering, RecipeError> {
    let file = &recipe.file.calibration;
    let given: Vec<(&str, &Spanned<String>)> = [
        ("template", &file.template),
        ("column", &file.column),
        ("messages", &file.messages),
        ("tokens", &file.tokens),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((key, value.as_ref()?)))
    .collect();
    if let [(first, _), (second, at), ..] = given[..] {
        let reason = format!("{first} and {second} cannot be combined; keep one");
        return Err(recipe.refuse(at, reason));
    }
    if let (Some(choice), None) = (&file.chat_template, &file.messages) {
        return Err(recipe.refuse(choice, "chat_template requires messages"));
    }
    let (key, value) = match given.first() {
        Some((key, value)) => (*key, value.get_ref().clone()),
        None => ("template", "{input}\n{output}".to_owned()),
    };
    Ok(match key {
        "column" => Rendering::Template(Template::column(&value)),
        "tokens" => Rendering::Tokens { column: value },
        "messages" => Rendering::Messages {
            column: value,
            chatml: file.chat_template.as_ref().map(|c| *c.get_ref()) == Some(ChatChoice::Chatml),
        },
        _ => Rendering::Template(Template::parse(&value).map_err(|e| match given.first() {
            Some((_, at)) => recipe.refuse(at, e.to_string()),
            None => recipe.refuse(&file.source, e.to_string()),
        })?),
    })
}

fn hub(source: &Spanned<String>, revision: &Option<Spanned<String>>) -> InputSource {
    InputSource::Hub {
        repo: source.get_ref().clone(),
        revision: match revision {
            Some(revision) => revision.get_ref().clone(),
            None => "main".to_owned(),
        },
    }
}

/// Returns true if the text has exactly one slash and does not begin like a path.
pub(crate) fn looks_like_repo(source: &str) -> bool {
    source.matches('/').count() == 1
        && !source.starts_with(['.', '/', '~'])
        && !source.ends_with('/')
}
