//! Parts that the fuzz targets share: checkpoints, rows, reports and models of given bytes.

use std::fs;
use std::ops::ControlFlow;
use std::panic;
use std::path::Path;
use std::sync::Once;

use gptq_calibration::Source;
use gptq_format::{Checkpoint, Half};
use gptq_report::{CardSettings, Matrix, PromptTemplate, card, csv, facts, html, rows};
use gptq_spec::ModelConfig;
use tempfile::TempDir;

thread_local! {
    static DIR: TempDir = TempDir::new().expect("a temporary directory");
}

/// Maximum number of elements gathered from a tensor: a view with strides of 0 may declare any
/// number.
const MAX_ELEMENTS: usize = 1 << 16;

/// Maximum number of rows read.
const MAX_ROWS: usize = 1 << 12;

/// Calls `read` with a directory that contains only these files.
pub fn with_files(files: &[(&str, &[u8])], read: impl FnOnce(&Path)) {
    DIR.with(|dir| {
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).expect("temporary files can be written");
        }
        read(dir.path());
        for (name, _) in files {
            fs::remove_file(dir.path().join(name)).expect("it was written");
        }
    });
}

/// Opens a directory with these files as a checkpoint, and reads every byte of every tensor.
pub fn open(files: &[(&str, &[u8])]) {
    with_files(files, |dir| {
        let Ok(checkpoint) = Checkpoint::open(dir) else {
            return;
        };
        for name in checkpoint.names() {
            let view = checkpoint.view(name).expect("it was listed");
            if view.elements() <= MAX_ELEMENTS {
                let bytes = view.bytes();
                assert_eq!(bytes.len(), view.elements() * view.dtype.bitsize() / 8);
                for half in [Half::F16, Half::Bf16] {
                    let _ = checkpoint.check_halves(half, name, view.shape);
                }
            }
        }
    });
}

/// Allows readers to catch panics of a library: libFuzzer's hook would end the process first. A
/// panic that is not caught still ends it.
pub fn panics_may_be_caught() {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| panic::set_hook(Box::new(|_| ())));
}

/// Reads these bytes as the `report.json` of a branch directory, and the bytes after a zero byte as
/// its `verify.json`; renders the page, the table and the card.
pub fn report(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |&byte| byte == 0);
    let report = parts.next().unwrap_or_default();
    let mut files = vec![("report.json", report), ("config.json", &b"{}"[..])];
    files.extend(parts.next().map(|receipt| ("verify.json", receipt)));
    with_files(&files, |dir| {
        let Ok(matrix) = Matrix::read(dir) else {
            return;
        };
        assert!(!csv(&rows(&matrix)).is_empty());
        html(&matrix).expect("whatever was read can be drawn");
        let settings = CardSettings {
            repo: "user/name".to_owned(),
            prompt: PromptTemplate {
                own: false,
                name: "plain".to_owned(),
                text: "{prompt}".to_owned(),
            },
            base_card: None,
            base_model: None,
            dataset: None,
            license: None,
            language: None,
        };
        let facts = facts(&matrix, &settings).expect("the repository has a name");
        card(&facts, None).expect("whatever was read can be written about");
    });
}

/// Reads the rows of a file of this name, with the columns of the starting inputs.
pub fn calibration_rows(name: &str, file: &[u8]) {
    if name.ends_with(".parquet") || name.ends_with(".arrow") {
        panics_may_be_caught();
    }
    with_files(&[(name, file)], |dir| {
        let mut rows = 0;
        let source = Source::Local(dir.join(name));
        let _ = source.rows(&["input", "output"], &mut |_| {
            rows += 1;
            Ok(match rows < MAX_ROWS {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            })
        });
    });
}

/// Returns the shapes of a model of two blocks.
pub fn small_model() -> ModelConfig {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 100,
    });
    ModelConfig::from_json(config).expect("the shapes are sound")
}
