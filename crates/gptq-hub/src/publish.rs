//! Branch directories to the Hub: one commit per revision, of the files that differ.

use std::fs::File;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use gptq_format::{MAX_REPORT, side_files};
use hf_hub::repository::{AddSource, CommitOperation, RepoTypeModel};
use serde_json::Value;

use crate::content::ContentHasher;
use crate::repo::{Entry, Repo};
use crate::{Hub, HubError, Kind, RepoId};

/// A file to be on the Hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalFile {
    /// Its path in the repository.
    pub name: String,
    /// Where it is here.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// What a revision lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The revision has to be made.
    pub create: bool,
    /// Files that are new or differ.
    pub upload: Vec<LocalFile>,
    /// Weights there that are not among the files here.
    pub delete: Vec<String>,
    /// Weights there that files here of the same name take the place of.
    pub replace: Vec<String>,
    /// Files that are the same.
    pub same: usize,
    /// What is deleted or replaced is this program's own: it made the revision, or it makes it now, as a copy of
    /// `main` which keeps what it holds.
    pub own: bool,
}

impl LocalFile {
    /// Every plain file directly in `dir`, by name, and of its subdirectories what goes along into branches;
    /// others and hidden files stay.
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

    /// Lower-case hexadecimal SHA-256 of what it holds.
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

impl Hub {
    /// Makes a model repository, if there is none of that name.
    pub fn create(&self, id: &RepoId, private: bool) -> Result<(), HubError> {
        let name = id.to_string();
        let client = self.client();
        let request = client
            .create_repository()
            .repo_id(&name)
            .repo_type(RepoTypeModel)
            .private(private)
            .exist_ok(true);
        let made = self.wait(request.send());
        let context = self.repo(Kind::Model, id).context("main");
        made.map(drop).map_err(|e| HubError::from_hub(e, context))
    }

    /// What has to happen for `revision` to hold `files`. A revision that is not there begins as what `main`
    /// holds.
    pub fn changes(
        &self,
        id: &RepoId,
        revision: &str,
        files: &[LocalFile],
    ) -> Result<Changes, HubError> {
        let repo = self.repo(Kind::Model, id);
        let found = self.commit_of(&repo, revision)?;
        let create = found.is_none();
        let found = match found {
            None => self.commit_of(&repo, "main")?,
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
        let tree = self.wait(repo.tree(&commit))?;
        for file in files {
            let there = tree.iter().find(|entry| entry.path == file.name);
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
        let gone = tree
            .iter()
            .filter(|entry| is_weights(&entry.path) && !files.iter().any(|f| f.name == entry.path));
        changes.delete = gone.map(|entry| entry.path.clone()).collect();
        if !(create || changes.delete.is_empty() && changes.replace.is_empty()) {
            // A revision whose first upload broke off is still the copy of main that it began as.
            let copy =
                revision != "main" && self.commit_of(&repo, "main")?.as_ref() == Some(&commit);
            changes.own = copy || self.wait(is_own(&repo, &commit, &tree))?;
        }
        Ok(changes)
    }

    /// The commit of a revision; `None` where there is none, or no repository.
    fn commit_of(&self, repo: &Repo, revision: &str) -> Result<Option<String>, HubError> {
        match self.wait(repo.commit(revision)) {
            Ok(commit) => Ok(Some(commit)),
            Err(HubError::NoRevision { .. } | HubError::NoRepo { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the revision, which begins as what `main` holds.
    pub fn create_revision(&self, id: &RepoId, revision: &str) -> Result<(), HubError> {
        let repo = self.repo(Kind::Model, id);
        let model = repo.model().expect("it was made as a model");
        let made = self.wait(model.create_branch().branch(revision).send());
        made.map(drop)
            .map_err(|e| HubError::from_hub(e, repo.context(revision)))
    }

    /// Commits `changes` to a revision that is there. What is there already is not sent again, so a broken
    /// upload goes on by being run again.
    pub fn upload(&self, id: &RepoId, revision: &str, changes: &Changes) -> Result<(), HubError> {
        let repo = self.repo(Kind::Model, id);
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
            self.wait(commit.send()).map_err(told)?;
        }
        Ok(())
    }
}

/// Whether a file is weights, or says in which files they are.
fn is_weights(path: &str) -> bool {
    path.ends_with(".safetensors") || path.ends_with(".index.json")
}

/// Whether this program published a revision: beside `quantize_config.json` there is a `report.json` as it
/// writes one.
async fn is_own(repo: &Repo, commit: &str, tree: &[Entry]) -> Result<bool, HubError> {
    let find = |name: &str| tree.iter().find(|entry| entry.path == name);
    let (Some(report), Some(_)) = (find("report.json"), find("quantize_config.json")) else {
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
