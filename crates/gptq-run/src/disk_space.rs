//! Checks the disk space for the output of a run.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use gptq_format::FormatError;
use gptq_plan::{BranchFiles, Plan};

use crate::RunError;

/// Space besides the tensors: headers, the tokenizer's files, reports, the journal.
const BESIDE: u64 = 8 << 20;

/// Compares the space that the branches of `plan` still need, and `states` bytes of hidden states
/// in `scratch` (by default beside the branches), with the free space.
///
/// [`PipelineError::DiskSpace`], or a directory that cannot be read.
/// [`RunError::DiskSpace`], or a directory that cannot be looked at.
pub(crate) fn check(plan: &Plan, scratch: Option<&Path>, states: u64) -> Result<(), RunError> {
    let (dir, needed) = (&plan.output, missing(plan));
    match scratch {
        None => room(dir, needed.saturating_add(states)),
        Some(scratch) => room(dir, needed).and_then(|()| room(scratch, states)),
    }
}

/// Returns true if `bytes` more would leave space for the remaining output of `plan`.
pub(crate) fn has_room(plan: &Plan, bytes: u64) -> Result<bool, FormatError> {
    Ok(free(&plan.output)? >= missing(plan).saturating_add(bytes))
}

/// Returns the bytes that the branches of `plan` still need.
fn missing(plan: &Plan) -> u64 {
    let dir = &plan.output;
    let bytes = plan
        .branches
        .iter()
        .map(|b| BranchFiles::of(b, &plan.config).bytes());
    let bytes = bytes.fold(BESIDE, u64::saturating_add);
    let there = plan.branches.iter().map(|branch| {
        let name = format!("{}.partial", branch.name);
        allocated(&dir.join(name))
    });
    bytes.saturating_sub(there.sum())
}

fn room(dir: &Path, needed: u64) -> Result<(), RunError> {
    let free = free(dir)?;
    match free < needed {
        true => Err(RunError::DiskSpace {
            dir: dir.into(),
            needed,
            free,
        }),
        false => Ok(()),
    }
}

/// Returns the free bytes on the file system of `dir`, for the current user.
fn free(dir: &Path) -> Result<u64, FormatError> {
    let found = rustix::fs::statvfs(dir).map_err(|e| FormatError::io(dir)(e.into()))?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Returns the allocated bytes of the files in `dir`; a sparse file has fewer than its length.
fn allocated(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let metas = entries.filter_map(|entry| entry.ok()?.metadata().ok());
    metas.map(|meta| meta.blocks().saturating_mul(512)).sum()
}
