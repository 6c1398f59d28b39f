//! Signals: a run stops where it can be resumed; other commands end at once and leave files
//! unchanged. Status 130 or 143.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{Scratch, command, medi_tiny, root, succeed, succeeded};
use crate::resume::{SLOW, TWO, assert_same, blocks, quantize, signal, start, uninterrupted, wait};

/// Returns every file below `dir`, except locks: those of dead processes have no effect.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false if path.ends_with(".gptq-lock") => {}
            false => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    found
}

/// Returns true if the process handles SIGINT: the mask of caught signals in `/proc` has bit 1.
fn listens(child: &Child) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 2 != 0)
}

/// Starts the command, and sends it each signal in turn while it is at work.
fn ends_at_once(what: &str, make: impl Fn() -> Command, scratch: &Scratch) {
    let before = files(&scratch.path(""));
    for (name, status, after) in [("INT", 130, 0), ("TERM", 143, 100), ("INT", 130, 400)] {
        let mut command = make();
        // One end of the input pipe stays open, so a conversation would continue.
        let streams = command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = streams.stderr(Stdio::null()).spawn().unwrap();
        wait("signals", || listens(&child));
        std::thread::sleep(Duration::from_millis(after));
        let asked = Instant::now();
        signal(&child, &[name]);
        let input = child.stdin.take();
        let ended = child.wait().unwrap();
        drop(input);
        assert_eq!(ended.code(), Some(status), "{what}, {name}");
        assert!(asked.elapsed() < Duration::from_secs(2), "{what}, {name}");
        assert!(files(&scratch.path("")) == before, "{what} left something");
    }
}

#[test]
fn a_signal_ends_any_other_command_at_once_and_leaves_files_as_they_were() {
    let scratch = Scratch::new();
    let one = "[[branch]]\nname = \"main\"\nbits = 4\n";
    let recipe = scratch.recipe(&medi_tiny(), one);
    succeed(["quantize", recipe.to_str().unwrap(), "--samples", "2"]);
    let out = scratch.out();
    let dir = out.join("main");
    let text = "tests/data/eval_wikidoc_40.json";
    // More text than is tokenized in that time.
    let rows = "calibration/wikidoc/wikidoc_patient_information_1000.json";
    let rows = fs::read_to_string(root().join(rows)).unwrap();
    let line = serde_json::json!({ "text": rows.repeat(8) }).to_string() + "\n";
    let long = scratch.path("long.jsonl");
    fs::write(&long, line.repeat(4)).unwrap();
    // Accepts connections and never answers.
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", hub.local_addr().unwrap());

    let verify = || {
        let mut verify = command(["verify", "--text", text, "--window", "128", "--against"]);
        verify.arg(medi_tiny()).arg(&dir);
        verify
    };
    ends_at_once("verify", verify, &scratch);
    let generate = || {
        // All tokens are as likely as the end token: generation continues.
        let even = ["--temperature", "1000", "--top-p", "1", "--top-k", "0"];
        let mut generate = command(["generate", "--prompt", "What", "--max-new-tokens", "2000"]);
        generate.args(even);
        generate.arg(&dir);
        generate
    };
    ends_at_once("generate", generate, &scratch);
    let chat = || {
        let mut chat = command(["generate", "--chat"]);
        chat.arg(&dir);
        chat
    };
    ends_at_once("generate --chat", chat, &scratch);
    let publish = || {
        let mut publish = command(["publish", "--repo", "me/x", "--unverified"]);
        (publish.arg(&out).env("HF_ENDPOINT", &url)).env("HF_TOKEN", "hf_x");
        publish
    };
    ends_at_once("publish", publish, &scratch);
    let flags = ["--column", "text", "--rows", "0:4", "--calibration"];
    let show = || {
        let mut show = command(["calibration", "show"]);
        show.arg(&recipe).args(flags).arg(&long);
        show
    };
    ends_at_once("calibration show", show, &scratch);
    let again = || {
        let mut again = command(["requantize"]);
        again.arg(&out).args(flags).arg(&long);
        again
    };
    ends_at_once("requantize, while it reads", again, &scratch);

    // Even when killed, each file is complete or missing.
    let mut child = verify().stdout(Stdio::null()).spawn().unwrap();
    wait("signals", || listens(&child));
    let before = files(&out);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(files(&out) == before);
}

#[test]
fn a_signal_stops_a_run_so_that_it_can_go_on() {
    let (expected, _) = uninterrupted(TWO, &SLOW);
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    let stopped = |name: &str, status: i32| -> Output {
        let before = blocks(&scratch.out());
        let child = start(quantize(&recipe, &SLOW));
        wait("a block", || blocks(&scratch.out()) > before);
        let asked = Instant::now();
        signal(&child, &[name]);
        let output = child.wait_with_output().unwrap();
        assert!(
            asked.elapsed() < Duration::from_secs(5),
            "{:?}",
            asked.elapsed()
        );
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("resumes from there"), "{said}");
        output
    };
    stopped("INT", 130);
    stopped("TERM", 143);
    succeeded(quantize(&recipe, &SLOW).output().unwrap());
    assert_same(&scratch.out(), &expected);
}

#[test]
fn a_second_signal_ends_a_run_at_once_and_one_before_the_first_block_leaves_nothing() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    let begun = || {
        let child = start(quantize(&recipe, &SLOW));
        wait("the journal", || {
            scratch.out().join(".gptq-journal.jsonl").exists()
        });
        child
    };
    let child = begun();
    signal(&child, &["INT"]);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("nothing was written"), "{said}");
    scratch.assert_nothing_written();

    let child = begun();
    signal(&child, &["INT", "TERM"]);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // Of two pending signals the system may deliver either last.
    assert!(matches!(output.status.code(), Some(130 | 143)), "{said}");
    assert!(said.is_empty(), "it took its leave: {said}");
}
