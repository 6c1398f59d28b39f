//! What the fuzz targets share: opening a checkpoint of given files, and `gptq-model`'s reading of
//! `config.json` without Burn, which would take minutes to build with instrumentation.

#[path = "../../crates/gptq-model/src/config.rs"]
mod config;
#[path = "../../crates/gptq-model/src/error.rs"]
mod error;
#[path = "../../crates/gptq-model/src/layout.rs"]
mod layout;

use std::fs;

use gptq_format::Checkpoint;
use tempfile::TempDir;

pub use config::ModelConfig;
pub use error::ModelError;
pub use layout::{Projection, Stage};

thread_local! {
    static DIR: TempDir = TempDir::new().expect("a temporary directory");
}

/// Most elements of a tensor that are gathered: a view with strides of 0 may claim any number.
const MAX_ELEMENTS: usize = 1 << 16;

/// Opens a directory with these files as a checkpoint, and touches every byte of every tensor.
pub fn open(files: &[(&str, &[u8])]) {
    DIR.with(|dir| {
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).expect("temporary files can be written");
        }
        let Ok(checkpoint) = Checkpoint::open(dir.path()) else {
            return;
        };
        for name in checkpoint.names() {
            let view = checkpoint.view(name).expect("it was listed");
            if view.elements() <= MAX_ELEMENTS {
                let bytes = view.bytes();
                assert_eq!(bytes.len(), view.elements() * view.dtype.bitsize() / 8);
                let _ = checkpoint.f16(name, view.shape);
            }
        }
    });
}
