//! Runs on several CUDA devices, through the binary. Without two devices the tests of two print that they were skipped, and
//! pass; refusals are tested on any machine.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use gptq_kernels::Device;

use crate::harness::{Scratch, gptq, medi_tiny, refused, succeeded};
use crate::ranks::{Launched, all_end, outputs};
use crate::resume::{assert_same, blocks, contents, quantize, wait};

/// A chunk of 16384 tokens for each of eight ranks.
const WINDOWS: [&str; 6] = ["--rows", "0:1000", "--samples", "128", "--seq-len", "1024"];
const BRANCHES: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\npreset = \"standard\"\n\
                        [[branch]]\nname = \"b\"\nbits = 3\npreset = \"best\"\n";
/// Twelve branches, so that a run lasts long enough to be killed in its midst.
const MANY: usize = 12;

fn two_devices() -> bool {
    let there = Device::Cuda(1).resolve().is_ok();
    if !there {
        println!("skipped: needs 2 CUDA devices");
    }
    there
}

fn on(device: &str, recipe: &Path) -> Command {
    quantize(recipe, &[&WINDOWS[..], &["--device", device]].concat())
}

fn many() -> String {
    let branch = |at| {
        let bits = [2, 3, 4, 8][at % 4];
        format!(
            "[[branch]]\nname = \"b{at}\"\nbits = {bits}\ndamp_percent = 0.{}\n",
            at + 1
        )
    };
    (0..MANY).map(branch).collect()
}

#[test]
fn two_devices_give_the_files_of_one() {
    if !two_devices() {
        return;
    }
    let run = |device| {
        let scratch = Scratch::new();
        let recipe = scratch.recipe(&medi_tiny(), BRANCHES);
        let said = succeeded(on(device, &recipe).arg("--profile").output().unwrap());
        (scratch, said)
    };
    let (one, _) = run("cuda:0");
    let expected = contents(&one.out());
    for device in ["cuda:0,1", "cuda:1,0"] {
        let (two, said) = run(device);
        assert!(said.contains("rank 1") && said.contains("send"), "{said}");
        assert_same(&two.out(), &expected);
    }
}

#[test]
fn processes_on_two_devices_give_the_files_of_one() {
    if !two_devices() {
        return;
    }
    let (one, two) = (Scratch::new(), Scratch::new());
    let recipe = one.recipe(&medi_tiny(), BRANCHES);
    succeeded(on("cuda:0", &recipe).output().unwrap());
    let recipe = two.recipe(&medi_tiny(), BRANCHES);
    let flags = [&WINDOWS[..], &["--device", "cuda"]].concat();
    for output in outputs(Launched::of(2).start(&recipe, &flags)) {
        succeeded(output);
    }
    assert_same(&two.out(), &contents(&one.out()));
}

#[test]
fn a_rank_of_two_devices_that_is_killed_ends_all_and_the_run_goes_on_with_one() {
    if !two_devices() {
        return;
    }
    let (one, scratch) = (Scratch::new(), Scratch::new());
    let recipe = one.recipe(&medi_tiny(), &many());
    succeeded(on("cuda:0", &recipe).output().unwrap());
    let (recipe, out) = (scratch.recipe(&medi_tiny(), &many()), scratch.out());
    let flags = [&WINDOWS[..], &["--device", "cuda"]].concat();
    let mut ranks = Launched::of(2).start(&recipe, &flags);
    wait("a block", || blocks(&out) > 0);
    ranks[1].kill().unwrap();
    all_end(ranks, 1, Instant::now(), &["rank 1 on ", "it is gone"]);
    let said = succeeded(on("cuda:0", &recipe).output().unwrap());
    assert!(said.contains("resuming"), "{said}");
    assert_same(&out, &contents(&one.out()));
}

#[test]
fn two_processes_with_one_device_are_refused_by_name() {
    if Device::Cuda(0).resolve().is_err() {
        println!("skipped: no CUDA device");
        return;
    }
    if Device::Cuda(1).resolve().is_ok() {
        println!("skipped: there is more than one CUDA device");
        return;
    }
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), BRANCHES);
    let started = Instant::now();
    let flags = [&WINDOWS[..], &["--device", "cuda"]].concat();
    for output in outputs(Launched::of(2).start(&recipe, &flags)) {
        let line = refused(output);
        assert!(
            line.contains("ranks 0 and 1 have the same device of "),
            "{line}"
        );
    }
    assert!(started.elapsed() < Duration::from_secs(30));
    scratch.assert_nothing_written();
}

#[test]
fn devices_that_cannot_share_a_run_are_refused_by_name() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), BRANCHES);
    let recipe = recipe.to_str().unwrap();
    for (device, part) in [
        ("cuda:0,0", "cuda:0 is listed twice; name each device once"),
        ("cuda:0,", "is not a list of devices"),
    ] {
        let output = gptq(["quantize", recipe, "--device", device]);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(part), "{said}");
    }
    for (flags, part) in [
        (
            &["--device", "cuda:0,1,2"][..],
            "3 ranks cannot share a run; 1, 2, 4 and 8 can",
        ),
        (
            &["--device", "cuda:0,1", "--ranks", "2"],
            "leave --ranks out",
        ),
    ] {
        let line = refused(gptq([&["quantize", recipe][..], flags].concat()));
        assert!(line.contains(part), "{line}");
    }
    let far = gptq(["quantize", recipe, "--device", "cuda:90,91"]);
    let line = refused(far);
    let parts = ["no CUDA device", "cuda:90: there are "];
    assert!(parts.iter().any(|part| line.contains(part)), "{line}");
    scratch.assert_nothing_written();
}
