//! A repository, and its contents at a commit.

use std::path::{Component, Path};
use std::time::Duration;

use futures::{Stream, StreamExt, TryStreamExt};
use hf_hub::repository::{RepoTreeEntry, RepoTypeDataset, RepoTypeModel};
use hf_hub::{HFClient, HFError, HFRepository};

use crate::error::Context;
use crate::{HubError, RepoId, RepoKind};

/// Maximum number of files and directories listed for a repository.
const MAX_FILES: usize = 1 << 16;
/// Maximum length of a file's path in a repository, in bytes.
const MAX_PATH: usize = 1024;

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Path within the repository: relative, without `..`.
    pub path: String,
    pub size: u64,
    /// Git's name for the file, or for the pointer to it: 40 hexadecimal digits.
    pub oid: String,
    /// True if git holds a pointer and the content is stored elsewhere.
    pub pointer: bool,
}

/// Stream of received bytes.
pub(crate) type Bytes<'a> = Box<dyn Stream<Item = Result<Vec<u8>, HFError>> + Unpin + Send + 'a>;

/// A repository of either kind.
pub(crate) struct Repo {
    id: RepoId,
    kind: RepoKind,
    endpoint: String,
    stall: Duration,
    handle: Handle,
}

enum Handle {
    Model(HFRepository<RepoTypeModel>),
    Dataset(HFRepository<RepoTypeDataset>),
}

impl Repo {
    pub(crate) fn new(client: &HFClient, kind: RepoKind, id: &RepoId, stall: Duration) -> Self {
        let handle = match kind {
            RepoKind::Model => Handle::Model(client.model(id.owner(), id.name())),
            RepoKind::Dataset => Handle::Dataset(client.dataset(id.owner(), id.name())),
        };
        Repo {
            id: id.clone(),
            kind,
            endpoint: client.endpoint().to_owned(),
            stall,
            handle,
        }
    }

    /// Returns the client's own handle, for requests that exist only for models.
    pub(crate) fn model(&self) -> Option<&HFRepository<RepoTypeModel>> {
        match &self.handle {
            Handle::Model(repo) => Some(repo),
            Handle::Dataset(_) => None,
        }
    }

    /// Returns the time after which a silent connection counts as broken.
    pub(crate) fn stall(&self) -> Duration {
        self.stall
    }

    /// Returns the context for error messages.
    pub(crate) fn context(&self, revision: &str) -> Context {
        Context {
            id: self.id.to_string(),
            kind: self.kind,
            revision: revision.to_owned(),
            endpoint: self.endpoint.clone(),
        }
    }

    /// Waits for `answer`, and fails if the connection is silent for too long: neither the client
    /// nor the system gives up a connection that stays open and sends nothing.
    pub(crate) async fn within<T>(&self, answer: impl Future<Output = T>) -> Result<T, HubError> {
        let answer = tokio::time::timeout(self.stall, answer).await;
        answer.map_err(|_| HubError::Silent {
            endpoint: self.endpoint.clone(),
            seconds: self.stall.as_secs(),
        })
    }

    /// Runs a request, and once more if the first gets no answer.
    async fn asked<T>(&self, ask: impl AsyncFn() -> Result<T, HubError>) -> Result<T, HubError> {
        match ask().await {
            Err(HubError::Silent { .. }) => ask().await,
            answer => answer,
        }
    }

    /// Returns the commit of `revision`.
    pub(crate) async fn commit(&self, revision: &str) -> Result<String, HubError> {
        let ask = async || match &self.handle {
            Handle::Model(repo) => Ok(repo.info().revision(revision).send().await?.sha),
            Handle::Dataset(repo) => Ok(repo.info().revision(revision).send().await?.sha),
        };
        let commit = self.asked(async || self.within(ask()).await).await?;
        commit
            .map(|sha| sha.filter(|sha| is_git_hash(sha)))
            .and_then(|sha| {
                sha.ok_or_else(|| HFError::malformed_response("the commit of the revision"))
            })
            .map_err(|e| HubError::from_hub(e, self.context(revision)))
    }

    /// Returns every file at `commit`.
    pub(crate) async fn tree(&self, commit: &str) -> Result<Vec<Entry>, HubError> {
        let entries = self.asked(async || self.listing(commit).await).await?;
        let mut files = Vec::new();
        for entry in entries {
            if let RepoTreeEntry::File {
                oid,
                size,
                path,
                lfs,
                ..
            } = entry
            {
                if !is_plain(&path) || !is_git_hash(&oid) {
                    return Err(HubError::Entry {
                        repo: self.id.to_string(),
                        path,
                    });
                }
                files.push(Entry {
                    path,
                    size,
                    oid,
                    pointer: lfs.is_some(),
                });
            }
        }
        Ok(files)
    }

    /// Returns every file and directory at `commit`, as listed by the Hub.
    async fn listing(&self, commit: &str) -> Result<Vec<RepoTreeEntry>, HubError> {
        let refused = |e| HubError::from_hub(e, self.context(commit));
        let mut tree = match &self.handle {
            Handle::Model(repo) => {
                let tree = repo.list_tree().revision(commit).recursive(true).send();
                tree.map_err(refused)?.boxed_local()
            }
            Handle::Dataset(repo) => {
                let tree = repo.list_tree().revision(commit).recursive(true).send();
                tree.map_err(refused)?.boxed_local()
            }
        };
        let mut entries = Vec::new();
        while let Some(entry) = self.within(tree.next()).await? {
            if entries.len() == MAX_FILES {
                return Err(HubError::TooManyFiles {
                    repo: self.id.to_string(),
                    most: MAX_FILES,
                });
            }
            entries.push(entry.map_err(refused)?);
        }
        Ok(entries)
    }

    /// Streams the bytes of a file from `start` on.
    pub(crate) async fn bytes(
        &self,
        commit: &str,
        entry: &Entry,
        start: u64,
    ) -> Result<Bytes<'static>, HFError> {
        let range = (start > 0).then_some(start..entry.size);
        let path = entry.path.as_str();
        let (_, stream) = match &self.handle {
            Handle::Model(repo) => {
                let request = repo.download_file_stream().filename(path).revision(commit);
                request.maybe_range(range).send().await?
            }
            Handle::Dataset(repo) => {
                let request = repo.download_file_stream().filename(path).revision(commit);
                request.maybe_range(range).send().await?
            }
        };
        Ok(Box::new(stream.map_ok(|bytes| bytes.to_vec())))
    }
}

/// Returns true if a remote name is a safe relative path, which cannot leave its directory.
pub(crate) fn is_plain(path: &str) -> bool {
    let components = Path::new(path).components();
    !path.is_empty()
        && path.len() <= MAX_PATH
        && !path.contains(['\\', '\0'])
        && components
            .into_iter()
            .all(|c| matches!(c, Component::Normal(_)))
}

pub(crate) fn is_git_hash(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_leaves_its_directory_is_no_path() {
        for path in ["a", "a/b.json", "a b", "default/train/0000.parquet"] {
            assert!(is_plain(path), "{path}");
        }
        for path in [
            "",
            "../../etc/passwd",
            "/etc/passwd",
            "a/../b",
            "a\\b",
            "./a",
        ] {
            assert!(!is_plain(path), "{path}");
        }
        assert!(is_plain(&"a".repeat(MAX_PATH)) && !is_plain(&"a".repeat(MAX_PATH + 1)));
    }
}
