//! The base model's weight files and their hashes: what a finished branch says it was made from.
//!
//! A run hashes them on a thread of its own, while the blocks are computed, and waits for it before the
//! first branch is put in place. One thread keeps up with any disk and leaves the others to the run. As every
//! byte goes by, it also looks for weights that cannot be quantized: one in the last block ends the run in
//! the first seconds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use gptq_format::{Checkpoint, FileDigest, FloatScan, FormatError, Half};
use gptq_plan::ModelFiles;
use gptq_spec::ModelConfig;
use rayon::prelude::*;

use crate::RunError;
use crate::options::check_stop;

/// How often one that waits looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(10);

/// The hashes of a model's files, or what will be.
pub(crate) struct ModelHash {
    files: Vec<WeightFile>,
    state: State,
}

/// A file to hash.
#[derive(Clone)]
struct WeightFile {
    name: String,
    path: PathBuf,
    /// What is looked at on the way.
    scan: FloatScan,
}

enum State {
    Unknown,
    UnderWay(UnderWay),
    Known(ModelFiles),
}

/// The thread; it ends promptly once this is dropped.
struct UnderWay {
    /// `None` of the thread's: it was to end.
    thread: Option<JoinHandle<Result<Option<ModelFiles>, FormatError>>>,
    end: Arc<AtomicBool>,
}

impl ModelHash {
    /// Of the files of a model, whose weights are taken in `half`; nothing is read yet.
    pub(crate) fn new(checkpoint: &Checkpoint, config: &ModelConfig, half: Half) -> Self {
        let needed: BTreeSet<String> = config.tensors().into_iter().map(|it| it.name).collect();
        let file = |name: &String| WeightFile {
            name: name.clone(),
            path: checkpoint.dir().join(name),
            scan: checkpoint.float_scan(name, half, |tensor| needed.contains(tensor)),
        };
        ModelHash {
            files: checkpoint.files().iter().map(file).collect(),
            state: State::Unknown,
        }
    }

    /// Hashes all files at once, if that has not been done yet. Weights are not looked at: what is asked
    /// is whether finished branches were made of these very files.
    ///
    /// # Errors
    /// One cannot be read; `stop` became true, in a run of `layers` blocks.
    pub(crate) fn now(
        &mut self,
        stop: &AtomicBool,
        layers: usize,
    ) -> Result<&ModelFiles, RunError> {
        if !matches!(self.state, State::Known(_)) {
            let stopped = || stop.load(Ordering::Relaxed);
            let found = (self.files.par_iter())
                .map(|file| {
                    let digest = FileDigest::of(&file.path, stopped)?;
                    Ok(digest.map(|digest| (file.name.clone(), digest)))
                })
                .collect::<Result<Option<ModelFiles>, FormatError>>()?;
            check_stop(stop, layers)?;
            self.state = State::Known(found.unwrap_or_default());
        }
        match &self.state {
            State::Known(files) => Ok(files),
            _ => unreachable!("set above"),
        }
    }

    /// Begins to hash them and to look at their weights, one after the other, on a thread of its own.
    pub(crate) fn begin(&mut self) {
        if !matches!(self.state, State::Unknown) {
            return;
        }
        let (files, end) = (self.files.clone(), Arc::new(AtomicBool::new(false)));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let mut found = BTreeMap::new();
            for mut file in files {
                let ended = || ended.load(Ordering::Relaxed);
                match FileDigest::scanned(&file.path, &mut file.scan, ended)? {
                    Some(digest) => found.insert(file.name, digest),
                    None => return Ok(None),
                };
            }
            Ok(Some(found))
        });
        self.state = State::UnderWay(UnderWay {
            thread: Some(thread),
            end,
        });
    }

    /// What the thread has met so far that makes the run useless.
    ///
    /// # Errors
    /// A weight that cannot be quantized, a file that cannot be read.
    pub(crate) fn check(&mut self) -> Result<(), RunError> {
        let done = |thread: &JoinHandle<_>| thread.is_finished();
        if let State::UnderWay(under_way) = &mut self.state
            && under_way.thread.as_ref().is_some_and(done)
        {
            let found = under_way.join()?;
            self.state = found.map_or(State::Unknown, State::Known);
        }
        Ok(())
    }

    /// Waits for what was begun.
    ///
    /// # Errors
    /// As of [`ModelHash::now`].
    pub(crate) fn wait(
        &mut self,
        stop: &AtomicBool,
        layers: usize,
    ) -> Result<&ModelFiles, RunError> {
        if let State::UnderWay(under_way) = &mut self.state {
            let running = |thread: &JoinHandle<_>| !thread.is_finished();
            while under_way.thread.as_ref().is_some_and(running) {
                check_stop(stop, layers)?;
                sleep(LOOK);
            }
            let found = under_way.join()?;
            self.state = found.map_or(State::Unknown, State::Known);
        }
        self.now(stop, layers)
    }
}

impl UnderWay {
    fn join(&mut self) -> Result<Option<ModelFiles>, FormatError> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(None),
            Some(Ok(done)) => done,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        // What it found, or failed at, is of no use any more.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::Path;
    use std::time::Instant;

    use gptq_format::sha256;

    use super::*;

    fn of(dir: &Path, names: &[&str]) -> ModelHash {
        let file = |name: &&str| WeightFile {
            name: name.to_string(),
            path: dir.join(name),
            scan: FloatScan::default(),
        };
        ModelHash {
            files: names.iter().map(file).collect(),
            state: State::Unknown,
        }
    }

    #[test]
    fn hashes_are_the_same_at_once_and_in_the_background() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            fs::write(dir.path().join(name), name.repeat(1000)).unwrap();
        }
        let stop = AtomicBool::new(false);
        let mut hash = of(dir.path(), &["a", "b"]);
        let now = hash.now(&stop, 1).unwrap().clone();
        assert_eq!(now["b"].sha256, sha256("b".repeat(1000).as_bytes()));
        assert_eq!((now.len(), now["a"].bytes), (2, 1000));
        let mut hash = of(dir.path(), &["a", "b"]);
        hash.begin();
        assert_eq!(hash.wait(&stop, 1).unwrap(), &now);
        let mut hash = of(dir.path(), &["a", "gone"]);
        hash.begin();
        let error = hash.wait(&stop, 1).unwrap_err().to_string();
        assert!(error.contains("gone"), "{error}");
    }

    #[test]
    fn a_stop_or_an_end_of_the_run_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        // Without a block on the disk; hours to hash.
        let file = File::create(dir.path().join("a")).unwrap();
        file.set_len(1 << 43).unwrap();
        let (started, stop) = (Instant::now(), AtomicBool::new(true));
        let mut hash = of(dir.path(), &["a"]);
        let stopped =
            |found: Result<&ModelFiles, RunError>| matches!(found, Err(RunError::Stopped { .. }));
        assert!(stopped(hash.now(&stop, 1)));
        hash.begin();
        assert!(stopped(hash.wait(&stop, 1)));
        drop(hash);
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
