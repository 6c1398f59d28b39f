//! The recipe file: TOML, with every key optional that has a sensible default; unknown keys are
//! refused. Values that a plan may refuse keep their place in the file.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use gptq_format::without_directories;
use thiserror::Error;
use toml::Spanned;

use crate::RecipeOverrides;
use crate::recipe_file::RecipeFile;

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
    #[error("{reason}")]
    Draft { reason: String },
    #[error("{}:{line}:{column}: {reason}", path.display())]
    Invalid {
        path: PathBuf,
        line: usize,
        column: usize,
        reason: String,
    },
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

    /// Applies the command line. Errors if the recipe does not have a branch.
    pub fn apply(&mut self, overrides: RecipeOverrides) -> Result<(), RecipeError> {
        self.overrides = overrides.clone();
        let branches = self.file.branch.iter();
        let known: Vec<String> = branches
            .map(|branch| branch.get_ref().name.get_ref().clone())
            .collect();
        if let Some(name) = overrides.branches.iter().find(|b| !known.contains(b)) {
            return Err(RecipeError::NoSuchBranch {
                path: self.path.clone(),
                name: name.clone(),
                known,
            });
        }
        overrides.replace(&mut self.file);
        Ok(())
    }

    /// Returns the recipe's text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the glob that selects files of a Hub dataset.
    pub fn calibration_files(&self) -> Option<&str> {
        let files = self.file.calibration.files.as_ref();
        files.map(|files| files.get_ref().as_str())
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
