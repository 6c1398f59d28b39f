//! The one error type of this crate.

use std::path::PathBuf;

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use gptq_kernels::{DeviceError, SolveError};
use gptq_model::ModelError;
use thiserror::Error;

use crate::{Overflow, RecipeError};

/// Why a run could not be planned or finished.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PipelineError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(
        "the device memory budget is {budget} bytes, and this run needs at least {needed}; give \
         more with --device-memory, shorten the windows with --seq-len, or use --device cpu"
    )]
    DeviceMemory { needed: u64, budget: u64 },
    #[error(
        "the host memory budget is {budget} bytes, and this run needs at least {needed}; give more \
         with --host-memory, or shorten the windows with --seq-len"
    )]
    HostMemory { needed: u64, budget: u64 },
    #[error(
        "{source}, with a budget of {budget} bytes; a smaller --device-memory keeps more hidden \
         states on the host"
    )]
    OutOfDeviceMemory { source: DeviceError, budget: u64 },
    #[error(
        "{}: made with something else ({difference}); --restart makes it again, or choose another \
         output directory", dir.display()
    )]
    Finished { dir: PathBuf, difference: String },
    #[error(
        "{}: an unfinished run is here, begun with something else ({difference}); --restart begins \
         anew, or choose another output directory", dir.display()
    )]
    Unfinished { dir: PathBuf, difference: String },
    #[error("{}: no unfinished run is here that could go on", dir.display())]
    NothingUnfinished { dir: PathBuf },
    #[error(
        "{}: not a journal that can be gone on from: {reason}; --restart begins anew", path.display()
    )]
    Journal { path: PathBuf, reason: String },
    #[error(
        "{}: {needed} bytes are needed here and {free} are free; make room, or choose another directory", dir.display()
    )]
    DiskSpace {
        dir: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("stopped {}", progress(*done, *layers))]
    Stopped { done: usize, layers: usize },
    #[error("branch {branch}, {modules}: {source}")]
    Solver {
        branch: String,
        modules: String,
        source: Box<SolveError>,
    },
    #[error("branch {branch}, {modules}: {source}")]
    HiddenStates {
        branch: String,
        modules: String,
        source: Overflow,
    },
    #[error(
        "branch {branch}, {modules}: the Hessian is not positive definite below damping {needed}, and \
         [numerics] max_damping is {most}; use more calibration tokens or allow more"
    )]
    Damping {
        branch: String,
        modules: String,
        needed: f64,
        most: f64,
    },
}

fn progress(done: usize, layers: usize) -> String {
    match done {
        0 => "before the first block was finished; nothing is left behind".to_owned(),
        _ => format!("after block {done} of {layers}; the same command goes on from there"),
    }
}
