//! Commands that run no kernels do not touch the driver and the cached kernels.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use crate::harness::{Scratch, command, medi_tiny, succeeded};

const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n";

/// Returns every file and directory below `dir`, with its time.
fn tree(dir: &Path) -> Vec<(PathBuf, SystemTime)> {
    let mut found = Vec::new();
    let mut paths = vec![dir.to_owned()];
    while let Some(path) = paths.pop() {
        let metadata = fs::metadata(&path).unwrap();
        if metadata.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        found.push((path, metadata.modified().unwrap()));
    }
    found.sort();
    found
}

/// Makes a command with its own cache; the loader prints on standard error which libraries it looks
/// for.
fn watched(cache: &Path, args: &[&str]) -> Command {
    let mut command = command(args);
    command.env("XDG_CACHE_HOME", cache).env("LD_DEBUG", "libs");
    command
}

#[test]
fn commands_that_run_no_kernels_touch_neither_the_driver_nor_the_kept_kernels() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let recipe = recipe.to_str().unwrap();
    let cache = scratch.path("cache");
    // Of another build, of a build unused for years, and of no build at all.
    let kernels = cache.join("gptq/kernels");
    for name in ["0.1.0-1a-2b/sm_90", "0.0.1-3c-4d/sm_80", "mine"] {
        fs::create_dir_all(kernels.join(name)).unwrap();
        fs::write(kernels.join(name).join("kernel.ptx"), "abc").unwrap();
    }
    let used = kernels.join("0.0.1-3c-4d/used");
    fs::write(&used, "").unwrap();
    let used = fs::File::options().write(true).open(used).unwrap();
    used.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let before = tree(&cache);
    let model = medi_tiny();
    for args in [
        &["--help"][..],
        &["--version"],
        &["quantize", "--help"],
        &["completions", "bash"],
        &["plan", recipe],
        &["quantize", recipe, "--dry-run"],
        &["calibration", "show", recipe],
        &["inspect", model.to_str().unwrap()],
        &["quantize", recipe, "--device", "cpu"],
        &["report", scratch.out().to_str().unwrap()],
    ] {
        let output = watched(&cache, args).output().unwrap();
        let loaded = String::from_utf8_lossy(&output.stderr).into_owned();
        succeeded(output);
        assert!(!loaded.contains("libcuda"), "{args:?} loads the driver");
        assert_eq!(tree(&cache), before, "{args:?}");
    }
    // Control: a command that asks for a CUDA device does look for the driver, if the loader
    // reports it.
    let cuda = ["quantize", recipe, "--device", "cuda", "--restart"];
    let output = watched(&cache, &cuda).output().unwrap();
    let loaded = String::from_utf8_lossy(&output.stderr).into_owned();
    if loaded.contains("find library=") {
        assert!(loaded.contains("libcuda"), "{loaded}");
    }
}
