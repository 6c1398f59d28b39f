//! The recipe file: TOML, with every key optional that has a sensible default; unknown keys are
//! refused. Values that a plan may refuse keep their place in the file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use gptq_calibration::{OnError, Sampling};
use gptq_format::{Bits, GroupSize, Half, without_directories};
use serde::Deserialize;
use thiserror::Error;
use toml::Spanned;

use crate::{Choice, Preset, RecipeOverrides};

/// Maximum size of a recipe in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// A recipe and its text.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub(crate) path: PathBuf,
    pub(crate) text: String,
    /// The text without local directories, for publication.
    pub(crate) public_text: String,
    pub(crate) file: RecipeFile,
    /// Changes by the command line.
    pub(crate) overrides: RecipeOverrides,
}

/// Error in a recipe, with its place and the valid values.
#[derive(Debug, Error, PartialEq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RecipeError {
    #[error("{}: cannot read the recipe: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{}: no branch {name:?}; it has: {}", path.display(), known.join(", "))]
    NoSuchBranch {
        path: PathBuf,
        name: String,
        known: Vec<String>,
    },
    #[error("{}:{line}:{column}: {reason}", path.display())]
    Invalid {
        path: PathBuf,
        line: usize,
        column: usize,
        reason: String,
    },
}

/// Reads the whole file as one document.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecipeFile {
    #[serde(default)]
    pub propagate: Propagate,
    pub model: Model,
    pub calibration: Calibration,
    pub output: Output,
    pub evaluation: Option<Evaluation>,
    #[serde(default)]
    pub numerics: Numerics,
    #[serde(default)]
    pub defaults: Settings,
    #[serde(default)]
    pub branch: Vec<Spanned<Branch>>,
}

/// Source of the hidden states that a branch is calibrated on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Propagate {
    /// Each branch's own; older recipes spell it `quantised`.
    #[default]
    #[serde(alias = "quantised")]
    Quantized,
    Dense,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Model {
    pub source: Spanned<String>,
    pub revision: Option<Spanned<String>>,
    #[serde(default)]
    pub dtype: Half,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Calibration {
    pub source: Spanned<String>,
    pub revision: Option<Spanned<String>>,
    pub files: Option<Spanned<String>>,
    pub template: Option<Spanned<String>>,
    pub column: Option<Spanned<String>>,
    pub messages: Option<Spanned<String>>,
    pub tokens: Option<Spanned<String>>,
    pub chat_template: Option<Spanned<ChatChoice>>,
    #[serde(default = "default_rows")]
    pub rows: Spanned<String>,
    #[serde(default)]
    pub min_tokens: usize,
    #[serde(default)]
    pub dedupe: bool,
    #[serde(default)]
    pub on_error: OnError,
    pub date: Option<Spanned<String>>,
    #[serde(default = "default_samples")]
    pub samples: Spanned<usize>,
    #[serde(default = "default_seq_len")]
    pub seq_len: Spanned<usize>,
    #[serde(default)]
    pub seed: u64,
    #[serde(default)]
    pub sampling: Sampling,
}

/// Template for `messages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ChatChoice {
    Tokenizer,
    Chatml,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Output {
    pub dir: Spanned<PathBuf>,
    pub shard_size: Option<Spanned<String>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Evaluation {
    pub text: Spanned<PathBuf>,
    #[serde(default = "default_window")]
    pub window: Spanned<usize>,
}

/// Handling of numbers that are out of range.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Numerics {
    #[serde(default)]
    pub overflow: OnOverflow,
    pub max_damping: Option<Spanned<f64>>,
}

/// Handling of hidden states beyond the range of their storage type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnOverflow {
    #[default]
    Stop,
    Clamp,
}

/// Settings of a branch, or of all of them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    pub bits: Option<Spanned<Bits>>,
    pub group_size: Option<Spanned<GroupSize>>,
    pub budget_bits: Option<Spanned<f64>>,
    pub budget_choices: Option<Spanned<Vec<Choice>>>,
    pub desc_act: Option<bool>,
    pub static_groups: Option<bool>,
    pub sym: Option<bool>,
    pub damp_percent: Option<Spanned<f64>>,
    pub true_sequential: Option<bool>,
    pub preset: Option<Preset>,
    pub scale_search: Option<bool>,
    pub refine: Option<Spanned<usize>>,
    pub mismatch_correction: Option<Spanned<f64>>,
    /// Its old spelling.
    pub asymmetric: Option<Spanned<f64>>,
}

/// One branch. Its settings are spelled out rather than flattened from [`Settings`]: serde cannot
/// refuse unknown keys through a flattened struct.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Branch {
    pub name: Spanned<String>,
    pub bits: Option<Spanned<Bits>>,
    pub group_size: Option<Spanned<GroupSize>>,
    pub budget_bits: Option<Spanned<f64>>,
    pub budget_choices: Option<Spanned<Vec<Choice>>>,
    pub desc_act: Option<bool>,
    pub static_groups: Option<bool>,
    pub sym: Option<bool>,
    pub damp_percent: Option<Spanned<f64>>,
    pub true_sequential: Option<bool>,
    pub preset: Option<Preset>,
    pub scale_search: Option<bool>,
    pub refine: Option<Spanned<usize>>,
    pub mismatch_correction: Option<Spanned<f64>>,
    /// Its old spelling.
    pub asymmetric: Option<Spanned<f64>>,
    #[serde(default, rename = "override")]
    pub overrides: Vec<Override>,
}

/// Settings of the modules that a pattern matches; the first match counts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Override {
    #[serde(rename = "match")]
    pub pattern: Spanned<String>,
    pub bits: Option<Spanned<Bits>>,
    pub group_size: Option<Spanned<GroupSize>>,
    #[serde(default)]
    pub skip: bool,
}

fn spanned<T>(value: T) -> Spanned<T> {
    Spanned::new(0..0, value)
}

fn default_rows() -> Spanned<String> {
    spanned("0:".into())
}

fn default_samples() -> Spanned<usize> {
    spanned(128)
}

fn default_seq_len() -> Spanned<usize> {
    spanned(2048)
}

pub(crate) fn default_window() -> Spanned<usize> {
    spanned(1024)
}

impl Recipe {
    /// Reads and parses a recipe file.
    pub fn read(path: &Path) -> Result<Self, RecipeError> {
        let unreadable = |reason: String| RecipeError::Unreadable {
            path: path.into(),
            reason,
        };
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(MAX_BYTES + 1).read_to_string(&mut text))
            .map_err(|e| unreadable(e.to_string()))?;
        match text.len() as u64 > MAX_BYTES {
            true => Err(unreadable(format!("it is over {MAX_BYTES} bytes"))),
            false => Self::parse(path, text),
        }
    }

    /// Parses recipe text; `path` is for messages.
    pub fn parse(path: &Path, text: String) -> Result<Self, RecipeError> {
        match toml::from_str(&text) {
            Ok(file) => Ok(Recipe {
                path: path.into(),
                public_text: public_text(&text, &file),
                text,
                file,
                overrides: RecipeOverrides::default(),
            }),
            Err(error) => {
                let at = error.span().map_or(0, |span| span.start);
                Err(invalid(
                    path,
                    &text,
                    at,
                    error.message().replace('\n', "; "),
                ))
            }
        }
    }

    /// A warning for each key that is spelled as it once was.
    pub(crate) fn old_spellings(&self) -> impl Iterator<Item = String> + '_ {
        let branches = self
            .file
            .branch
            .iter()
            .map(|branch| &branch.get_ref().asymmetric);
        let keys = branches.chain([&self.file.defaults.asymmetric]).flatten();
        keys.map(|key| {
            let now = "asymmetric is called mismatch_correction now; both are read";
            self.refuse(key, now).to_string()
        })
    }

    /// Makes an error at the place of a value.
    pub(crate) fn refuse<T>(&self, at: &Spanned<T>, reason: impl Into<String>) -> RecipeError {
        invalid(&self.path, &self.text, at.span().start, reason.into())
    }
}

/// Returns `text` with every absolute path reduced to its last component.
fn public_text(text: &str, file: &RecipeFile) -> String {
    let source = |source: &Spanned<String>| (source.span(), PathBuf::from(source.get_ref()));
    let path = |path: &Spanned<PathBuf>| (path.span(), path.get_ref().clone());
    let mut paths = vec![
        source(&file.model.source),
        source(&file.calibration.source),
        path(&file.output.dir),
    ];
    paths.extend(file.evaluation.as_ref().map(|it| path(&it.text)));
    paths.retain(|(_, path)| path.is_absolute());
    // Replaces from the end, so that earlier positions stay valid.
    paths.sort_by_key(|(span, _)| std::cmp::Reverse(span.start));
    let last = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let mut public = text.to_owned();
    for (span, path) in &paths {
        public.replace_range(span.clone(), &toml::Value::from(last(path)).to_string());
    }
    // Comments may contain the paths too; longest first, as one may contain another.
    paths.sort_by_key(|(_, path)| std::cmp::Reverse(path.as_os_str().len()));
    for (_, path) in &paths {
        public = public.replace(&*path.to_string_lossy(), &last(path));
    }
    comments_without_paths(public)
}

/// Returns `recipe` without the paths in its comments. A `#` may be part of a value, so a change
/// that alters the recipe's meaning is discarded.
fn comments_without_paths(mut recipe: String) -> String {
    let Ok(meaning) = recipe.parse::<toml::Table>() else {
        return recipe;
    };
    let starts = recipe.match_indices('\n').map(|(at, _)| at + 1);
    let lines: Vec<usize> = std::iter::once(0).chain(starts).collect();
    for start in lines.into_iter().rev() {
        let line = recipe[start..].lines().next().unwrap_or_default();
        let Some(at) = line.find('#') else { continue };
        let Some(short) = without_directories(&line[at..]) else {
            continue;
        };
        let mut public = recipe.clone();
        public.replace_range(start + at..start + line.len(), &short);
        if public.parse::<toml::Table>().as_ref() == Ok(&meaning) {
            recipe = public;
        }
    }
    recipe
}

fn invalid(path: &Path, text: &str, at: usize, reason: String) -> RecipeError {
    let before = &text[..at.min(text.len())];
    let line_start = before.rfind('\n').map_or(0, |n| n + 1);
    RecipeError::Invalid {
        path: path.into(),
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_text_names_no_directory_of_this_machine() {
        let text = "# from /data/me/model, by /home/me/make.sh\n[model]\nsource = \"/data/me/model\"\n\
                    [calibration]\nsource = '/data/me/rows \"1\".json' # mine\ntemplate = \"/{input} # /home/x\"\n\
                    [output]\ndir = \"out/model\"\n[evaluation]\ntext = \"/data/me/m\\u006fdel/eval.json\"\n";
        let public = Recipe::parse(Path::new("r.toml"), text.into())
            .unwrap()
            .public_text;
        let expected = "# from model, by make.sh\n[model]\nsource = \"model\"\n\
                        [calibration]\nsource = 'rows \"1\".json' # mine\ntemplate = \"/{input} # /home/x\"\n\
                        [output]\ndir = \"out/model\"\n[evaluation]\ntext = \"eval.json\"\n";
        assert_eq!(public, expected);
        let again = Recipe::parse(Path::new("r.toml"), public.clone()).unwrap();
        assert_eq!(again.public_text, public);
    }
}
