//! Concurrent downloads into the cache, resumed after interruptions and verified before use.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt, stream};
use hf_hub::HFError;

use crate::HubError;
use crate::cache::{CachedContents, RepoCache, parent};
use crate::content::ContentHasher;
use crate::repo::{Entry, Repo};

/// Number of concurrent downloads.
const AT_ONCE: usize = 4;

/// Consecutive interruptions without progress after which a download is given up.
const PATIENCE: u32 = 4;

/// Wait after the first interruption; doubles with each further one.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// Polling interval for a lock held by another process.
const POLL: Duration = Duration::from_millis(100);

/// Progress of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DownloadProgress {
    /// Files that were missing at the start.
    pub files: usize,
    /// Bytes of those files received so far.
    pub done: u64,
    /// Total bytes of those files.
    pub total: u64,
}

/// Ensures that every entry is in the snapshot of `commit`. Reports the totals before the first
/// byte.
pub(crate) async fn fetch(
    repo: &Repo,
    cache: &RepoCache,
    commit: &str,
    entries: &[&Entry],
    on_progress: &dyn Fn(DownloadProgress),
) -> Result<(), HubError> {
    let contents = cache.contents();
    let absent = |entry: &&&Entry| !cache.has(commit, entry) && contents.find(entry).is_none();
    let absent: BTreeMap<&str, u64> = entries
        .iter()
        .filter(absent)
        .map(|entry| (entry.oid.as_str(), entry.size))
        .collect();
    let meter = Meter {
        files: absent.len(),
        done: Cell::new(0),
        total: absent.values().sum(),
        on_progress,
    };
    meter.add(0);
    let download = Download {
        repo,
        cache,
        commit,
        meter: &meter,
    };
    // A content that several files share is downloaded once: it has one place in the cache.
    let mut contents = HashSet::new();
    let (first, repeated): (Vec<&Entry>, Vec<&Entry>) = entries
        .iter()
        .partition(|entry| contents.insert(&entry.oid));
    for entries in [first, repeated] {
        // The repeated ones find what the first ones made.
        let contents = cache.contents();
        stream::iter(entries)
            .map(|entry| download.place(entry, &contents))
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await?;
    }
    Ok(())
}

struct Meter<'a> {
    files: usize,
    done: Cell<u64>,
    total: u64,
    on_progress: &'a dyn Fn(DownloadProgress),
}

impl Meter<'_> {
    /// Advances by `bytes`; negative if bytes have to be downloaded again.
    fn add(&self, bytes: i64) {
        self.done.set(self.done.get().saturating_add_signed(bytes));
        (self.on_progress)(DownloadProgress {
            files: self.files,
            done: self.done.get(),
            total: self.total,
        });
    }
}

struct Download<'a> {
    repo: &'a Repo,
    cache: &'a RepoCache,
    commit: &'a str,
    meter: &'a Meter<'a>,
}

/// Reason why a complete download does not match its entry.
enum Wrong {
    TooLong,
    Hash,
}

impl Download<'_> {
    /// Puts an entry into the snapshot, from `contents` if it is there.
    async fn place(&self, entry: &Entry, contents: &CachedContents) -> Result<(), HubError> {
        if self.cache.has(self.commit, entry) {
            return Ok(());
        }
        let blob = match contents.find(entry) {
            Some(blob) => blob,
            None => self.download(entry).await?,
        };
        self.cache.link(self.commit, entry, &blob)
    }

    /// Downloads a content to a temporary file and moves it into place once the file on disk is
    /// verified.
    async fn download(&self, entry: &Entry) -> Result<String, HubError> {
        // Git's hash is known before the content is. It is the cache name of all but large files;
        // those are locked under their SHA-256 when they are moved into place.
        let _lock = self.lock(&entry.oid).await?;
        if let Some(blob) = self.cache.find(entry) {
            self.meter.add(entry.size as i64);
            return Ok(blob);
        }
        // Other tools use other names for partial files.
        let path = self.cache.blob(&format!("{}.gptq.incomplete", entry.oid));
        let io = HubError::io(path.clone());
        let open = || {
            parent(&path)?;
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)?;
            let at = file.seek(SeekFrom::End(0))?;
            Ok((file, at))
        };
        let (mut file, mut at) = open().map_err(&io)?;
        self.meter.add(at as i64);
        let (mut resumed, mut restarted) = (false, false);
        loop {
            let streamed = self
                .stream(entry, (&path, &mut file), &mut at, &mut resumed)
                .await?;
            let wrong = match streamed {
                true => {
                    file.sync_all().map_err(&io)?;
                    match self.hash(&path, entry).await?.matches(entry) {
                        Some(blob) => {
                            self.settle(entry, &path, &blob).await?;
                            return Ok(blob);
                        }
                        None => Wrong::Hash,
                    }
                }
                false => Wrong::TooLong,
            };
            self.meter.add(-(at as i64));
            at = 0;
            file.set_len(0)
                .and_then(|()| file.seek(SeekFrom::Start(0)))
                .map_err(&io)?;
            // The partial file may come from another tool, or the server may not support ranges.
            if resumed && !restarted {
                restarted = true;
                continue;
            }
            drop(file);
            fs::remove_file(&path).map_err(&io)?;
            return Err(HubError::Content {
                repo: self.repo.context(self.commit).id,
                file: entry.path.clone(),
                size: entry.size,
                too_long: matches!(wrong, Wrong::TooLong),
            });
        }
    }

    /// Hashes a file from the disk, without blocking other downloads.
    async fn hash(&self, path: &Path, entry: &Entry) -> Result<ContentHasher, HubError> {
        let (file, mut hasher) = (path.to_owned(), ContentHasher::new(entry.size));
        let hashed = tokio::task::spawn_blocking(move || {
            hasher.update_from(&mut File::open(file)?)?;
            Ok(hasher)
        });
        let hashed = hashed.await.unwrap_or_else(|e| Err(io::Error::other(e)));
        hashed.map_err(HubError::io(path))
    }

    /// Moves a verified file into place under the lock of its final name. If another process has
    /// already placed the same content, that one is kept.
    async fn settle(&self, entry: &Entry, path: &Path, blob: &str) -> Result<(), HubError> {
        let _lock = match blob == entry.oid {
            true => None,
            false => self.lock(blob).await?,
        };
        let place = self.cache.blob(blob);
        let there = fs::metadata(&place).is_ok_and(|meta| meta.len() == entry.size);
        match there {
            true => fs::remove_file(path).map_err(HubError::io(path)),
            false => fs::rename(path, &place).map_err(HubError::io(&place)),
        }
    }

    /// Locks the content of this name as all tools that share the cache do. Waits while another
    /// process holds the lock and the cache keeps growing. `None` on a file system without locks.
    async fn lock(&self, name: &str) -> Result<Option<File>, HubError> {
        let path = self.cache.lock(name);
        let io = HubError::io(path.clone());
        let (mut seen, mut since) = (self.cache.bytes(), Instant::now());
        loop {
            parent(&path).map_err(&io)?;
            let mut options = OpenOptions::new();
            options.create(true).truncate(false).write(true);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o664);
            let file = options.open(&path).map_err(&io)?;
            match file.try_lock() {
                // Some tools remove the lock file when done; then this lock protects nothing.
                Ok(()) if is_at(&file, &path) => return Ok(Some(file)),
                Ok(()) => continue,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(_)) => return Ok(None),
            }
            let bytes = self.cache.bytes();
            if bytes != seen {
                (seen, since) = (bytes, Instant::now());
            }
            if since.elapsed() >= self.repo.stall() {
                return Err(HubError::Busy { path });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Appends until the content is complete, resuming after interruptions; `false` if the server
    /// sends more bytes than the entry has.
    async fn stream(
        &self,
        entry: &Entry,
        (path, file): (&Path, &mut File),
        at: &mut u64,
        resumed: &mut bool,
    ) -> Result<bool, HubError> {
        let told = |e| HubError::from_hub(e, self.repo.context(self.commit));
        let mut breaks = 0;
        *resumed |= *at > 0;
        while *at < entry.size {
            let before = *at;
            let opened = self.repo.bytes(self.commit, entry, *at);
            let mut bytes = match self.repo.within(opened).await {
                Ok(Ok(bytes)) => Ok(bytes),
                // No more bytes on the server: treated like a response that ends early.
                Ok(Err(HFError::Http { context })) if context.status.as_u16() == 416 => Err(None),
                Ok(Err(error)) => return Err(told(error)),
                Err(silent) => Err(Some(silent)),
            };
            let broken = loop {
                let next = match &mut bytes {
                    Ok(bytes) => self.repo.within(bytes.next()).await,
                    Err(broken) => break broken.take(),
                };
                match next {
                    Ok(Some(Ok(chunk))) => {
                        if *at + chunk.len() as u64 > entry.size {
                            return Ok(false);
                        }
                        file.write_all(&chunk).map_err(HubError::io(path))?;
                        *at += chunk.len() as u64;
                        self.meter.add(chunk.len() as i64);
                    }
                    Ok(Some(Err(error))) => break Some(told(error)),
                    Ok(None) => break None,
                    Err(silent) => break Some(silent),
                }
            };
            if *at == entry.size {
                break;
            }
            breaks = match *at > before {
                true => 0,
                false => breaks + 1,
            };
            *resumed |= *at > 0;
            if breaks >= PATIENCE {
                return Err(broken.unwrap_or_else(|| HubError::Short {
                    file: entry.path.clone(),
                    size: entry.size,
                    at: *at,
                }));
            }
            tokio::time::sleep(FIRST_WAIT * 2u32.pow(breaks)).await;
        }
        Ok(*at <= entry.size)
    }
}

/// Returns true if the path still refers to this open file.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(file), Ok(there)) => id(file) == id(there),
        _ => false,
    }
}

/// Returns true: an open file cannot be removed here.
#[cfg(not(unix))]
fn is_at(_file: &File, _path: &Path) -> bool {
    true
}
