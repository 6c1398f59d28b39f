//! Hashes of the base model's weight files, which are recorded in a finished branch.
//!
//! A run hashes them on a separate thread while it computes the blocks, and waits for the hashes
//! before the first branch is moved into place. One thread keeps up with any disk. The same pass
//! scans for weights that cannot be quantized, so that one in the last block ends the run within
//! seconds.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use gptq_format::{Checkpoint, FileDigest, FloatScan, FormatError, Half};
use gptq_plan::ModelFiles;
use gptq_spec::{ModelConfig, Role};
use rayon::prelude::*;

use crate::RunError;
use crate::options::check_stop;

/// Interval at which a waiting thread checks for a stop request.
const LOOK: Duration = Duration::from_millis(10);

/// Hashes of a model's files, or their computation.
pub(crate) struct ModelHash {
    files: Vec<WeightFile>,
    state: State,
}

/// A file to hash.
#[derive(Clone)]
struct WeightFile {
    name: String,
    path: PathBuf,
    /// Scan for unusable weights.
    scan: FloatScan,
}

enum State {
    Unknown,
    UnderWay(UnderWay),
    Known(ModelFiles),
}

/// Running thread; it ends promptly when this is dropped.
struct UnderWay {
    /// The thread returns `None` if it was told to end.
    thread: Option<JoinHandle<Result<Option<ModelFiles>, FormatError>>>,
    end: Arc<AtomicBool>,
}

impl ModelHash {
    /// Prepares the files of a model whose weights are converted to `half`; nothing is read yet.
    pub(crate) fn new(checkpoint: &Checkpoint, config: &ModelConfig, half: Half) -> Self {
        let tensors = config.tensors().into_iter();
        let run = tensors.filter(|it| !matches!(it.role, Role::Carried(_) | Role::Wide));
        let needed: BTreeSet<String> = run.map(|it| it.name).collect();
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

    /// Hashes all files at once, unless already done. Weights are not scanned: the hashes only show
    /// whether finished branches were made from the same files.
    ///
    /// # Errors
    /// A file cannot be read, or `stop` became true in a run of `layers` blocks.
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

    /// Starts a thread that hashes the files and scans their weights, one after the other.
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

    /// Reports an error that the thread has met so far.
    ///
    /// # Errors
    /// A weight that cannot be quantized, or a file that cannot be read.
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

    /// Waits for the started thread.
    ///
    /// # Errors
    /// The same errors as [`ModelHash::now`].
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
        // Its result is no longer needed.
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
        // A sparse file that would take hours to hash.
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
