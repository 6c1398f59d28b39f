//! Upload of branch directories to the Hub: one commit per revision, with the files that differ.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use gptq_format::{MAX_REPORT, side_files};
use hf_hub::repository::{AddSource, CommitOperation, RepoTypeModel};
use serde_json::Value;

use crate::content::ContentHasher;
use crate::repo::{Entry, Repo};
use crate::{Hub, HubError, RepoId, RepoKind};

/// A local file to upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalFile {
    /// Its path in the repository.
    pub name: String,
    /// Its local path.
    pub path: PathBuf,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Differences between a revision and the local files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// True if the revision has to be created.
    pub create: bool,
    /// Files that are new or different.
    pub upload: Vec<LocalFile>,
    /// Weight files on the Hub that are not among the local files.
    pub delete: Vec<String>,
    /// Weight files on the Hub that local files of the same name replace.
    pub replace: Vec<String>,
    /// Number of identical files.
    pub same: usize,
    /// True if this program wrote the files that are deleted or replaced: it made the revision, or
    /// creates it now as a copy of `main`, which keeps its own.
    pub own: bool,
}

impl LocalFile {
    /// Lists every regular file directly in `dir`, and in its subdirectories those that belong to a
    /// branch; hidden and partial files are left out.
    pub fn list(dir: &Path) -> Result<Vec<Self>, HubError> {
        let mut files = Vec::new();
        let mut add = |name: String, path: PathBuf| {
            let metadata = std::fs::symlink_metadata(&path).map_err(HubError::io(&path))?;
            if metadata.is_file() && !name.starts_with('.') && !name.ends_with(".partial") {
                files.push(LocalFile {
                    name,
                    path,
                    bytes: metadata.len(),
                });
            }
            Ok::<_, HubError>(())
        };
        for entry in std::fs::read_dir(dir).map_err(HubError::io(dir))? {
            let entry = entry.map_err(HubError::io(dir))?;
            add(
                entry.file_name().to_string_lossy().into_owned(),
                entry.path(),
            )?;
        }
        for name in side_files(dir)?
            .into_iter()
            .filter(|name| name.contains('/'))
        {
            let path = dir.join(&name);
            add(name, path)?;
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }

    /// Returns the lower-case hexadecimal SHA-256 of its content.
    pub fn sha256(&self) -> Result<String, HubError> {
        Ok(self.hash()?.sha256())
    }

    fn is(&self, entry: &Entry) -> Result<bool, HubError> {
        Ok(self.bytes == entry.size && self.hash()?.matches(entry).is_some())
    }

    fn hash(&self) -> Result<ContentHasher, HubError> {
        let mut hasher = ContentHasher::new(self.bytes);
        let mut file = File::open(&self.path).map_err(HubError::io(&self.path))?;
        let read = hasher.update_from(&mut file);
        read.map_err(HubError::io(&self.path))?;
        Ok(hasher)
    }
}

/// Creates a model repository, unless one of that name exists.
pub fn create_repo(hub: &Hub, id: &RepoId, private: bool) -> Result<(), HubError> {
    let name = id.to_string();
    let client = hub.client();
    let request = client
        .create_repository()
        .repo_id(&name)
        .repo_type(RepoTypeModel)
        .private(private)
        .exist_ok(true);
    let made = hub.wait(request.send());
    let context = hub.repo(RepoKind::Model, id).context("main");
    made.map(drop).map_err(|e| HubError::from_hub(e, context))
}

/// Computes the changes that make `revision` hold `files`. A new revision begins as a copy of
/// `main`.
pub fn changes(
    hub: &Hub,
    id: &RepoId,
    revision: &str,
    files: &[LocalFile],
) -> Result<Changes, HubError> {
    let repo = hub.repo(RepoKind::Model, id);
    let found = commit_of(hub, &repo, revision)?;
    let create = found.is_none();
    let found = match found {
        None => commit_of(hub, &repo, "main")?,
        found => found,
    };
    let mut changes = Changes {
        create,
        own: true,
        ..Changes::default()
    };
    let Some(commit) = found else {
        changes.upload = files.to_vec();
        return Ok(changes);
    };
    let tree = hub.wait(repo.tree(&commit))?;
    let entries: HashMap<&str, &Entry> = tree.iter().map(|it| (it.path.as_str(), it)).collect();
    for file in files {
        let there = entries.get(file.name.as_str());
        match there.map(|entry| file.is(entry)).transpose()? {
            Some(true) => changes.same += 1,
            there => {
                if there.is_some() && is_weights(&file.name) {
                    changes.replace.push(file.name.clone());
                }
                changes.upload.push(file.clone());
            }
        }
    }
    let names: HashSet<&str> = files.iter().map(|file| file.name.as_str()).collect();
    let gone = tree
        .iter()
        .filter(|entry| is_weights(&entry.path) && !names.contains(entry.path.as_str()));
    changes.delete = gone.map(|entry| entry.path.clone()).collect();
    if !(create || changes.delete.is_empty() && changes.replace.is_empty()) {
        // A revision whose first upload was interrupted is still the copy of `main` that it
        // began as.
        let copy = revision != "main" && commit_of(hub, &repo, "main")?.as_ref() == Some(&commit);
        changes.own = copy || hub.wait(is_own(&repo, &commit, &tree))?;
    }
    Ok(changes)
}

/// Returns the commit of a revision; `None` if the revision or the repository does not exist.
fn commit_of(hub: &Hub, repo: &Repo, revision: &str) -> Result<Option<String>, HubError> {
    match hub.wait(repo.commit(revision)) {
        Ok(commit) => Ok(Some(commit)),
        Err(HubError::NoRevision { .. } | HubError::NoRepo { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Creates the revision as a copy of `main`.
pub fn create_revision(hub: &Hub, id: &RepoId, revision: &str) -> Result<(), HubError> {
    let repo = hub.repo(RepoKind::Model, id);
    let model = repo.model().expect("it was made as a model");
    let made = hub.wait(model.create_branch().branch(revision).send());
    made.map(drop)
        .map_err(|e| HubError::from_hub(e, repo.context(revision)))
}

/// Commits `changes` to an existing revision. Content already on the Hub is not sent again, so
/// an interrupted upload is resumed by running it again.
pub fn upload(hub: &Hub, id: &RepoId, revision: &str, changes: &Changes) -> Result<(), HubError> {
    let repo = hub.repo(RepoKind::Model, id);
    let told = |e| HubError::from_hub(e, repo.context(revision));
    let model = repo.model().expect("it was made as a model");
    let add = changes.upload.iter().map(|file| CommitOperation::Add {
        path_in_repo: file.name.clone(),
        source: AddSource::File(file.path.clone()),
    });
    let delete = changes.delete.iter();
    let delete = delete.map(|path| CommitOperation::Delete {
        path_in_repo: path.clone(),
    });
    let operations: Vec<CommitOperation> = add.chain(delete).collect();
    if !operations.is_empty() {
        let commit = model
            .create_commit()
            .operations(operations)
            .commit_message("Upload GPTQ branch")
            .revision(revision);
        hub.wait(commit.send()).map_err(told)?;
    }
    Ok(())
}

/// Returns true for weight files and their index.
fn is_weights(path: &str) -> bool {
    path.ends_with(".safetensors") || path.ends_with(".index.json")
}

/// Returns true if this program published a revision: beside the settings, which some formats have in `config.json`
/// alone, there is a `report.json` in its format.
async fn is_own(repo: &Repo, commit: &str, tree: &[Entry]) -> Result<bool, HubError> {
    let find = |name: &str| tree.iter().find(|entry| entry.path == name);
    let settings = find("quantize_config.json").or(find("config.json"));
    let (Some(report), Some(_)) = (find("report.json"), settings) else {
        return Ok(false);
    };
    if report.size > MAX_REPORT {
        return Ok(false);
    }
    let told = |e| HubError::from_hub(e, repo.context(commit));
    let mut bytes = repo
        .within(repo.bytes(commit, report, 0))
        .await?
        .map_err(told)?;
    let mut text = Vec::new();
    while let Some(piece) = repo.within(bytes.next()).await? {
        text.extend(piece.map_err(told)?);
        if text.len() as u64 > report.size {
            return Ok(false);
        }
    }
    let report: Option<Value> = serde_json::from_slice(&text).ok();
    let has = |key: &str| report.as_ref().is_some_and(|it| it.get(key).is_some());
    Ok(has("gptq_version") && has("quantize_config") && has("linears"))
}
