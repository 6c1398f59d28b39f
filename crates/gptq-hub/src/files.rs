//! Which files of a repository are needed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use gptq_format::{SIDE_FILES, read_json};
use serde::Deserialize;

use crate::HubError;

/// Weights in the order of preference: an index beside shards, or one file.
const WEIGHTS: [(&str, &str); 2] = [
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
];

/// Which files of a dataset hold its rows.
#[derive(Clone, Copy)]
pub struct DataFiles<'a> {
    /// Whether rows can be read from a file of this name.
    pub readable: &'a dyn Fn(&str) -> bool,
    /// The recipe's own choice.
    pub pattern: Option<&'a str>,
}

/// Config and tokenizer, and the index of the weights if there is one: what is fetched first.
pub(crate) fn model_side(names: &[&str]) -> Vec<String> {
    let wanted = ["config.json"].into_iter().chain(SIDE_FILES);
    let index = weights(names).and_then(|(index, _)| index);
    wanted
        .filter(|name| names.contains(name))
        .chain(index)
        .map(str::to_owned)
        .collect()
}

/// The weight files: what the index in `snapshot` names, or the one file.
pub(crate) fn model_weights(
    repo: &str,
    names: &[&str],
    snapshot: &Path,
) -> Result<Vec<String>, HubError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let (index, file) = weights(names).ok_or_else(|| HubError::NoWeights {
        repo: repo.to_owned(),
    })?;
    let Some(index) = index else {
        return Ok(vec![file.to_owned()]);
    };
    let read: Index = read_json(&snapshot.join(index))?;
    let shards: BTreeSet<String> = read.weight_map.into_values().collect();
    match shards.iter().find(|shard| !names.contains(&shard.as_str())) {
        Some(shard) => Err(HubError::Missing {
            repo: repo.to_owned(),
            file: shard.clone(),
        }),
        None => Ok(shards.into_iter().collect()),
    }
}

fn weights<'a>(names: &[&str]) -> Option<(Option<&'a str>, &'a str)> {
    WEIGHTS.into_iter().find_map(|(index, file)| {
        let has = |name| names.contains(&name);
        match has(index) {
            true => Some((Some(index), file)),
            false => has(file).then_some((None, file)),
        }
    })
}

/// The files that hold a dataset's rows: those the pattern matches, or those of its training part
/// (all, if no name tells parts apart). `None` if there is none; errors when they are of several
/// kinds, because then some say the same twice.
pub(crate) fn data(
    repo: &str,
    names: &[&str],
    wanted: DataFiles<'_>,
) -> Result<Option<Vec<String>>, HubError> {
    let readable = names.iter().copied().filter(|name| {
        let file = name.rsplit('/').next().unwrap_or(name);
        let describes = ["dataset_infos.json", "dataset_dict.json", "state.json"].contains(&file);
        (wanted.readable)(name) && !describes && !name.split('/').any(|part| part.starts_with('.'))
    });
    let mut files: Vec<&str> = match wanted.pattern {
        Some(pattern) => {
            let pattern = glob::Pattern::new(pattern).map_err(|e| HubError::Pattern {
                pattern: pattern.to_owned(),
                reason: e.msg.to_owned(),
            })?;
            readable.filter(|name| pattern.matches(name)).collect()
        }
        None => {
            let all: Vec<&str> = readable.collect();
            let training = all.iter().copied().filter(|name| is_training(name));
            let training: Vec<&str> = training.collect();
            match training.is_empty() {
                true => all,
                false => training,
            }
        }
    };
    files.sort_unstable();
    let kinds: BTreeSet<&str> = files.iter().map(|name| ending(name)).collect();
    if wanted.pattern.is_none() && kinds.len() > 1 {
        return Err(HubError::SeveralKinds {
            repo: repo.to_owned(),
            kinds: kinds.into_iter().map(str::to_owned).collect(),
        });
    }
    let files: Vec<String> = files.into_iter().map(str::to_owned).collect();
    Ok((!files.is_empty()).then_some(files))
}

/// A path with the word "train" in it.
fn is_training(name: &str) -> bool {
    name.split(|c: char| !c.is_ascii_alphanumeric())
        .any(|word| word == "train")
}

fn ending(name: &str) -> &str {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.split_once('.').map_or("", |(_, ending)| ending)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(names: &[&str], pattern: Option<&str>) -> Result<Option<Vec<String>>, HubError> {
        let readable = |name: &str| name.ends_with(".json") || name.ends_with(".parquet");
        data(
            "a/b",
            names,
            DataFiles {
                readable: &readable,
                pattern,
            },
        )
    }

    #[test]
    fn safetensors_are_preferred_and_only_what_the_index_names_is_fetched() {
        let names = [
            "config.json",
            "README.md",
            "consolidated.safetensors",
            "model-1.safetensors",
            "model.safetensors.index.json",
            "old-model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        let side = model_side(&names);
        assert_eq!(
            side,
            [
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "model.safetensors.index.json"
            ]
        );
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("model.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map": {"a": "model-1.safetensors"}}"#).unwrap();
        let weights = model_weights("a/b", &names, dir.path()).unwrap();
        assert_eq!(weights, ["model-1.safetensors"]);
        std::fs::write(&index, r#"{"weight_map": {"a": "../../etc/passwd"}}"#).unwrap();
        let refused = model_weights("a/b", &names, dir.path()).unwrap_err();
        assert!(
            refused.to_string().contains("../../etc/passwd"),
            "{refused}"
        );
        let torch = model_weights("a/b", &["pytorch_model.bin"], dir.path()).unwrap();
        assert_eq!(torch, ["pytorch_model.bin"]);
        assert!(matches!(
            model_weights("a/b", &["tf_model.h5"], dir.path()),
            Err(HubError::NoWeights { .. })
        ));
    }

    #[test]
    fn the_training_part_of_a_dataset_is_taken() {
        let parts = [
            "README.md",
            "data/test-0.parquet",
            "data/train-0.parquet",
            "data/train-1.parquet",
        ];
        let files = rows(&parts, None).unwrap().unwrap();
        assert_eq!(files, ["data/train-0.parquet", "data/train-1.parquet"]);
        let files = rows(&parts, Some("data/test-*")).unwrap().unwrap();
        assert_eq!(files, ["data/test-0.parquet"]);
        let one = rows(&["a_wikidoc.json", "dataset_infos.json"], None);
        assert_eq!(one.unwrap().unwrap(), ["a_wikidoc.json"]);
        assert_eq!(rows(&["script.py"], None).unwrap(), None);
        let two = rows(&["a.json", "a.parquet"], None).unwrap_err();
        assert!(two.to_string().contains("files ="), "{two}");
    }
}
