//! Connection to the Hub, and complete snapshots.

use std::cell::Cell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::HFClient;
use tokio::runtime::{Builder, Runtime};

use crate::cache::RepoCache;
use crate::download::fetch;
use crate::listing::Listing;
use crate::repo::{Entry, Repo};
use crate::{DataFiles, DownloadProgress, HubError, RepoId, RepoKind, files};

/// Revision that holds the automatic Parquet conversion of a dataset.
const PARQUET: &str = "refs/convert/parquet";

/// Stands for "no token": without a token the client reads the environment, and one that is not
/// valid in a header it never sends.
const NO_TOKEN: &str = "\n";

/// Default time after which a silent connection counts as broken.
pub const STALL: Duration = Duration::from_secs(60);

/// Connection settings; nothing is read from the environment here.
#[derive(Clone)]
pub struct HubSettings {
    /// `https://huggingface.co`, or a mirror.
    pub endpoint: String,
    /// Never printed. If `None`, no token is sent, whatever the environment holds.
    pub token: Option<String>,
    /// The cache's directory.
    pub cache: PathBuf,
    /// Use only the cache, without any network access.
    pub offline: bool,
    /// Time after which a silent connection counts as broken.
    pub stall: Duration,
}

/// Client of the Hub.
pub struct Hub {
    client: HFClient,
    runtime: Runtime,
    settings: HubSettings,
    /// True once the Hub could not be reached; later requests then use the cache without waiting.
    gone: Cell<bool>,
}

/// Files of one commit in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Directory of the snapshot.
    pub dir: PathBuf,
    /// The commit.
    pub commit: String,
    /// Paths of the files in it.
    pub files: Vec<String>,
    /// True if the Hub could not be reached and the files are from the cache.
    pub stale: bool,
    /// True for a cached dataset that another tool downloaded: its completeness could not be
    /// checked.
    pub unchecked: bool,
}

impl Hub {
    /// Prepares a connection, without any request.
    pub fn new(settings: HubSettings) -> Result<Self, HubError> {
        let other = |reason: String| HubError::Other {
            id: settings.endpoint.clone(),
            reason,
        };
        let token = match &settings.token {
            Some(token) => check_token(token).map(|()| token.as_str())?,
            None => NO_TOKEN,
        };
        let client = HFClient::builder()
            .endpoint(&settings.endpoint)
            .token(token)
            .cache_dir(&settings.cache)
            .retry_max_attempts(4);
        Ok(Hub {
            client: client.build().map_err(|e| other(e.to_string()))?,
            // The client's blocking interface cannot stream bytes, so the runtime is here.
            runtime: Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| other(e.to_string()))?,
            settings,
            gone: Cell::new(false),
        })
    }

    pub(crate) fn client(&self) -> &HFClient {
        &self.client
    }

    /// Returns a handle for requests about a repository.
    pub(crate) fn repo(&self, kind: RepoKind, id: &RepoId) -> Repo {
        Repo::new(&self.client, kind, id, self.settings.stall)
    }

    /// Blocks until a request is complete.
    pub(crate) fn wait<F: Future>(&self, request: F) -> F::Output {
        self.runtime.block_on(request)
    }

    /// Fetches a model's config, tokenizer and weights (safetensors if available).
    pub fn model(
        &self,
        id: &RepoId,
        revision: &str,
        on_progress: &dyn Fn(DownloadProgress),
    ) -> Result<Snapshot, HubError> {
        let cached = |names: &[&str], snapshot: &Path| whole(id, names, snapshot);
        self.snapshot(
            RepoKind::Model,
            id,
            revision,
            cached,
            async |place, names| {
                let side = place.side(names).await?;
                let weights = files::model_weights(&id.to_string(), names, &place.dir())?;
                place.fetch(&weights, on_progress).await?;
                Ok([side, weights].concat())
            },
        )
    }

    /// Fetches a model's config and tokenizer, and checks that it has weights.
    pub fn model_ahead(&self, id: &RepoId, revision: &str) -> Result<Snapshot, HubError> {
        let cached = |names: &[&str], snapshot: &Path| whole(id, names, snapshot);
        self.snapshot(
            RepoKind::Model,
            id,
            revision,
            cached,
            async |place, names| {
                let side = place.side(names).await?;
                files::model_weights(&id.to_string(), names, &place.dir())?;
                Ok(side)
            },
        )
    }

    /// Fetches a model's config and tokenizer; the model may have no weights.
    pub fn model_side(&self, id: &RepoId, revision: &str) -> Result<Snapshot, HubError> {
        let cached = |names: &[&str], _: &Path| match names.contains(&"config.json") {
            true => Ok(files::model_side(names)),
            false => Err("no config.json".to_owned()),
        };
        self.snapshot(
            RepoKind::Model,
            id,
            revision,
            cached,
            async |place, names| place.side(names).await,
        )
    }

    /// Fetches a dataset's rows: its own files, or its Parquet conversion if none of them can be
    /// read.
    pub fn dataset(
        &self,
        id: &RepoId,
        revision: &str,
        wanted: DataFiles<'_>,
        on_progress: &dyn Fn(DownloadProgress),
    ) -> Result<Snapshot, HubError> {
        let no_rows = || HubError::NoRows {
            repo: id.to_string(),
        };
        let rows = |names: &[&str]| files::data(&id.to_string(), names, wanted);
        let attempt = |revision: &str| {
            let cached = |names: &[&str], _: &Path| {
                let found = rows(names).map_err(|e| e.to_string())?;
                found.ok_or_else(|| "no file with rows".to_owned())
            };
            let fetched = async |place: &SnapshotFetch<'_>, names: &[&str]| {
                let rows = rows(names)?.ok_or_else(no_rows)?;
                place.fetch(&rows, on_progress).await?;
                Ok(rows)
            };
            self.snapshot(RepoKind::Dataset, id, revision, cached, fetched)
        };
        // The cached conversion replaces a repository without rows of its own, not an incomplete
        // download.
        let converted = || {
            let cache = RepoCache::new(&self.settings.cache, RepoKind::Dataset, id);
            let own = cache.commit("main").map(|commit| cache.names(&commit));
            let own: Vec<&str> = own.iter().flatten().map(String::as_str).collect();
            cache.commit(PARQUET).is_some() && matches!(rows(&own), Ok(None))
        };
        match attempt(revision) {
            Err(HubError::NoRows { .. }) if revision == "main" => match attempt(PARQUET) {
                Err(HubError::NoRevision { .. }) => Err(no_rows()),
                other => other,
            },
            Err(error)
                if revision == "main"
                    && (error.is_unreachable() || matches!(error, HubError::Offline { .. }))
                    && converted() =>
            {
                attempt(PARQUET).or(Err(error))
            }
            other => other,
        }
    }

    /// Finds the commit, fetches its files and records it; uses the cache if offline or
    /// unreachable.
    fn snapshot(
        &self,
        kind: RepoKind,
        id: &RepoId,
        revision: &str,
        cached: impl Fn(&[&str], &Path) -> Result<Vec<String>, String>,
        fetched: impl AsyncFn(&SnapshotFetch<'_>, &[&str]) -> Result<Vec<String>, HubError>,
    ) -> Result<Snapshot, HubError> {
        let cache = RepoCache::new(&self.settings.cache, kind, id);
        let from_cache = |stale| {
            let commit = cache
                .commit(revision)
                .ok_or_else(|| "it was never downloaded".to_owned())?;
            let (dir, names) = (cache.snapshot(&commit), cache.names(&commit));
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let files = cached(&names, &dir)?;
            let listing = cache.listing(&commit);
            let lacking = |listing: &Listing| listing.lacking(&dir, &files).map(str::to_owned);
            match listing.as_ref().and_then(lacking) {
                Some(file) => Err(format!("{file} is incomplete")),
                None => Ok(Snapshot {
                    files,
                    dir,
                    commit,
                    stale,
                    unchecked: kind == RepoKind::Dataset && listing.is_none(),
                }),
            }
        };
        if self.settings.offline {
            return from_cache(false).map_err(|missing| HubError::Offline {
                id: id.to_string(),
                revision: revision.to_owned(),
                cache: self.settings.cache.clone(),
                missing,
            });
        }
        if self.gone.get()
            && let Ok(snapshot) = from_cache(true)
        {
            return Ok(snapshot);
        }
        let repo = self.repo(kind, id);
        let online = || {
            let commit = self.wait(repo.commit(revision))?;
            let tree = self.wait(repo.tree(&commit))?;
            cache.keep_listing(&commit, &tree);
            let names: Vec<&str> = tree.iter().map(|e| e.path.as_str()).collect();
            let place = SnapshotFetch {
                repo: &repo,
                cache: &cache,
                commit: &commit,
                tree: &tree,
            };
            let files = self.wait(fetched(&place, &names))?;
            cache.remember(revision, &commit)?;
            Ok(Snapshot {
                dir: place.dir(),
                commit,
                files,
                stale: false,
                unchecked: false,
            })
        };
        match online() {
            Err(error) if HubError::is_unreachable(&error) => {
                self.gone.set(true);
                from_cache(true).map_err(|_: String| error)
            }
            other => other,
        }
    }
}

/// Checks that a token is valid in a header; the error does not reveal any of it.
fn check_token(token: &str) -> Result<(), HubError> {
    let why = if token.is_empty() {
        "it is empty"
    } else if token.contains(|c: char| c.is_ascii_whitespace()) {
        "it contains a space or a line break"
    } else if !token.bytes().all(|b| b.is_ascii_graphic()) {
        "it contains a character that is not ASCII"
    } else if token.contains(['"', '\'']) {
        "it contains quotation marks"
    } else {
        return Ok(());
    };
    Err(HubError::Token { why })
}

/// Returns all files of a cached model, or what it lacks.
fn whole(id: &RepoId, names: &[&str], snapshot: &Path) -> Result<Vec<String>, String> {
    for needed in ["config.json", "tokenizer.json"] {
        if !names.contains(&needed) {
            return Err(format!("no {needed}"));
        }
    }
    let weights = files::model_weights(&id.to_string(), names, snapshot);
    let weights = weights.map_err(|e| e.to_string())?;
    Ok([files::model_side(names), weights].concat())
}

/// A commit of a repository and its snapshot.
struct SnapshotFetch<'a> {
    repo: &'a Repo,
    cache: &'a RepoCache,
    commit: &'a str,
    tree: &'a [Entry],
}

impl SnapshotFetch<'_> {
    fn dir(&self) -> PathBuf {
        self.cache.snapshot(self.commit)
    }

    async fn fetch(
        &self,
        wanted: &[String],
        on_progress: &dyn Fn(DownloadProgress),
    ) -> Result<(), HubError> {
        let wanted: HashSet<&String> = wanted.iter().collect();
        let wanted = self.tree.iter().filter(|e| wanted.contains(&e.path));
        let wanted: Vec<&Entry> = wanted.collect();
        fetch(self.repo, self.cache, self.commit, &wanted, on_progress).await
    }

    /// Fetches config, tokenizer, and the index of the weights.
    async fn side(&self, names: &[&str]) -> Result<Vec<String>, HubError> {
        let side = files::model_side(names);
        self.fetch(&side, &|_| ()).await?;
        Ok(side)
    }
}
