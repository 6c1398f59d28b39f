//! Branch directories to the Hub: one commit per revision, of the files that differ.

use std::fs::File;
use std::path::{Path, PathBuf};

use hf_hub::repository::{AddSource, CommitOperation, RepoTypeModel};

use crate::content::ContentHasher;
use crate::repo::Entry;
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
    /// Files that are the same.
    pub same: usize,
}

impl LocalFile {
    /// Every plain file directly in `dir`, by name; subdirectories and hidden files stay.
    pub fn list(dir: &Path) -> Result<Vec<Self>, HubError> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(HubError::io(dir))? {
            let entry = entry.map_err(HubError::io(dir))?;
            let path = entry.path();
            let metadata = entry.metadata().map_err(HubError::io(&path))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if metadata.is_file() && !name.starts_with('.') && !name.ends_with(".partial") {
                files.push(LocalFile {
                    name,
                    path,
                    bytes: metadata.len(),
                });
            }
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

    /// What has to happen for `revision` to hold `files`.
    pub fn changes(
        &self,
        id: &RepoId,
        revision: &str,
        files: &[LocalFile],
    ) -> Result<Changes, HubError> {
        let repo = self.repo(Kind::Model, id);
        let commit = self.wait(repo.commit(revision));
        let (create, tree) = match commit {
            Ok(commit) => (false, self.wait(repo.tree(&commit))?),
            Err(HubError::NoRevision { .. } | HubError::NoRepo { .. }) => (true, Vec::new()),
            Err(error) => return Err(error),
        };
        let mut changes = Changes {
            create,
            ..Changes::default()
        };
        for file in files {
            let there = tree.iter().find(|entry| entry.path == file.name);
            match there.map(|entry| file.is(entry)).transpose()? {
                Some(true) => changes.same += 1,
                _ => changes.upload.push(file.clone()),
            }
        }
        let weights = |path: &str| path.ends_with(".safetensors") || path.ends_with(".index.json");
        let gone = tree
            .iter()
            .filter(|entry| weights(&entry.path) && !files.iter().any(|f| f.name == entry.path));
        changes.delete = gone.map(|entry| entry.path.clone()).collect();
        Ok(changes)
    }

    /// Makes the revision if need be, and commits the changes. What is there already is not sent
    /// again, so a broken upload goes on by being run again.
    pub fn upload(
        &self,
        id: &RepoId,
        revision: &str,
        files: &[LocalFile],
    ) -> Result<Changes, HubError> {
        let repo = self.repo(Kind::Model, id);
        let told = |e| HubError::from_hub(e, repo.context(revision));
        let model = repo.model().expect("it was made as a model");
        let before = self.changes(id, revision, files)?;
        let changes = match before.create {
            // A new branch starts with what main holds.
            true => {
                let made = self.wait(model.create_branch().branch(revision).send());
                made.map_err(told)?;
                Changes {
                    create: true,
                    ..self.changes(id, revision, files)?
                }
            }
            false => before,
        };
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
        Ok(changes)
    }
}
