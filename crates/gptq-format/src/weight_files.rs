//! Which files of a directory hold the weights, and mapping them.

use std::collections::BTreeMap;
use std::path::Path;

use crate::mapped_file::MappedFile;
use crate::{FormatError, read_json};

/// Most shards that an index may name.
const MAX_SHARDS: usize = 1 << 12;

/// How the weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Container {
    Safetensors,
    /// Zip files as `torch.save` writes them.
    Torch,
}

/// The files to open, in order.
#[derive(Debug)]
pub(crate) struct WeightFiles {
    pub(crate) container: Container,
    /// File names, none with a directory in it.
    pub(crate) files: Vec<String>,
    /// The file of each tensor, where an index says so.
    pub(crate) weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Looks for safetensors first, then for PyTorch files; for an index before a single file.
    pub(crate) fn find(dir: &Path) -> Result<WeightFiles, FormatError> {
        for (container, single) in [
            (Container::Safetensors, "model.safetensors"),
            (Container::Torch, "pytorch_model.bin"),
        ] {
            let index = dir.join(format!("{single}.index.json"));
            if index.exists() {
                let weight_map = read_weight_map(&index)?;
                let mut files: Vec<String> = weight_map.values().cloned().collect();
                files.sort();
                files.dedup();
                if files.len() > MAX_SHARDS {
                    return Err(FormatError::Malformed {
                        path: index,
                        reason: format!("it names {} files, over {MAX_SHARDS}", files.len()),
                    });
                }
                return Ok(WeightFiles {
                    container,
                    files,
                    weight_map,
                });
            }
            if dir.join(single).exists() {
                return Ok(WeightFiles {
                    container,
                    files: vec![single.to_owned()],
                    weight_map: BTreeMap::new(),
                });
            }
        }
        Err(FormatError::NoCheckpoint { dir: dir.into() })
    }
}

/// Maps a file of weights.
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
            // A shard lies beside its index: anything that is more than a file name is refused.
            Some(file) if Path::new(file).file_name() == Some(file.as_ref()) => {
                Ok((name.clone(), file.to_owned()))
            }
            _ => Err(malformed(format!(
                "{name:?} points to {file}, not to a file name; shards lie beside their index"
            ))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn safetensors_are_preferred_to_pytorch_files() {
        let dir = tempfile::tempdir().unwrap();
        let found = || WeightFiles::find(dir.path()).map(|f| (f.container, f.files));
        assert!(matches!(found(), Err(FormatError::NoCheckpoint { .. })));
        fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        assert_eq!(
            found().unwrap(),
            (Container::Torch, vec!["pytorch_model.bin".to_owned()])
        );
        fs::write(dir.path().join("model.safetensors"), "").unwrap();
        assert_eq!(found().unwrap().0, Container::Safetensors);
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
            let error = WeightFiles::find(dir.path()).unwrap_err().to_string();
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
            WeightFiles::find(dir.path())
        };
        assert_eq!(index(MAX_SHARDS).unwrap().files.len(), MAX_SHARDS);
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
            if let Ok(found) = WeightFiles::find(dir.path()) {
                for file in found.files {
                    // Beside the index, whatever it is called.
                    let path = dir.path().join(&file);
                    prop_assert_eq!(path.parent(), Some(dir.path()));
                    prop_assert!(file != ".." && !file.contains('/'));
                }
            }
        }
    }
}
