//! Saved file listing of a repository at a commit, for use offline.
//!
//! A cache shows which files it has, not which it should have: of a dataset's two shards, one may
//! have been selected, or a download may have stopped between them. So the Hub's listing is saved
//! beside the snapshot, under `.gptq`, where other tools do not look.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::repo::Entry;

/// File sizes by path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listing {
    files: BTreeMap<String, u64>,
}

impl Listing {
    pub(crate) fn of(tree: &[Entry]) -> Self {
        let files = tree.iter().map(|entry| (entry.path.clone(), entry.size));
        Listing {
            files: files.collect(),
        }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.files.keys().cloned().collect()
    }

    /// Returns the first of the files `wanted` that is not complete in `snapshot`.
    pub(crate) fn lacking<'a>(&self, snapshot: &Path, wanted: &'a [String]) -> Option<&'a str> {
        let here = |name: &str| {
            let size = fs::metadata(snapshot.join(name)).map(|file| file.len());
            size.is_ok_and(|size| self.files.get(name) == Some(&size))
        };
        wanted.iter().map(String::as_str).find(|name| !here(name))
    }
}
