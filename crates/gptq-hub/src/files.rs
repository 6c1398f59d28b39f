//! Selection of the files that are needed from a repository.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use gptq_format::{goes_along, read_json};
use serde::Deserialize;

use crate::HubError;

/// Weights in the order of preference: an index beside shards, or one file.
const WEIGHTS: [(&str, &str); 2] = [
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
];

/// JSON files that describe a dataset and hold no rows.
const ABOUT: [&str; 4] = [
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
];

/// Name stems of descriptive texts: `LICENSE.txt`, `README-zh.txt`.
const ABOUT_TEXTS: [&str; 7] = [
    "changelog",
    "citation",
    "licence",
    "license",
    "notice",
    "readme",
    "requirements",
];

/// Maximum number of choices listed in an error.
const MOST_NAMED: usize = 4;

/// Selection of the files of a dataset that hold its rows.
#[derive(Clone, Copy)]
pub struct DataFiles<'a> {
    /// Returns true if rows can be read from a file of this name.
    pub readable: &'a dyn Fn(&str) -> bool,
    /// The `files` pattern of the recipe.
    pub pattern: Option<&'a str>,
}

/// Returns config, tokenizer and the index of the weights if there is one: the files fetched first.
pub(crate) fn model_side(names: &[&str]) -> Vec<String> {
    let side = |name: &&str| *name == "config.json" || goes_along(name);
    let side = names.iter().copied().filter(side);
    let index = weights(names).and_then(|(index, _)| index);
    side.chain(index).map(str::to_owned).collect()
}

/// Returns the weight files: those named by the index in `snapshot`, or the single file.
pub(crate) fn model_weights(
    repo: &str,
    names: &[&str],
    snapshot: &Path,
) -> Result<Vec<String>, HubError> {
    #[derive(Deserialize)]
    struct WeightIndex {
        weight_map: BTreeMap<String, String>,
    }
    let (index, file) = weights(names).ok_or_else(|| HubError::NoWeights {
        repo: repo.to_owned(),
    })?;
    let Some(index) = index else {
        return Ok(vec![file.to_owned()]);
    };
    let read: WeightIndex = read_json(&snapshot.join(index))?;
    let shards: BTreeSet<String> = read.weight_map.into_values().collect();
    let names: BTreeSet<&str> = names.iter().copied().collect();
    match shards.iter().find(|shard| !names.contains(shard.as_str())) {
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

/// Returns the files that hold a dataset's rows: those the pattern matches, or those of its
/// training split (all files, if no name marks a split). `None` if there are none. Errors if they
/// are of several kinds, which may repeat the same rows, or of several configurations, which are
/// separate datasets.
pub(crate) fn data(
    repo: &str,
    names: &[&str],
    wanted: DataFiles<'_>,
) -> Result<Option<Vec<String>>, HubError> {
    let readable = names.iter().copied().filter(|name| {
        let hidden = name.split('/').any(|part| part.starts_with('.'));
        (wanted.readable)(name) && !hidden && !is_about(name)
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
            first: kinds.first().copied().unwrap_or_default().to_owned(),
            kinds: some(kinds.into_iter().map(str::to_owned)),
        });
    }
    let places: BTreeSet<(&str, bool)> = files.iter().map(|name| place(name)).collect();
    if wanted.pattern.is_none() && places.len() > 1 {
        let choice = |(dir, training): (&str, bool)| {
            let dir = match dir.is_empty() {
                true => String::new(),
                false => format!("{}/", glob::Pattern::escape(dir)),
            };
            format!("files = \"{dir}*{}\"", if training { "train*" } else { "" })
        };
        return Err(HubError::SeveralPlaces {
            repo: repo.to_owned(),
            choices: some(places.into_iter().map(choice)),
        });
    }
    let files: Vec<String> = files.into_iter().map(str::to_owned).collect();
    Ok((!files.is_empty()).then_some(files))
}

/// Returns true if a path contains the word "train".
fn is_training(name: &str) -> bool {
    name.split(|c: char| !c.is_ascii_alphanumeric())
        .any(|word| word == "train")
}

/// Returns the directory of a configuration, judging by the name, and whether it was found by
/// "train": the part before the component with the word "train", or all directories if there is
/// none. Directories below `train/` are shards.
fn place(name: &str) -> (&str, bool) {
    let mut start = 0;
    for part in name.split('/') {
        if is_training(part) {
            return (name[..start].trim_end_matches('/'), true);
        }
        start += part.len() + 1;
    }
    (name.rsplit_once('/').map_or("", |(dir, _)| dir), false)
}

/// Returns true for licences and the like, whose names may end like those of row files.
fn is_about(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name).to_ascii_lowercase();
    let word = file.split(|c: char| !c.is_ascii_alphanumeric()).next();
    let text = file.ends_with(".txt") && word.is_some_and(|word| ABOUT_TEXTS.contains(&word));
    text || ABOUT.contains(&file.as_str())
}

/// Returns the file extension, including the one before a compression suffix:
/// `c4-train.00000-of-01024.json.gz` gives `json.gz`.
fn ending(name: &str) -> &str {
    let file = name.rsplit('/').next().unwrap_or(name);
    let last = |text: &str| text.rfind('.');
    let Some(dot) = last(file) else {
        return "";
    };
    let inner = match &file[dot + 1..] {
        "gz" | "zst" => last(&file[..dot]),
        _ => None,
    };
    &file[inner.unwrap_or(dot) + 1..]
}

/// Joins a list into one line: the first few, and how many more there are.
fn some(all: impl ExactSizeIterator<Item = String>) -> String {
    let more = all.len().saturating_sub(MOST_NAMED);
    let mut named: Vec<String> = all.take(MOST_NAMED).collect();
    if more > 0 {
        named.push(format!("and {more} more"));
    }
    named.join(", ")
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
        assert!(two.to_string().contains("files = \"*.json\""), "{two}");
    }

    #[test]
    fn shards_are_one_kind_whatever_dots_are_in_their_names() {
        for (name, kind) in [
            ("en/c4-train.00000-of-01024.json.gz", "json.gz"),
            ("a.v1.2.parquet", "parquet"),
            ("a.jsonl.zst", "jsonl.zst"),
            ("a.gz", "gz"),
            ("v1.2/a", ""),
        ] {
            assert_eq!(ending(name), kind, "{name}");
        }
        let shards = [
            "c4-train.00000-of-01024.json",
            "c4-train.00001-of-01024.json",
        ];
        assert_eq!(rows(&shards, None).unwrap().unwrap(), shards);
    }

    #[test]
    fn configurations_side_by_side_are_a_choice_and_shards_in_directories_are_not() {
        let two = [
            "wikitext-103/test-0.parquet",
            "wikitext-103/train-0.parquet",
            "wikitext-103/train-1.parquet",
            "wikitext-2/train-0.parquet",
        ];
        let line = rows(&two, None).unwrap_err().to_string();
        let choice = "wikitext-103/*train*";
        assert!(line.contains(&format!("files = {choice:?}")), "{line}");
        assert_eq!(rows(&two, Some(choice)).unwrap().unwrap(), two[1..3]);

        let many: Vec<String> = (0..9).map(|i| format!("[{i}]/rows.json")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let line = rows(&many, None).unwrap_err().to_string();
        assert!(
            line.contains("\"[[]0[]]/*\"") && line.contains("and 5 more"),
            "{line}"
        );
        assert_eq!(rows(&many, Some("[[]0[]]/*")).unwrap().unwrap(), many[..1]);

        let shards = ["train/00/a.json", "train/01/a.json"];
        assert_eq!(rows(&shards, None).unwrap().unwrap(), shards);
    }

    #[test]
    fn what_is_about_a_dataset_is_not_its_rows() {
        let readable = |name: &str| name.ends_with(".txt") || name.ends_with(".json");
        let names = [
            "LICENSE.txt",
            "README-zh.txt",
            "data/dataset_info.json",
            "requirements.txt",
            "rows.txt",
        ];
        let wanted = DataFiles {
            readable: &readable,
            pattern: None,
        };
        assert_eq!(data("a/b", &names, wanted).unwrap().unwrap(), ["rows.txt"]);
    }
}
