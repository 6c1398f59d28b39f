//! Files into the cache: several at once, resumed where they broke off, checked before they count.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use hf_hub::HFError;

use crate::HubError;
use crate::cache::{Cache, parent};
use crate::content::ContentHasher;
use crate::repo::{Entry, Repo};

/// Files under way together.
const AT_ONCE: usize = 4;

/// Breaks in a row, without a byte between them, after which a file is given up.
const PATIENCE: u32 = 4;

/// The wait after the first break; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Files that were not here when it began.
    pub files: usize,
    /// Bytes of them that have come.
    pub done: u64,
    /// Bytes of them all.
    pub total: u64,
}

/// Makes sure that every entry is in the snapshot of `commit`. Says what is to come before it comes.
pub(crate) async fn fetch(
    repo: &Repo,
    cache: &Cache,
    commit: &str,
    entries: &[&Entry],
    on_progress: &dyn Fn(Progress),
) -> Result<(), HubError> {
    let absent = |entry: &&&Entry| !cache.has(commit, entry) && cache.find(entry).is_none();
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
    // A content that several files have is downloaded once: it has one place in the cache.
    let mut contents = HashSet::new();
    let (first, repeated): (Vec<&Entry>, Vec<&Entry>) = entries
        .iter()
        .partition(|entry| contents.insert(&entry.oid));
    for entries in [first, repeated] {
        stream::iter(entries)
            .map(|entry| download.place(entry))
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
    on_progress: &'a dyn Fn(Progress),
}

impl Meter<'_> {
    /// Moves on by `bytes`, or back where they have to come again.
    fn add(&self, bytes: i64) {
        self.done.set(self.done.get().saturating_add_signed(bytes));
        (self.on_progress)(Progress {
            files: self.files,
            done: self.done.get(),
            total: self.total,
        });
    }
}

struct Download<'a> {
    repo: &'a Repo,
    cache: &'a Cache,
    commit: &'a str,
    meter: &'a Meter<'a>,
}

/// Why a content that is all here is not what it should be.
enum Wrong {
    TooLong,
    Hash,
}

impl Download<'_> {
    async fn place(&self, entry: &Entry) -> Result<(), HubError> {
        if self.cache.has(self.commit, entry) {
            return Ok(());
        }
        let blob = match self.cache.find(entry) {
            Some(blob) => blob,
            None => self.download(entry).await?,
        };
        self.cache.link(self.commit, entry, &blob)
    }

    /// Downloads a content under a name of its own, and gives it its place once it is right.
    async fn download(&self, entry: &Entry) -> Result<String, HubError> {
        // Git's name is known before the content is, and the content's own only after.
        let path = self.cache.blob(&format!("{}.incomplete", entry.oid));
        let io = HubError::io(path.clone());
        let open = || {
            parent(&path)?;
            OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)
        };
        let mut file = open().map_err(&io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(HubError::Busy { path }),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        let mut hasher = ContentHasher::new(entry.size);
        let mut at = hasher.update_from(&mut file).map_err(&io)?;
        self.meter.add(at as i64);
        let (mut resumed, mut restarted) = (false, false);
        loop {
            let streamed = self
                .stream(
                    entry,
                    (&path, &mut file),
                    &mut hasher,
                    &mut at,
                    &mut resumed,
                )
                .await?;
            let wrong = match streamed {
                true => {
                    let finished = std::mem::replace(&mut hasher, ContentHasher::new(entry.size));
                    match finished.matches(entry) {
                        Some(blob) => {
                            file.sync_all().map_err(&io)?;
                            let place = self.cache.blob(&blob);
                            fs::rename(&path, &place).map_err(HubError::io(&place))?;
                            return Ok(blob);
                        }
                        None => Wrong::Hash,
                    }
                }
                false => Wrong::TooLong,
            };
            self.meter.add(-(at as i64));
            at = 0;
            hasher = ContentHasher::new(entry.size);
            file.set_len(0)
                .and_then(|()| file.seek(SeekFrom::Start(0)))
                .map_err(&io)?;
            // What was here may have been another's, or the server may not go on in the middle.
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

    /// Appends until all of the content is here; `false` if there is more of it than there should
    /// be. Goes on after a break, from where it was.
    async fn stream(
        &self,
        entry: &Entry,
        (path, file): (&Path, &mut File),
        hasher: &mut ContentHasher,
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
                // There is no more of it there: short, as one that just ends.
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
                        hasher.update(&chunk);
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
