//! Hidden states saved beside the journal now and then, so that a resumed run need not run all of
//! its finished blocks again: `.gptq-states-N` in the output directory, after block `N`.
//!
//! The file has a line of JSON ([`StatesIndex`]), then every chunk's f16 or bf16 values in order,
//! little-endian; rank 0 writes the chunks of all ranks. Its SHA-256 is recorded in the journal with block `N`, once both are on disk. A
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
use gptq_ranks::{Collective, RankError, RankShare};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::gathered::gather;
use crate::gram::Dense;
use crate::output_errors::OutputErrors;
use crate::scratch::Scratch;
use crate::states::{States, state_storage};
use crate::stream::{Span, Stream};
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
    ranks: &dyn Collective,
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
    let mut index = StatesIndex {
        streams: states.streams.iter().map(of).collect(),
        dense: dense.map(of),
        compared: compared.map(|(dense, own)| (of(dense), own.iter().map(of).collect())),
    };
    let own = serde_json::to_vec(&index).unwrap_or_default();
    for other in ranks.gather(own)?.iter().skip(1) {
        if let Ok(other) = serde_json::from_slice(other) {
            index.add(other);
        }
    }
    let bytes = index.bytes().unwrap_or(u64::MAX);
    let no_room = match ranks.is_root().then(|| disk_space::has_room(plan, bytes)) {
        None | Some(Ok(true)) => None,
        Some(Ok(false)) => Some(format!("no room for {bytes} bytes")),
        Some(Err(error)) => Some(error.to_string()),
    };
    if ranks.broadcast(vec![u8::from(no_room.is_some())])? == [1] {
        return Ok(Err(no_room.unwrap_or_default()));
    }
    let streams: Vec<_> = states.streams.iter().chain(dense).collect();
    if !ranks.is_root() {
        for stream in streams {
            gather(stream, ranks, &mut |_, _| Ok(()))?;
        }
        return Ok(Err("rank 0 saves them".to_owned()));
    }
    let path = path(&plan.output, layer);
    let compared = compared.into_iter();
    let compared = compared.flat_map(|(dense, own)| [dense].into_iter().chain(own));
    let written = write(&path, &index, &streams, compared, ranks, stop);
    if !matches!(written, Ok(Ok(_))) {
        let _ = fs::remove_file(&path);
    }
    Ok(written?.map_err(|error| error.to_string()))
}

/// Returns the file's SHA-256, or the disk's error; fails if the states cannot be read.
fn write<'a, B: Engine>(
    path: &Path,
    index: &StatesIndex,
    streams: &[&'a Stream<B>],
    own: impl Iterator<Item = &'a Stream<B>>,
    ranks: &dyn Collective,
    stop: &AtomicBool,
) -> Result<std::io::Result<String>, RunError> {
    let line = serde_json::to_string(index).expect("an index of plain values always serializes");
    let mut file = HashingFile::create(path)
        .and_then(|mut file| file.add(format!("{line}\n").as_bytes()).map(|()| file));
    // Once something went wrong nothing is written; what other ranks send is taken all the same.
    let mut add = |bits: &[u16]| {
        let Ok(open) = &mut file else { return };
        let added = match stop.load(Ordering::Relaxed) {
            true => Err(ErrorKind::Interrupted.into()),
            false => open.add(le_bytes(bits)),
        };
        if let Err(error) = added {
            file = Err(error);
        }
    };
    for stream in streams {
        gather(stream, ranks, &mut |bits, _| {
            add(&bits);
            Ok(())
        })?;
    }
    for chunk in own.flat_map(|stream| &stream.chunks) {
        add(&chunk.residual()?);
    }
    Ok(file.and_then(|file| file.finish(path)))
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
    /// Adds the chunks of the next rank.
    fn add(&mut self, other: StatesIndex) {
        let own = self.streams.iter_mut().chain(&mut self.dense);
        for (own, other) in own.zip(other.streams.into_iter().chain(other.dense)) {
            own.chunks.extend(other.chunks);
        }
    }

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
    /// States that rank 0 has found, after `layers` blocks.
    pub(crate) fn of_rank_0(layers: usize) -> SavedStates {
        SavedStates {
            layers,
            path: PathBuf::new(),
        }
    }

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

    /// Reads the states, each chunk to its place: rank 0 sends the other ranks theirs.
    ///
    /// # Errors
    /// The states do not belong to `plan`.
    pub(crate) fn read<B: Engine>(
        &self,
        plan: &Plan,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        ranks: &dyn Collective,
        device: &B::Device,
    ) -> Result<States<B>, RunError> {
        let io = |e| FormatError::io(&self.path)(e);
        let damaged = || {
            let path = self.path.clone();
            let reason = "its hidden states are not those of this run".to_owned();
            RunError::from(PlanError::Journal { path, reason })
        };
        let mut file = None;
        let mut line = Vec::new();
        if ranks.is_root() {
            let opened = File::open(&self.path).map_err(io)?;
            let length = opened.metadata().map_err(io)?.len();
            let mut opened = BufReader::new(opened);
            (&mut opened)
                .take(MAX_INDEX)
                .read_until(b'\n', &mut line)
                .map_err(io)?;
            let index: StatesIndex = serde_json::from_slice(&line).map_err(|_| damaged())?;
            if index.bytes().and_then(|b| b.checked_add(line.len() as u64)) != Some(length) {
                return Err(damaged());
            }
            file = Some(opened);
        }
        let line = ranks.broadcast(line)?;
        let index: StatesIndex = serde_json::from_slice(&line).map_err(|_| damaged())?;
        let (keep, hidden) = (state_storage::<B>(plan), plan.config.hidden_size);
        let of = index.streams.first().map_or(0, |it| it.chunks.len());
        let mut stream = |indexed: IndexedStream, step, shared, places: &Places| {
            let named = |name: &String| plan.branches.iter().position(|b| &b.name == name);
            let branches: Option<Vec<_>> = indexed.branches.iter().map(named).collect();
            let branches = branches.ok_or_else(damaged)?;
            // Where each rank's chunks begin, and the last one's end.
            let starts =
                |it: RankShare| (0..=it.size).map(move |rank| (of * rank / it.size).div_ceil(step));
            let starts: Vec<usize> = match shared {
                true => starts(ranks.share()).collect(),
                false => vec![0, indexed.chunks.len()],
            };
            let span = Span {
                first: starts[ranks.share().rank],
                of: indexed.chunks.len(),
            };
            let mut chunks = indexed.chunks.into_iter().enumerate();
            let file = &mut file;
            let flows = iter::from_fn(move || {
                for (at, shape) in chunks.by_ref() {
                    let owner = starts.partition_point(|&start| start <= at) - 1;
                    let flow = brought::<B>(file.as_mut(), shape, owner, ranks, keep.half, device);
                    let flow = flow
                        .transpose()
                        .map(|it| it.map_err(|error| error.of(&self.path)));
                    if flow.is_some() {
                        return flow;
                    }
                }
                None
            });
            Stream::new(flows, (span, hidden), step, branches, places, scratch, keep)
        };
        let streams = index
            .streams
            .into_iter()
            .map(|it| stream(it, 1, true, places));
        let streams: Vec<Stream<B>> = streams.collect::<Result<_, _>>()?;
        let mut found: Vec<usize> = streams.iter().flat_map(|it| it.branches.clone()).collect();
        found.sort_unstable();
        let dense = index
            .dense
            .map(|it| stream(it, plan.dense_step(), true, places));
        let dense = dense.transpose()?;
        if !found.into_iter().eq(0..plan.branches.len()) || dense.is_some() != plan.needs_dense() {
            return Err(damaged());
        }
        let mut compared = None;
        if ranks.is_root() {
            let (dense, own) = index.compared.ok_or_else(damaged)?;
            let mut stream = |it| stream(it, 1, false, &Places::DEVICE);
            let dense = stream(dense)?;
            let own = own.into_iter().map(stream).collect::<Result<Vec<_>, _>>()?;
            let of_own = own.iter().flat_map(|it: &Stream<B>| it.branches.clone());
            if !of_own.eq(0..plan.branches.len()) {
                return Err(damaged());
            }
            compared = Some(OutputErrors::new(dense, own));
        }
        Ok(States {
            streams,
            dense: dense.map(|states| Dense::new(states, plan.dense_step())),
            compared,
        })
    }
}
/// Brings the next chunk to the rank that owns it: reads it from `file` on rank 0; `None` on other ranks than the owner.
fn brought<B: Engine>(
    file: Option<&mut BufReader<File>>,
    [windows, tokens, features]: [usize; 3],
    owner: usize,
    ranks: &dyn Collective,
    half: Half,
    device: &B::Device,
) -> Result<Option<Flow<B>>, BringError> {
    let own = ranks.share().rank == owner;
    if file.is_none() && !own {
        return Ok(None);
    }
    let mut values = B::host_buffer(tokens * features, half, device);
    // The values were written by this program's run, in the byte order of little-endian machines.
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(values.bits_mut());
    match file {
        Some(file) => file.read_exact(bytes).map_err(BringError::File)?,
        None => {
            let found = ranks.receive(0)?;
            if found.len() != bytes.len() {
                let (found, wanted) = (found.len(), bytes.len());
                return Err(RankError::Length {
                    from: 0,
                    found,
                    wanted,
                }
                .into());
            }
            bytes.copy_from_slice(&found);
        }
    }
    if !own {
        ranks.send(owner, bytes.to_vec())?;
        return Ok(None);
    }
    let residual = B::upload(&values, 0, [tokens, features], device);
    Ok(Some(Flow::new(windows, residual)))
}

/// Reasons that a chunk is not brought to its rank.
enum BringError {
    File(std::io::Error),
    Ranks(RankError),
}

impl From<RankError> for BringError {
    fn from(error: RankError) -> Self {
        BringError::Ranks(error)
    }
}

impl BringError {
    fn of(self, path: &Path) -> RunError {
        match self {
            BringError::File(error) => FormatError::io(path)(error).into(),
            BringError::Ranks(error) => error.into(),
        }
    }
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
