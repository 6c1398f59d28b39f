//! Finds and maps the weight files of a directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::mapped_file::MappedFile;
use crate::{FormatError, read_json};

/// Maximum number of shards in an index.
const MAX_SHARDS: usize = 1 << 12;

/// Container format of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Container {
    Safetensors,
    /// Zip files as `torch.save` writes them.
    Torch,
}

/// The files to open, in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct WeightFiles {
    pub(crate) container: Container,
    /// Existing files, as plain names without directories.
    pub(crate) files: Vec<String>,
    /// The index that lists them, if any.
    pub(crate) index: Option<Index>,
    /// Notes on unexpected files, one sentence each.
    pub(crate) notes: Vec<String>,
}

/// An index of shards and their tensors.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Index {
    /// Its file name.
    pub(crate) name: String,
    /// The file of each tensor.
    pub(crate) weight_map: BTreeMap<String, String>,
    /// Files that it lists but that are missing.
    pub(crate) absent: Vec<String>,
}

/// The two containers, with Transformers' file stems and extensions.
const KINDS: [(Container, &str, &str); 2] = [
    (Container::Safetensors, "model", "safetensors"),
    (Container::Torch, "pytorch_model", "bin"),
];

impl WeightFiles {
    /// Looks where Transformers looks, in its order: safetensors before PyTorch files, a single
    /// file before an index. Then for files of other tools: a full set of numbered shards without
    /// an index, a file with one of the stems `base_names`, or the only safetensors file.
    pub(crate) fn find(dir: &Path, base_names: &[String]) -> Result<WeightFiles, FormatError> {
        let there = weight_files(dir)?;
        let is_there = |name: &str| there.iter().any(|file| file == name);
        let own = KINDS.map(|(container, stem, ending)| (container, format!("{stem}.{ending}")));
        let named = base_names.iter().flat_map(|stem| {
            let endings = ["safetensors", "bin", "pt"].into_iter();
            endings.map(move |ending| (Container::of(ending), format!("{stem}.{ending}")))
        });
        for (container, single) in own.into_iter().chain(named) {
            if is_there(&single) {
                return Ok(WeightFiles::alone(container, vec![single]));
            }
            let index = format!("{single}.index.json");
            if dir.join(&index).exists() {
                return WeightFiles::listed(dir, container, index, &there);
            }
        }
        if let [(ending, files)] = shard_sets(&there).as_slice() {
            let note = format!(
                "no index lists the {} shards; they are read without one",
                files.len()
            );
            return Ok(WeightFiles {
                notes: vec![note],
                ..WeightFiles::alone(Container::of(ending), files.clone())
            });
        }
        let others: Vec<&String> = (there.iter())
            .filter(|file| file.ends_with(".safetensors") && !file.starts_with("adapter_"))
            .collect();
        if let [only] = others.as_slice() {
            return Ok(WeightFiles::alone(
                Container::Safetensors,
                vec![only.to_string()],
            ));
        }
        Err(FormatError::NoCheckpoint {
            dir: dir.into(),
            there: some(&there),
        })
    }

    fn alone(container: Container, files: Vec<String>) -> Self {
        WeightFiles {
            container,
            files,
            index: None,
            notes: Vec::new(),
        }
    }

    /// Returns the files listed in `index`; if those are missing and there is a full set of shards
    /// under other names, that set.
    fn listed(
        dir: &Path,
        container: Container,
        index: String,
        there: &[String],
    ) -> Result<WeightFiles, FormatError> {
        let path = dir.join(&index);
        let malformed = |reason: String| FormatError::Malformed {
            path: path.clone(),
            reason,
        };
        let weight_map = read_weight_map(&path)?;
        let mut files: Vec<String> = weight_map.values().cloned().collect();
        files.sort();
        files.dedup();
        if files.len() > MAX_SHARDS {
            return Err(malformed(format!(
                "it lists {} files, over {MAX_SHARDS}",
                files.len()
            )));
        }
        let (mut files, absent): (Vec<String>, Vec<String>) =
            files.into_iter().partition(|file| there.contains(file));
        let mut notes = Vec::new();
        if let Some(first) = absent.first() {
            let sets = shard_sets(there).into_iter();
            let sets: Vec<Vec<String>> = sets
                .filter(|(ending, _)| Container::of(ending) == container)
                .map(|(_, files)| files)
                .collect();
            match sets.as_slice() {
                [set] => {
                    notes.push(format!(
                        "{index} lists {first}, which is missing; the full set of {} shards beside it is \
                         read instead",
                        set.len()
                    ));
                    files = set.clone();
                }
                _ if files.is_empty() => {
                    return Err(malformed(format!(
                        "it lists {}, which {} missing; found: {}; download the listed files, or \
                         the index of those found",
                        some(&absent),
                        if absent.len() == 1 { "is" } else { "are" },
                        some(there)
                    )));
                }
                _ => notes.push(format!("{index} lists {}, missing", some(&absent))),
            }
        }
        Ok(WeightFiles {
            container,
            files,
            index: Some(Index {
                name: index,
                weight_map,
                absent,
            }),
            notes,
        })
    }
}

impl Container {
    /// Returns the container of a file extension.
    fn of(ending: &str) -> Self {
        match ending {
            "safetensors" => Container::Safetensors,
            _ => Container::Torch,
        }
    }
}

/// Returns the files in `dir` that could hold weights, sorted.
fn weight_files(dir: &Path) -> Result<Vec<String>, FormatError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(FormatError::io(dir))? {
        let path = entry.map_err(FormatError::io(dir))?.path();
        let ending = path.extension().and_then(|ending| ending.to_str());
        if matches!(ending, Some("safetensors" | "bin" | "pt"))
            && let Some(name) = path.file_name().and_then(|name| name.to_str())
            && !name.starts_with('.')
            && path.exists()
        {
            found.push(name.to_owned());
        }
    }
    found.sort();
    Ok(found)
}

/// Returns full sets of shards, `STEM-00001-of-00003.EXTENSION` to the last: extension and files of
/// each; only safetensors if there are any.
fn shard_sets(there: &[String]) -> Vec<(String, Vec<String>)> {
    let mut sets: BTreeMap<(&str, &str, usize), Vec<&String>> = BTreeMap::new();
    for file in there {
        if let Some((stem, ending, of)) = shard(file) {
            sets.entry((ending, stem, of)).or_default().push(file);
        }
    }
    // Names are distinct and their numbers at most `of`, so a set of that size is complete.
    sets.retain(|(_, _, of), files| files.len() == *of);
    let safe = sets.keys().any(|(ending, ..)| *ending == "safetensors");
    sets.retain(|(ending, ..), _| !safe || *ending == "safetensors");
    let set = |((ending, ..), files): ((&str, _, _), Vec<&String>)| {
        (ending.to_owned(), files.into_iter().cloned().collect())
    };
    sets.into_iter().map(set).collect()
}

/// Splits a numbered shard's name into stem, extension and number of shards.
fn shard(file: &str) -> Option<(&str, &str, usize)> {
    let (name, ending) = file.rsplit_once('.')?;
    let (rest, of) = name.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let parse = |digits: &str| {
        let plain = digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<usize>().ok().filter(|_| plain)
    };
    let (number, of) = (parse(number)?, parse(of)?);
    ((1..=of.min(MAX_SHARDS)).contains(&number)).then_some((stem, ending, of))
}

/// Joins the first few names, and how many more there are.
pub(crate) fn some(names: &[String]) -> String {
    const NAMED: usize = 3;
    match names {
        [] => "none".to_owned(),
        _ => {
            let mut text = (names.iter().take(NAMED).cloned())
                .collect::<Vec<_>>()
                .join(", ");
            if names.len() > NAMED {
                text += &format!(" and {} more", names.len() - NAMED);
            }
            text
        }
    }
}

/// Maps a weight file.
pub(crate) fn map(path: &Path) -> Result<MappedFile, FormatError> {
    let map = MappedFile::open(path)?;
    if map.starts_with(b"version https://git-lfs") {
        return Err(FormatError::LfsPointer { path: path.into() });
    }
    Ok(map)
}

fn read_weight_map(index: &Path) -> Result<BTreeMap<String, String>, FormatError> {
    let malformed = |reason: String| FormatError::Malformed {
        path: index.into(),
        reason,
    };
    let value: serde_json::Value = read_json(index)?;
    let map = value
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| malformed("has no \"weight_map\" object".into()))?;
    map.iter()
        .map(|(name, file)| match file.as_str() {
            // Shards are beside their index: anything but a plain file name is refused.
            Some(file) if Path::new(file).file_name() == Some(file.as_ref()) => {
                Ok((name.clone(), file.to_owned()))
            }
            _ => Err(malformed(format!(
                "{name:?} points to {file}, not to a file name; shards must be beside their index"
            ))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn safetensors_are_preferred_to_pytorch_files() {
        let dir = tempfile::tempdir().unwrap();
        let found = || WeightFiles::find(dir.path(), &[]).map(|f| (f.container, f.files));
        assert!(matches!(found(), Err(FormatError::NoCheckpoint { .. })));
        fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        assert_eq!(
            found().unwrap(),
            (Container::Torch, vec!["pytorch_model.bin".to_owned()])
        );
        fs::write(dir.path().join("model.safetensors"), "").unwrap();
        assert_eq!(found().unwrap().0, Container::Safetensors);
        // As in Transformers, an index beside the single file is ignored.
        let index = r#"{"weight_map": {"x": "other.safetensors"}}"#;
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        assert_eq!(found().unwrap().1, ["model.safetensors"]);
    }

    /// Returns the files found in a directory with these.
    fn found(files: &[&str], base_names: &[&str]) -> Result<WeightFiles, String> {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let base_names: Vec<String> = base_names.iter().map(|name| name.to_string()).collect();
        WeightFiles::find(dir.path(), &base_names).map_err(|error| error.to_string())
    }

    #[test]
    fn shards_without_an_index_are_read_where_they_are_all_there() {
        let shards = [
            "m-00001-of-00002.safetensors",
            "m-00002-of-00002.safetensors",
        ];
        let all = found(&[shards[1], shards[0], "m-00001-of-00003.safetensors"], &[]).unwrap();
        assert_eq!(all.files, shards);
        assert!(all.notes[0].contains("no index lists the 2 shards"));
        let one = found(&shards[..1], &[]).map(|it| it.files);
        assert_eq!(one.unwrap(), shards[..1], "the only file");
        let two = [
            "m-00001-of-00003.safetensors",
            "m-00003-of-00003.safetensors",
        ];
        let error = found(&two, &[]).unwrap_err();
        assert!(
            error.contains("no checkpoint here") && error.contains(two[1]),
            "{error}"
        );
    }

    #[test]
    fn files_of_other_names_are_found_by_their_config_or_where_there_is_one() {
        let named = "gptq_model-4bit-128g";
        let files = ["gptq_model-4bit-128g.safetensors", "other.safetensors"];
        assert_eq!(found(&files, &[named]).unwrap().files, files[..1]);
        assert!(found(&files, &[]).unwrap_err().contains(files[1]));
        assert_eq!(found(&files[1..], &[]).unwrap().files, files[1..]);
        let torch = found(&["gptq_model-4bit-128g.pt", "training_args.bin"], &[named]).unwrap();
        assert_eq!(torch.container, Container::Torch);
        let adapter = found(&["adapter_model.safetensors"], &[]).unwrap_err();
        assert!(adapter.contains("adapter_model.safetensors"), "{adapter}");
    }

    #[test]
    fn a_stale_index_gives_way_to_a_full_set_of_shards_and_is_named_where_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let index = r#"{"weight_map": {"x": "model-00001-of-00004.safetensors"}}"#;
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        let error = WeightFiles::find(dir.path(), &[]).unwrap_err().to_string();
        for word in [
            "index.json: it lists model-00001-of-00004.safetensors",
            "which is missing",
        ] {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
        let shard = |i: usize| format!("model-0000{i}-of-00002.safetensors");
        for i in [1, 2] {
            fs::write(dir.path().join(shard(i)), "").unwrap();
        }
        let found = WeightFiles::find(dir.path(), &[]).unwrap();
        assert_eq!(found.files, [shard(1), shard(2)]);
        assert_eq!(
            found.index.unwrap().absent,
            ["model-00001-of-00004.safetensors"]
        );
    }

    #[test]
    fn an_index_never_leads_out_of_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        for file in [
            "../../etc/passwd",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a/b.bin",
            "a/",
        ] {
            let text = serde_json::json!({"weight_map": {"x": file}}).to_string();
            fs::write(dir.path().join("pytorch_model.bin.index.json"), text).unwrap();
            let error = WeightFiles::find(dir.path(), &[]).unwrap_err().to_string();
            assert!(error.contains("not to a file name"), "{file}: {error}");
        }
    }

    #[test]
    fn an_index_of_too_many_files_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let index = |n: usize| {
            let map: serde_json::Map<_, _> = (0..n)
                .map(|i| (i.to_string(), format!("{i}.bin").into()))
                .collect();
            let text = serde_json::json!({"weight_map": map}).to_string();
            fs::write(dir.path().join("pytorch_model.bin.index.json"), text).unwrap();
            WeightFiles::find(dir.path(), &[])
        };
        let absent = index(MAX_SHARDS).unwrap_err().to_string();
        assert!(absent.contains("and 4093 more"), "{absent}");
        let error = index(MAX_SHARDS + 1).unwrap_err().to_string();
        assert!(error.contains("4097 files"), "{error}");
    }

    proptest! {
        #[test]
        fn any_index_ends_in_file_names_or_a_sentence(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            file in "[a-z./\\\\]{0,12}",
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut bytes = serde_json::json!({"weight_map": {"x": file}}).to_string().into_bytes();
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            fs::write(dir.path().join("model.safetensors.index.json"), bytes).unwrap();
            if let Ok(found) = WeightFiles::find(dir.path(), &[]) {
                for file in found.files {
                    // Listed files are beside the index, whatever their names.
                    let path = dir.path().join(&file);
                    prop_assert_eq!(path.parent(), Some(dir.path()));
                    prop_assert!(file != ".." && !file.contains('/'));
                }
            }
        }
    }
}
