//! Moments that no random kill hits: between the last block and the last directory, and while
//! hidden states are saved.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gptq_kernels::Device;
use gptq_plan::{FetchedInputs, Plan, Recipe};
use gptq_ranks::OneRank;
use gptq_run::{Event, RunError, RunOptions, quantize};
use safetensors::SafeTensors;
use tempfile::TempDir;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
const LINEARS: usize = 21;

fn plan(out: &Path, bits: u32) -> Plan {
    let text = format!(
        "[model]\nsource = \"{REPOSITORY}/tests/models/medi-tiny\"\n\
         [calibration]\nsource = \"{REPOSITORY}/calibration/wikidoc/wikidoc_patient_information_1000.json\"\n\
         rows = \"0:20\"\nsamples = 2\nseq_len = 64\n[output]\ndir = {out:?}\n\
         [[branch]]\nname = \"a\"\nbits = {bits}\n[[branch]]\nname = \"b\"\nbits = 8\n"
    );
    let recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
    Plan::new(&recipe, &FetchedInputs::default()).unwrap()
}

/// Runs until `stops` returns true.
fn run(plan: &Plan, restart: bool, stops: impl FnMut(&Event<'_>) -> bool) -> Result<(), RunError> {
    run_keeping(Duration::MAX, plan, restart, stops)
}

fn run_keeping(
    keep_every: Duration,
    plan: &Plan,
    restart: bool,
    mut stops: impl FnMut(&Event<'_>) -> bool,
) -> Result<(), RunError> {
    let stop = AtomicBool::new(false);
    let options = RunOptions {
        profile: false,
        device_memory: None,
        host_memory: None,
        scratch: None,
        save_every: keep_every,
        restart,
        stop: &stop,
    };
    let ended = quantize(plan, Device::Cpu, &OneRank, options, &mut |event| {
        if stops(&event) {
            stop.store(true, Ordering::Relaxed);
        }
    });
    ended.map(|_| ())
}

/// Stops after the last linear layer of the last branch: its block is in the journal, but no
/// directory is in place.
fn after_the_last_block() -> impl FnMut(&Event<'_>) -> bool {
    let mut linears = 0;
    move |event| {
        linears += usize::from(matches!(event, Event::Linear { .. }));
        linears == 2 * LINEARS
    }
}

fn weights(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let file = |name: &str| out.join(name).join("model.safetensors");
    let read = |name| fs::read(file(name)).map(|bytes| (PathBuf::from(name), bytes));
    ["a", "b"].map(read).into_iter().flatten().collect()
}

fn uninterrupted(bits: u32) -> BTreeMap<PathBuf, Vec<u8>> {
    let dir = TempDir::new().unwrap();
    run(&plan(dir.path(), bits), false, |_| false).unwrap();
    weights(dir.path())
}

fn names(out: &Path) -> Vec<String> {
    let entries = fs::read_dir(out).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn what_was_changed_after_the_last_block_is_refused_and_what_was_not_is_put_in_place() {
    let dir = TempDir::new().unwrap();
    let (out, plan) = (dir.path(), plan(dir.path(), 4));
    let ended = run(&plan, false, after_the_last_block());
    assert!(matches!(ended, Err(RunError::Stopped { .. })), "{ended:?}");
    assert_eq!(
        names(out),
        [".gptq-journal.jsonl", "a.partial", "b.partial"]
    );

    let file = out.join("b.partial/model.safetensors");
    let whole = fs::read(&file).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&whole).unwrap();
    let codes = metadata
        .info("model.layers.1.mlp.down_proj.qweight")
        .unwrap();
    let mut damaged = whole.clone();
    damaged[8 + header + codes.data_offsets.0] ^= 1;
    fs::write(&file, damaged).unwrap();
    let error = run(&plan, false, |_| false).unwrap_err().to_string();
    assert!(
        error.contains("is not what was written") && error.contains("--restart"),
        "{error}"
    );
    assert!(weights(out).is_empty());

    fs::write(&file, whole).unwrap();
    run(&plan, false, |_| false).unwrap();
    assert_eq!(names(out), ["a", "b"]);
    assert!(weights(out) == uninterrupted(4));
}

#[test]
fn a_run_that_ends_between_two_directories_makes_only_the_second_when_it_goes_on() {
    let dir = TempDir::new().unwrap();
    let (out, plan) = (dir.path(), plan(dir.path(), 4));
    let first = |event: &Event<'_>| matches!(event, Event::Finished { branch: 0, .. });
    assert!(run(&plan, false, first).is_err());
    assert_eq!(names(out), [".gptq-journal.jsonl", "a", "b.partial"]);
    let made = fs::metadata(out.join("a/model.safetensors"))
        .unwrap()
        .modified()
        .unwrap();
    run(&plan, false, |_| false).unwrap();
    assert_eq!(names(out), ["a", "b"]);
    assert_eq!(
        fs::metadata(out.join("a/model.safetensors"))
            .unwrap()
            .modified()
            .unwrap(),
        made
    );
    assert!(weights(out) == uninterrupted(4));
}

#[test]
fn a_restart_that_is_stopped_goes_on_over_the_branches_that_it_replaces() {
    let expected = uninterrupted(3);
    for moment in 0..3 {
        let mut last = after_the_last_block();
        let stops = move |event: &Event<'_>| match moment {
            0 => matches!(event, Event::Linear { report, .. } if report.layer == 1),
            1 => last(event),
            _ => matches!(event, Event::Finished { branch: 0, .. }),
        };
        let dir = TempDir::new().unwrap();
        run(&plan(dir.path(), 4), false, |_| false).unwrap();
        let old = weights(dir.path());
        let changed = plan(dir.path(), 3);
        let refused = run(&changed, false, |_| false).unwrap_err().to_string();
        assert!(refused.contains("bits was 4, is 3"), "{refused}");
        assert!(run(&changed, true, stops).is_err());
        // Until then the old branches are in place.
        let b = Path::new("b");
        assert!(weights(dir.path())[b] == old[b]);
        let mut made = 0;
        run(&changed, false, |event| {
            made += usize::from(matches!(event, Event::Resumed { .. }));
            false
        })
        .unwrap();
        assert_eq!(made, 1, "it goes on");
        assert_eq!(names(dir.path()), ["a", "b"]);
        assert!(weights(dir.path()) == expected);
    }
}

#[test]
fn hidden_states_that_cannot_be_written_end_no_run() {
    let dir = TempDir::new().unwrap();
    let out = dir.path();
    let taken = |layer: usize| out.join(format!(".gptq-states-{layer}"));
    let (mut begun, mut reasons) = (false, Vec::new());
    let ended = run_keeping(Duration::ZERO, &plan(out, 4), false, |event| {
        match event {
            // A directory in the place of the file.
            Event::Linear { .. } if !begun => {
                fs::create_dir(taken(0)).unwrap();
                begun = true;
            }
            Event::StatesNotSaved { layers, why } => {
                reasons.push(why.to_string());
                fs::remove_dir(taken(layers - 1)).unwrap();
            }
            _ => {}
        }
        false
    });
    ended.unwrap();
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert_eq!(names(out), ["a", "b"]);
    assert!(weights(out) == uninterrupted(4));
}
