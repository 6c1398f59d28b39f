//! Hidden states saved beside the journal now and then, so that a resumed run need not run all of
//! its finished blocks again: `.gptq-states-N` in the output directory, after block `N`.
//!
//! The file has a line of JSON ([`StatesIndex`]), then every chunk's f16 or bf16 values in order,
//! little-endian. Its SHA-256 is recorded in the journal with block `N`, once both are on disk. A
//! missing or changed file is ignored: the packed tensors give the same states, only later.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gptq_format::{FormatError, Half, hexadecimal, le_bytes, sha256_file};
use gptq_kernels::Engine;
use gptq_model::Flow;
use gptq_plan::{FinishedBlock, Places, Plan, PlanError};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::gram::Dense;
use crate::output_errors::OutputErrors;
use crate::scratch::Scratch;
use crate::states::{States, state_storage};
use crate::stream::Stream;
use crate::{RunError, disk_space};

const PREFIX: &str = ".gptq-states-";
/// Maximum length of the first line in bytes: 2^16 chunks in 100 branches, 32 bytes each, and more.
const MAX_INDEX: u64 = 256 << 20;
/// Maximum number of unsynced bytes, which limits the wait when a run is stopped.
const SYNC_EVERY: usize = 1 << 30;

#[derive(Serialize, Deserialize)]
struct StatesIndex {
    streams: Vec<IndexedStream>,
    /// The dense model's stream.
    dense: Option<IndexedStream>,
    /// Streams for comparing outputs: the dense model's, and each branch's.
    compared: Option<(IndexedStream, Vec<IndexedStream>)>,
}

#[derive(Serialize, Deserialize)]
struct IndexedStream {
    /// Names of the branches.
    branches: Vec<String>,
    /// Windows, tokens and features of each chunk.
    chunks: Vec<[usize; 3]>,
}

/// Saved hidden states from which a run can resume.
pub(crate) struct SavedStates {
    /// Number of blocks the states have passed.
    pub(crate) layers: usize,
    path: PathBuf,
}

/// Saves the hidden states after block `layer`: their SHA-256, or why they are not saved: no room, a disk that
/// fails, a run that is to `stop`. A run can do without them.
///
/// # Errors
/// The device fails, or the file of states that do not fit into memory.
pub(crate) fn keep<B: Engine>(
    states: &States<B>,
    plan: &Plan,
    layer: usize,
    stop: &AtomicBool,
) -> Result<Result<String, String>, RunError> {
    let of = |stream: &Stream<B>| IndexedStream {
        branches: (stream.branches.iter())
            .map(|&i| plan.branches[i].name.clone())
            .collect(),
        chunks: stream.chunks.iter().map(|chunk| chunk.shape()).collect(),
    };
    let dense = states.dense.as_ref().map(Dense::end);
    let compared = states.compared.as_ref();
    let compared = compared.map(|it| (it.dense.end(), &it.own));
    let index = StatesIndex {
        streams: states.streams.iter().map(of).collect(),
        dense: dense.map(of),
        compared: compared.map(|(dense, own)| (of(dense), own.iter().map(of).collect())),
    };
    let bytes = index.bytes().unwrap_or(u64::MAX);
    match disk_space::has_room(plan, bytes) {
        Ok(true) => {}
        Ok(false) => return Ok(Err(format!("no room for {bytes} bytes"))),
        Err(error) => return Ok(Err(error.to_string())),
    }
    let path = path(&plan.output, layer);
    let compared = compared.into_iter();
    let compared = compared.flat_map(|(dense, own)| [dense].into_iter().chain(own));
    let streams = states.streams.iter().chain(dense).chain(compared);
    let written = write(&path, &index, streams, stop);
    if !matches!(written, Ok(Ok(_))) {
        let _ = fs::remove_file(&path);
    }
    Ok(written?.map_err(|error| error.to_string()))
}
/// Returns the file's SHA-256, or the disk's error; fails if the states cannot be read.
fn write<'a, B: Engine>(
    path: &Path,
    index: &StatesIndex,
    streams: impl Iterator<Item = &'a Stream<B>>,
    stop: &AtomicBool,
) -> Result<std::io::Result<String>, FormatError> {
    let mut file = match HashingFile::create(path) {
        Ok(file) => file,
        Err(error) => return Ok(Err(error)),
    };
    let line = serde_json::to_string(index).expect("an index of plain values always serializes");
    if let Err(error) = file.add(format!("{line}\n").as_bytes()) {
        return Ok(Err(error));
    }
    for chunk in streams.flat_map(|stream| &stream.chunks) {
        if stop.load(Ordering::Relaxed) {
            return Ok(Err(ErrorKind::Interrupted.into()));
        }
        if let Err(error) = file.add(le_bytes(&chunk.residual()?)) {
            return Ok(Err(error));
        }
    }
    Ok(file.finish(path))
}

/// A file and the hash of its content.
struct HashingFile {
    file: File,
    hash: Sha256,
    unsynced: usize,
}

impl HashingFile {
    fn create(path: &Path) -> std::io::Result<Self> {
        // An existing file or link of that name must not be written through.
        if let Err(error) = fs::remove_file(path)
            && error.kind() != ErrorKind::NotFound
        {
            return Err(error);
        }
        Ok(HashingFile {
            file: OpenOptions::new().write(true).create_new(true).open(path)?,
            hash: Sha256::new(),
            unsynced: 0,
        })
    }

    fn add(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes)?;
        self.unsynced += bytes.len();
        if self.unsynced > SYNC_EVERY {
            self.file.sync_data()?;
            self.unsynced = 0;
        }
        Ok(())
    }

    /// Syncs the file and its directory entry, and returns the hash.
    fn finish(self, path: &Path) -> std::io::Result<String> {
        self.file.sync_all()?;
        File::open(path.parent().unwrap_or(path))?.sync_all()?;
        Ok(hexadecimal(&self.hash.finalize()))
    }
}

impl StatesIndex {
    /// Returns the size of all states; `None` on overflow.
    fn bytes(&self) -> Option<u64> {
        let compared = self.compared.iter();
        let chunks = self
            .streams
            .iter()
            .chain(&self.dense)
            .chain(compared.flat_map(|(dense, own)| [dense].into_iter().chain(own)))
            .flat_map(|it| &it.chunks);
        chunks
            .into_iter()
            .try_fold(0u64, |sum, &[_, tokens, features]| {
                let values = (tokens as u64).checked_mul(features as u64)?;
                sum.checked_add(values.checked_mul(2)?)
            })
    }
}

impl SavedStates {
    /// Finds the last saved states recorded in the journal that are unchanged.
    pub(crate) fn find(output: &Path, blocks: &[FinishedBlock]) -> Option<SavedStates> {
        blocks.iter().rev().find_map(|block| {
            let path = path(output, block.layer);
            let regular = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
            let same = || sha256_file(&path).ok() == block.states;
            (block.states.is_some() && regular && same()).then(|| SavedStates {
                layers: block.layer + 1,
                path: path.clone(),
            })
        })
    }

    /// Reads the states, each chunk to its place.
    ///
    /// # Errors
    /// The states do not belong to `plan`.
    pub(crate) fn read<B: Engine>(
        &self,
        plan: &Plan,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        device: &B::Device,
    ) -> Result<States<B>, RunError> {
        let io = |e| FormatError::io(&self.path)(e);
        let damaged = || {
            let path = self.path.clone();
            let reason = "its hidden states are not those of this run".to_owned();
            RunError::from(PlanError::Journal { path, reason })
        };
        let file = File::open(&self.path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut file = BufReader::new(file);
        let mut line = Vec::new();
        (&mut file)
            .take(MAX_INDEX)
            .read_until(b'\n', &mut line)
            .map_err(io)?;
        let index: StatesIndex = serde_json::from_slice(&line).map_err(|_| damaged())?;
        if index.bytes().and_then(|b| b.checked_add(line.len() as u64)) != Some(length) {
            return Err(damaged());
        }
        let keep = state_storage::<B>(plan);
        let mut stream = |indexed: IndexedStream, step, places: &Places| {
            let named = |name: &String| plan.branches.iter().position(|b| &b.name == name);
            let branches: Option<Vec<_>> = indexed.branches.iter().map(named).collect();
            let mut chunks = indexed.chunks.into_iter();
            let flows =
                iter::from_fn(|| Some(flow::<B>(&mut file, chunks.next()?, keep.half, device)));
            let flows = flows.map(|flow| flow.map_err(io));
            let branches = branches.ok_or_else(damaged)?;
            Stream::new(flows, step, branches, places, scratch, keep)
        };
        let streams = index.streams.into_iter().map(|it| stream(it, 1, places));
        let streams: Vec<Stream<B>> = streams.collect::<Result<_, _>>()?;
        let mut found: Vec<usize> = streams.iter().flat_map(|it| it.branches.clone()).collect();
        found.sort_unstable();
        let dense = index.dense.map(|it| stream(it, plan.dense_step(), places));
        let dense = dense.transpose()?;
        let (compared, own) = index.compared.ok_or_else(damaged)?;
        let mut stream = |it| stream(it, 1, &Places::DEVICE);
        let compared = stream(compared)?;
        let own = own.into_iter().map(stream).collect::<Result<Vec<_>, _>>()?;
        let of_own = own.iter().flat_map(|it: &Stream<B>| it.branches.clone());
        if !found.into_iter().eq(0..plan.branches.len())
            || !of_own.eq(0..plan.branches.len())
            || dense.is_some() != plan.needs_dense()
        {
            return Err(damaged());
        }
        Ok(States {
            streams,
            dense: dense.map(|states| Dense::new(states, plan.dense_step())),
            compared: Some(OutputErrors::new(compared, own)),
        })
    }
}

/// Reads the next chunk of `file`.
fn flow<B: Engine>(
    file: &mut impl Read,
    [windows, tokens, features]: [usize; 3],
    half: Half,
    device: &B::Device,
) -> std::io::Result<Flow<B>> {
    let mut values = B::host_buffer(tokens * features, half, device);
    // The values were written by this machine, in its byte order.
    file.read_exact(bytemuck::cast_slice_mut(values.bits_mut()))?;
    let residual = B::upload(&values, 0, [tokens, features], device);
    Ok(Flow::new(windows, residual))
}

/// Removes the saved states in `output`, except those after block `but`.
pub(crate) fn prune(output: &Path, but: Option<usize>) -> Result<(), FormatError> {
    let io = |e| FormatError::io(output)(e);
    let own = but.map(|layer| path(output, layer));
    for entry in fs::read_dir(output).map_err(io)? {
        let entry = entry.map_err(io)?;
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if ours && Some(entry.path()) != own {
            fs::remove_file(entry.path()).map_err(io)?;
        }
    }
    Ok(())
}

fn path(output: &Path, layer: usize) -> PathBuf {
    output.join(format!("{PREFIX}{layer}"))
}
