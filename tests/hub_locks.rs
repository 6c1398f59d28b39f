//! The shared cache's locks, as used by huggingface_hub's `WeakFileLock` and hf-hub: `flock` of
//! `.locks/{repository}/{etag}.lock`, the etag being git's hash of a small file and the SHA-256 of
//! a large one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{Scratch, command, medi_tiny, refused, root, succeeded};
use crate::hub::{MODEL, ONE, hub};
use crate::hub_bytes::{git_oid, sha256};
use crate::hub_server::{HubServer, Wrong};

const REPO: &str = "models--medi--tiny";

/// Makes a `quantize` command for the model on the Hub.
fn quantize(scratch: &Scratch, hub: &HubServer, seconds: &str) -> Command {
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let mut command = command(["quantize", recipe.to_str().unwrap()]);
    command
        .env("HF_HOME", scratch.path("hf"))
        .env("HF_ENDPOINT", hub.url())
        .env("HF_HUB_DOWNLOAD_TIMEOUT", seconds)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Returns the bytes of a file of the model.
fn bytes(name: &str) -> Vec<u8> {
    fs::read(root().join(medi_tiny()).join(name)).unwrap()
}

/// Locks a content as another tool does.
fn hold(scratch: &Scratch, etag: &str) -> File {
    let locks = scratch.path("hf/hub/.locks").join(REPO);
    fs::create_dir_all(&locks).unwrap();
    let lock = File::create(locks.join(format!("{etag}.lock"))).unwrap();
    lock.lock().unwrap();
    lock
}

fn blob(scratch: &Scratch, etag: &str) -> PathBuf {
    scratch.path("hf/hub").join(REPO).join("blobs").join(etag)
}

/// Waits until a condition holds; panics after a timeout.
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_file_whose_lock_another_process_has_is_waited_for_and_taken_from_it() {
    let (scratch, hub) = (Scratch::new(), hub());
    let config = bytes("config.json");
    let etag = git_oid(&config);
    let lock = hold(&scratch, &etag);
    let running = quantize(&scratch, &hub, "60").spawn().unwrap();
    wait_until("other files come meanwhile", || {
        blob(&scratch, &git_oid(&bytes("tokenizer_config.json"))).is_file()
    });
    assert!(!blob(&scratch, &etag).exists());
    // The other process finishes.
    fs::write(blob(&scratch, &etag), &config).unwrap();
    drop(lock);
    succeeded(running.wait_with_output().unwrap());
    let asked = hub.requests().join("\n");
    assert!(!asked.contains("/config.json"), "it was there: {asked}");
}

#[test]
fn a_large_file_gets_its_place_under_the_lock_of_its_own_name() {
    let (scratch, hub) = (Scratch::new(), hub());
    let etag = sha256(&bytes("model.safetensors"));
    let lock = hold(&scratch, &etag);
    // The holder of the lock makes no progress: reported, and partial downloads are kept.
    let line = refused(quantize(&scratch, &hub, "1").output().unwrap());
    assert!(line.contains(&format!("{etag}.lock")), "{line}");
    assert!(
        line.contains("another process") && line.contains("run again"),
        "{line}"
    );
    assert!(!blob(&scratch, &etag).exists());
    scratch.assert_nothing_written();
    drop(lock);
    hub.requests();
    succeeded(quantize(&scratch, &hub, "60").output().unwrap());
    assert!(blob(&scratch, &etag).is_file());
    let asked = hub.requests().join("\n");
    assert!(!asked.contains("/cdn/"), "it had come already: {asked}");
}

#[test]
fn what_is_checked_is_the_file_and_not_what_came_over_the_wire() {
    let (scratch, hub) = (Scratch::new(), hub());
    let weights = bytes("model.safetensors");
    hub.fail("cdn", 1, Wrong::Stall(100_000));
    let running = quantize(&scratch, &hub, "3").spawn().unwrap();
    let begun = || {
        let blobs = fs::read_dir(scratch.path("hf/hub").join(REPO).join("blobs"));
        let mut blobs = blobs
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        blobs.find(|path| {
            let part = path.extension().is_some_and(|e| e == "incomplete");
            part && fs::metadata(path).is_ok_and(|meta| meta.len() == 100_000)
        })
    };
    let mut part = None;
    wait_until("the download stalls", || {
        part = begun();
        part.is_some()
    });
    // Another process has the same file open and writes to it.
    let file = File::options().write(true).open(part.unwrap()).unwrap();
    file.write_all_at(&[!weights[5000]], 5000).unwrap();
    succeeded(running.wait_with_output().unwrap());
    let there = fs::read(blob(&scratch, &sha256(&weights))).unwrap();
    assert!(there == weights, "the cache has other bytes than the Hub");
}
