//! Helpers to run the binary, and to make small variations of the bundled model.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// Returns the repository's root; recipes name their inputs relative to it.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Makes a `gptq` command in the repository's root, isolated from the user's cache, token and
/// proxy. Unless `args` name a CUDA device, there is none, so that tests run on the CPU everywhere.
pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().into()).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gptq"));
    if !args
        .iter()
        .any(|arg| arg.to_string_lossy().contains("cuda"))
    {
        command.env("CUDA_VISIBLE_DEVICES", "");
    }
    command
        .args(args)
        .current_dir(root())
        .env("HF_HOME", "/nonexistent")
        .env("NO_PROXY", "*");
    for name in [
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
        "HF_HUB_CACHE",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        "HF_HUB_DOWNLOAD_TIMEOUT",
        // A launcher's, if the tests are started by one.
        "RANK",
        "OMPI_COMM_WORLD_RANK",
        "SLURM_PROCID",
    ] {
        command.env_remove(name);
    }
    command
}

/// Runs `gptq` with these arguments.
pub(crate) fn gptq<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    command(args).output().expect("the binary runs")
}

/// Runs `gptq` and returns its output; panics with its error if it failed.
pub(crate) fn succeed<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    succeeded(gptq(args))
}

/// Returns the output of a run that must have succeeded.
pub(crate) fn succeeded(output: Output) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    stdout
}

/// Runs `gptq`, which must fail with status 1 and one line; returns that line.
pub(crate) fn refuse<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    refused(gptq(args))
}

/// Returns the single line of a run that must have failed.
pub(crate) fn refused(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    // Except warnings, and progress of downloads and, on a busy machine, of long texts.
    let progress =
        |line: &str| line.starts_with("download") || line.contains("% of the text measured");
    let aside = |line: &&str| line.contains("warning:") || progress(line);
    let errors: Vec<&str> = stderr.lines().filter(|line| !aside(line)).collect();
    assert_eq!(errors.len(), 1, "one line: {stderr}");
    assert!(errors[0].starts_with("gptq: "), "{stderr}");
    errors[0].to_owned()
}

/// A scratch directory with a recipe, a copy of the model to damage, and an output directory.
pub(crate) struct Scratch {
    dir: TempDir,
}

impl Scratch {
    pub(crate) fn new() -> Scratch {
        Scratch {
            dir: TempDir::new().expect("a temporary directory"),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn out(&self) -> PathBuf {
        self.path("out")
    }

    /// Copies the bundled model to `model/`, for modification.
    pub(crate) fn copy_model(&self) -> PathBuf {
        let target = self.path("model");
        fs::create_dir(&target).unwrap();
        for entry in fs::read_dir(root().join("tests/models/medi-tiny")).unwrap() {
            let entry = entry.unwrap();
            if entry
                .path()
                .extension()
                .is_some_and(|e| e == "json" || e == "safetensors")
            {
                fs::write(
                    target.join(entry.file_name()),
                    fs::read(entry.path()).unwrap(),
                )
                .unwrap();
            }
        }
        target
    }

    /// Writes a recipe for `model` with a little calibration text: 8 windows of 256 tokens.
    pub(crate) fn recipe(&self, model: &Path, branches: &str) -> PathBuf {
        self.recipe_with(model, "", "", branches)
    }

    /// Does the same with more lines at the top and under `[output]`.
    pub(crate) fn recipe_with(
        &self,
        model: &Path,
        top: &str,
        output: &str,
        branches: &str,
    ) -> PathBuf {
        let path = self.path("recipe.toml");
        let text = format!(
            "{top}\n[model]\nsource = {model:?}\n\
             [calibration]\nsource = \"calibration/wikidoc/wikidoc_patient_information_1000.json\"\n\
             rows = \"0:100\"\nsamples = 8\nseq_len = 256\n\
             [output]\ndir = {:?}\n{output}\n{branches}",
            self.out()
        );
        fs::write(&path, text).unwrap();
        path
    }

    /// Checks that the output directory holds no branch, complete or partial.
    pub(crate) fn assert_nothing_written(&self) {
        let left: Vec<PathBuf> = match fs::read_dir(self.out()) {
            Ok(entries) => entries.map(|e| e.unwrap().path()).collect(),
            Err(_) => Vec::new(),
        };
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

/// Returns the bundled model.
pub(crate) fn medi_tiny() -> PathBuf {
    PathBuf::from("tests/models/medi-tiny")
}

/// Changes bytes of one tensor in a safetensors file, in place.
pub(crate) fn edit_tensor(file: &Path, name: &str, edit: impl FnOnce(&mut [u8])) {
    let mut bytes = fs::read(file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let at = |i: usize| json[name]["data_offsets"][i].as_u64().unwrap() as usize + 8 + header;
    let (start, end) = (at(0), at(1));
    edit(&mut bytes[start..end]);
    fs::write(file, bytes).unwrap();
}

/// Replaces text of the header by other text of the same length.
pub(crate) fn edit_header(file: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len(), "the header keeps its length");
    let mut bytes = fs::read(file).unwrap();
    let at = bytes
        .windows(from.len())
        .position(|w| w == from.as_bytes())
        .expect("it is there");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    fs::write(file, bytes).unwrap();
}
