//! The cache's layout, which is that of `huggingface_hub`:
//!
//! ```text
//! models--owner--name/
//!   blobs/{hash}                  contents, named by SHA-256 (large files) or git's hash
//!   snapshots/{commit}/{path}     links to them
//!   refs/{revision}               the commit a branch or tag was last seen at
//!   .gptq/{commit}.json           what the repository holds there; this crate's own
//! .locks/models--owner--name/
//!   {hash}.lock                   locked by whoever downloads or places the content of that name
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use gptq_format::{read_json, write_json};

use crate::content::is_named;
use crate::error::HubError;
use crate::listing::Listing;
use crate::repo::{Entry, is_git_hash, is_plain};
use crate::{RepoId, RepoKind};

/// One repository's part of the cache.
#[derive(Clone, Debug)]
pub(crate) struct RepoCache {
    dir: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(crate) fn new(root: &Path, kind: RepoKind, id: &RepoId) -> Self {
        let name = format!("{kind}s--{}", id.to_string().replace('/', "--"));
        RepoCache {
            dir: root.join(&name),
            locks: root.join(".locks").join(name),
        }
    }

    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }

    pub(crate) fn blob(&self, name: &str) -> PathBuf {
        self.dir.join("blobs").join(name)
    }

    /// Path of the lock for the content of this name, as `filelock` uses it: `flock` on an empty
    /// file.
    pub(crate) fn lock(&self, name: &str) -> PathBuf {
        self.locks.join(format!("{name}.lock"))
    }

    /// Returns the bytes of all contents, complete or partial; grows while any process downloads.
    pub(crate) fn bytes(&self) -> u64 {
        let blobs = fs::read_dir(self.dir.join("blobs"));
        let blobs = blobs.into_iter().flatten().flatten();
        blobs
            .filter_map(|blob| Some(blob.metadata().ok()?.len()))
            .sum()
    }

    /// Returns the commit that a revision last pointed to; a commit is returned as it is.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        if is_git_hash(revision) {
            return Some(revision.to_owned());
        }
        if !is_plain(revision) {
            return None;
        }
        let commit = fs::read_to_string(self.dir.join("refs").join(revision)).ok()?;
        let commit = commit.trim();
        is_git_hash(commit).then(|| commit.to_owned())
    }

    /// Records the commit of a revision.
    pub(crate) fn remember(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        let known = self.commit(revision).is_some_and(|known| known == commit);
        if known || !is_plain(revision) {
            return Ok(());
        }
        let path = self.dir.join("refs").join(revision);
        match replace(&path, |fresh| fs::write(fresh, commit)) {
            // A read-only cache of another user that already held everything needed.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
            written => written.map_err(HubError::io(&path)),
        }
    }

    /// Returns the saved file listing of a commit, if there is one.
    pub(crate) fn listing(&self, commit: &str) -> Option<Listing> {
        read_json(&self.listing_path(commit)).ok()
    }

    /// Saves the listing once, since a commit does not change. Failures are ignored: a read-only
    /// cache works without it.
    pub(crate) fn keep_listing(&self, commit: &str, tree: &[Entry]) {
        let path = self.listing_path(commit);
        if self.listing(commit).is_none() && parent(&path).is_ok() {
            let _ = write_json(&path, &Listing::of(tree));
        }
    }

    fn listing_path(&self, commit: &str) -> PathBuf {
        self.dir.join(".gptq").join(format!("{commit}.json"))
    }

    /// Returns the names of the repository's files at a commit, as far as the cache knows them.
    pub(crate) fn names(&self, commit: &str) -> Vec<String> {
        let listing = self.listing(commit);
        listing.map_or_else(|| self.files(commit), |listing| listing.names())
    }

    /// Returns the files of a snapshot, as paths within the repository.
    fn files(&self, commit: &str) -> Vec<String> {
        let root = self.snapshot(commit);
        let mut files = Vec::new();
        let mut dirs = vec![root.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.is_file()
                    && let Ok(name) = path.strip_prefix(&root)
                {
                    files.push(name.to_string_lossy().replace('\\', "/"));
                }
            }
        }
        files.sort();
        files
    }

    /// Returns true if an entry's file is in a snapshot: a link to its content, or a file of its
    /// size where links are not available.
    pub(crate) fn has(&self, commit: &str, entry: &Entry) -> bool {
        let path = self.snapshot(commit).join(&entry.path);
        let whole = fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() == entry.size);
        whole
            && fs::read_link(&path).map_or(true, |target| {
                let name = target.file_name().and_then(|name| name.to_str());
                name.is_some_and(|name| is_named(name, entry))
            })
    }

    /// Returns the name of an entry's content if it is in the cache, from any snapshot.
    pub(crate) fn find(&self, entry: &Entry) -> Option<String> {
        match entry.pointer {
            true => self.contents().find(entry),
            // Its name is known.
            false => {
                let blob = fs::metadata(self.blob(&entry.oid)).ok()?;
                (blob.len() == entry.size).then(|| entry.oid.clone())
            }
        }
    }

    /// Lists all contents, complete or partial, as they are now.
    pub(crate) fn contents(&self) -> CachedContents {
        let blobs = fs::read_dir(self.dir.join("blobs"));
        let mut by_size: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for blob in blobs.into_iter().flatten().flatten() {
            if let (Ok(name), Ok(data)) = (blob.file_name().into_string(), blob.metadata()) {
                by_size.entry(data.len()).or_default().push(name);
            }
        }
        CachedContents { by_size }
    }

    /// Puts `blob` into a snapshot under the entry's path.
    pub(crate) fn link(&self, commit: &str, entry: &Entry, blob: &str) -> Result<(), HubError> {
        let link = self.snapshot(commit).join(&entry.path);
        let up = "../".repeat(2 + entry.path.matches('/').count());
        let placed = replace(&link, |fresh| {
            #[cfg(unix)]
            return std::os::unix::fs::symlink(format!("{up}blobs/{blob}"), fresh);
            #[cfg(not(unix))]
            return fs::copy(self.blob(blob), fresh).map(|_| drop(up));
        });
        placed.map_err(HubError::io(&link))
    }
}

/// Names of the contents of a cache, by size.
pub(crate) struct CachedContents {
    by_size: BTreeMap<u64, Vec<String>>,
}

impl CachedContents {
    /// Returns the name of an entry's content if it is among them.
    pub(crate) fn find(&self, entry: &Entry) -> Option<String> {
        let mut names = self.by_size.get(&entry.size)?.iter();
        names.find(|name| is_named(name, entry)).cloned()
    }
}

/// Makes a file or link under a temporary name and renames it into place, so that other processes
/// see either the old or the new one.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    parent(path)?;
    // Machines or containers that share a cache may have equal process ids.
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_nanos();
    let fresh = path.with_file_name(format!(".gptq-{}-{now}.partial", std::process::id()));
    make(&fresh)
        .and_then(|()| fs::rename(&fresh, path))
        .inspect_err(|_| {
            // Keeps the first error.
            let _ = fs::remove_file(&fresh);
        })
}

/// Creates the parent directory of a file.
pub(crate) fn parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}
