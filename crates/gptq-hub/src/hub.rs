//! The connection, and whole snapshots.

use std::path::PathBuf;
use std::time::Duration;

use hf_hub::HFClient;
use tokio::runtime::{Builder, Runtime};

use crate::cache::Cache;
use crate::download::fetch;
use crate::repo::{Entry, Repo};
use crate::{DataFiles, HubError, Kind, Progress, RepoId, files};

/// Where the automatic Parquet conversion of a dataset lies.
const PARQUET: &str = "refs/convert/parquet";

/// How long a connection is waited for that sends nothing, where nobody says otherwise.
pub const STALL: Duration = Duration::from_secs(60);

/// How to reach the Hub; nothing is read from the environment here.
#[derive(Clone)]
pub struct HubSettings {
    /// `https://huggingface.co`, or a mirror.
    pub endpoint: String,
    /// Never printed.
    pub token: Option<String>,
    /// The cache's directory.
    pub cache: PathBuf,
    /// Ask nobody; use what is in the cache.
    pub offline: bool,
    /// How long a connection may be silent before it counts as broken.
    pub stall: Duration,
}

/// The Hub.
pub struct Hub {
    client: HFClient,
    runtime: Runtime,
    settings: HubSettings,
}

/// Files of one commit, in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The directory they are in.
    pub dir: PathBuf,
    /// The commit.
    pub commit: String,
    /// Their paths in it.
    pub files: Vec<String>,
    /// The Hub could not be reached, and this is what was in the cache.
    pub stale: bool,
}

impl Hub {
    /// Prepares a connection; asks nobody yet.
    pub fn new(settings: HubSettings) -> Result<Self, HubError> {
        let other = |reason: String| HubError::Other {
            id: settings.endpoint.clone(),
            reason,
        };
        let mut client = HFClient::builder()
            .endpoint(&settings.endpoint)
            .cache_dir(&settings.cache)
            .retry_max_attempts(4);
        if let Some(token) = &settings.token {
            let printable = token.bytes().all(|b| b.is_ascii_graphic());
            if !printable || token.is_empty() {
                return Err(HubError::Token);
            }
            client = client.token(token);
        }
        Ok(Hub {
            client: client.build().map_err(|e| other(e.to_string()))?,
            // The client's blocking face has no stream of bytes, so the runtime is here.
            runtime: Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| other(e.to_string()))?,
            settings,
        })
    }

    pub(crate) fn client(&self) -> &HFClient {
        &self.client
    }

    /// A repository, as this Hub is asked about it.
    pub(crate) fn repo(&self, kind: Kind, id: &RepoId) -> Repo {
        Repo::new(&self.client, kind, id, self.settings.stall)
    }

    /// Runs a request to its end.
    pub(crate) fn wait<F: Future>(&self, request: F) -> F::Output {
        self.runtime.block_on(request)
    }

    /// A model's config, tokenizer and weights (safetensors where there are any).
    pub fn model(
        &self,
        id: &RepoId,
        revision: &str,
        on_progress: &dyn Fn(Progress),
    ) -> Result<Snapshot, HubError> {
        let cached = |cache: &Cache, commit: &str| {
            let names = cache.files(commit);
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            for needed in ["config.json", "tokenizer.json"] {
                if !names.contains(&needed) {
                    return Err(format!("no {needed}"));
                }
            }
            let weights = files::model_weights(&id.to_string(), &names, &cache.snapshot(commit));
            weights.map_err(|e| e.to_string())?;
            Ok(names.into_iter().map(str::to_owned).collect())
        };
        self.snapshot(Kind::Model, id, revision, cached, |repo, cache, commit| {
            self.wait(async {
                let tree = repo.tree(commit).await?;
                let side = self.side(&tree, repo, cache, commit).await?;
                let names: Vec<&str> = tree.iter().map(|e| e.path.as_str()).collect();
                let snapshot = cache.snapshot(commit);
                let weights = files::model_weights(&id.to_string(), &names, &snapshot)?;
                fetch(repo, cache, commit, &select(&tree, &weights), on_progress).await?;
                Ok([side, weights].concat())
            })
        })
    }

    /// A model's config and tokenizer, without its weights.
    pub fn model_side(&self, id: &RepoId, revision: &str) -> Result<Snapshot, HubError> {
        let cached = |cache: &Cache, commit: &str| {
            let names = cache.files(commit);
            match names.iter().any(|name| name == "config.json") {
                true => Ok(names),
                false => Err("no config.json".to_owned()),
            }
        };
        self.snapshot(Kind::Model, id, revision, cached, |repo, cache, commit| {
            self.wait(async {
                let tree = repo.tree(commit).await?;
                self.side(&tree, repo, cache, commit).await
            })
        })
    }

    /// Fetches config, tokenizer, and the index of the weights.
    async fn side(
        &self,
        tree: &[Entry],
        repo: &Repo,
        cache: &Cache,
        commit: &str,
    ) -> Result<Vec<String>, HubError> {
        let names: Vec<&str> = tree.iter().map(|e| e.path.as_str()).collect();
        let side = files::model_side(&names);
        fetch(repo, cache, commit, &select(tree, &side), &|_| ()).await?;
        Ok(side)
    }

    /// A dataset's rows: its own files, or its Parquet conversion where it has none that can be
    /// read.
    pub fn dataset(
        &self,
        id: &RepoId,
        revision: &str,
        wanted: DataFiles<'_>,
        on_progress: &dyn Fn(Progress),
    ) -> Result<Snapshot, HubError> {
        let no_rows = || HubError::NoRows {
            repo: id.to_string(),
        };
        let attempt = |revision: &str| {
            let cached = |cache: &Cache, commit: &str| {
                let names = cache.files(commit);
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                let found = files::data(&id.to_string(), &names, wanted);
                found
                    .map_err(|e| e.to_string())?
                    .ok_or_else(|| "no file with rows".to_owned())
            };
            self.snapshot(
                Kind::Dataset,
                id,
                revision,
                cached,
                |repo, cache, commit| {
                    self.wait(async {
                        let tree = repo.tree(commit).await?;
                        let names: Vec<&str> = tree.iter().map(|e| e.path.as_str()).collect();
                        let rows = files::data(&id.to_string(), &names, wanted)?;
                        let rows = rows.ok_or_else(no_rows)?;
                        fetch(repo, cache, commit, &select(&tree, &rows), on_progress).await?;
                        Ok(rows)
                    })
                },
            )
        };
        match attempt(revision) {
            Err(HubError::NoRows { .. }) if revision == "main" => match attempt(PARQUET) {
                Err(HubError::NoRevision { .. }) => Err(no_rows()),
                other => other,
            },
            Err(HubError::Offline { .. }) if revision == "main" => {
                attempt(PARQUET).or_else(|_| attempt(revision))
            }
            other => other,
        }
    }

    /// Finds the commit, fetches, and remembers; or takes the cache, where nobody can be asked.
    fn snapshot(
        &self,
        kind: Kind,
        id: &RepoId,
        revision: &str,
        cached: impl Fn(&Cache, &str) -> Result<Vec<String>, String>,
        fetched: impl Fn(&Repo, &Cache, &str) -> Result<Vec<String>, HubError>,
    ) -> Result<Snapshot, HubError> {
        let cache = Cache::new(&self.settings.cache, kind, id);
        let from_cache = |stale| {
            let commit = cache
                .commit(revision)
                .ok_or_else(|| "it was never fetched".to_owned())?;
            Ok(Snapshot {
                files: cached(&cache, &commit)?,
                dir: cache.snapshot(&commit),
                commit,
                stale,
            })
        };
        if self.settings.offline {
            return from_cache(false).map_err(|missing| HubError::Offline {
                id: id.to_string(),
                revision: revision.to_owned(),
                cache: self.settings.cache.clone(),
                missing,
            });
        }
        let repo = self.repo(kind, id);
        let online = || {
            let commit = self.wait(repo.commit(revision))?;
            let files = fetched(&repo, &cache, &commit)?;
            cache.remember(revision, &commit)?;
            Ok(Snapshot {
                dir: cache.snapshot(&commit),
                commit,
                files,
                stale: false,
            })
        };
        match online() {
            Err(error) if HubError::is_unreachable(&error) => {
                from_cache(true).map_err(|_: String| error)
            }
            other => other,
        }
    }
}

fn select<'a>(tree: &'a [Entry], wanted: &[String]) -> Vec<&'a Entry> {
    tree.iter().filter(|e| wanted.contains(&e.path)).collect()
}
