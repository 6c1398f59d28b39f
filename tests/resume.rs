//! Runs that are killed, stopped, out of space or repeated: nothing is lost or done twice, and the
//! bytes equal those of an uninterrupted run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Scratch, command, medi_tiny, refuse, refused, succeed, succeeded};

pub(crate) const TWO: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n\
                   [[branch]]\nname = \"b\"\nbits = 3\ntrue_sequential = false\n\
                   [[branch.override]]\nmatch = \"*.1.self_attn.o_proj\"\nskip = true\n";
/// A branch that compares its hidden states with the dense model's, and is tuned, beside one that does neither.
const TUNED: &str = "[[branch]]\nname = \"a\"\nbits = 3\npreset = \"tuned\"\ntune = 2\n\
                     [[branch]]\nname = \"b\"\nbits = 8\npreset = \"standard\"\n";
/// Enough branches for hidden states that a small host must leave partly on disk.
const FOUR: &str = "[[branch]]\nname = \"a\"\nbits = 3\npreset = \"best\"\n[[branch]]\nname = \"b\"\nbits = 8\n\
                    [[branch]]\nname = \"c\"\nbits = 4\n[[branch]]\nname = \"d\"\nbits = 2\n";
pub(crate) const QUICK: [&str; 6] = ["--device", "cpu", "--samples", "2", "--seq-len", "128"];
const EVALUATION: &str = "tests/data/eval_wikidoc_40.json";
/// Enough text for a run to be interrupted in progress.
pub(crate) const SLOW: [&str; 6] = ["--device", "cpu", "--samples", "4", "--seq-len", "512"];

pub(crate) fn quantize(recipe: &Path, flags: &[&str]) -> Command {
    command(["quantize", recipe.to_str().unwrap()].iter().chain(flags))
}

pub(crate) fn start(mut command: Command) -> Child {
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Returns the finished blocks of the run in `out`.
pub(crate) fn blocks(out: &Path) -> usize {
    let journal = fs::read_to_string(out.join(".gptq-journal.jsonl")).unwrap_or_default();
    journal.matches('\n').count().saturating_sub(1)
}

pub(crate) fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(
            started.elapsed() < Duration::from_secs(120),
            "never: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn signal(child: &Child, names: &[&str]) {
    let kills = names
        .iter()
        .map(|name| format!("kill -{name} {}", child.id()));
    let script = kills.collect::<Vec<_>>().join("; ");
    assert!(
        Command::new("sh")
            .args(["-c", &script])
            .status()
            .unwrap()
            .success()
    );
}

/// Starts a run, and kills it once a block is finished.
pub(crate) fn killed_after_a_block(recipe: &Path, out: &Path, flags: &[&str]) {
    let mut child = start(quantize(recipe, flags));
    wait("a block", || blocks(out) > 0);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Returns every file below `out`, without the times in reports.
pub(crate) fn contents(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for branch in fs::read_dir(out).unwrap() {
        let branch = branch.unwrap().path();
        assert!(branch.is_dir(), "left behind: {}", branch.display());
        for file in fs::read_dir(&branch).unwrap() {
            let file = file.unwrap().path();
            let bytes = match file.file_name().unwrap().to_str().unwrap() {
                "report.json" => timeless(&fs::read(&file).unwrap()),
                "report.csv" => {
                    let text = fs::read_to_string(&file).unwrap();
                    let rows = text.lines().map(|row| row.rsplit_once(',').unwrap().0);
                    rows.collect::<Vec<_>>().join("\n").into_bytes()
                }
                _ => fs::read(&file).unwrap(),
            };
            found.insert(file.strip_prefix(out).unwrap().to_owned(), bytes);
        }
    }
    found
}

fn timeless(report: &[u8]) -> Vec<u8> {
    let mut report: Value = serde_json::from_slice(report).unwrap();
    // The recipe contains its output directory.
    for key in ["seconds", "phases", "command", "recipe"] {
        report.as_object_mut().unwrap().remove(key).unwrap();
    }
    for linear in report["linears"].as_array_mut().unwrap() {
        linear.as_object_mut().unwrap().remove("seconds").unwrap();
    }
    report.to_string().into_bytes()
}

pub(crate) fn assert_same(found: &Path, expected: &BTreeMap<PathBuf, Vec<u8>>) {
    let found = contents(found);
    assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
    for (file, bytes) in &found {
        assert!(bytes == &expected[file], "{} differs", file.display());
    }
}

/// Returns the output of an uninterrupted run, and its time.
pub(crate) fn uninterrupted(
    branches: &str,
    flags: &[&str],
) -> (BTreeMap<PathBuf, Vec<u8>>, Duration) {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), branches);
    let started = Instant::now();
    succeeded(quantize(&recipe, flags).output().unwrap());
    (contents(&scratch.out()), started.elapsed())
}

/// SplitMix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn a_run_killed_at_twenty_random_moments_gives_the_same_bytes() {
    let (expected, whole) = uninterrupted(TWO, &QUICK);
    let mut state = 6;
    let (mut killed, mut resumed) = (0, 0);
    // Five runs, each killed four times.
    for _ in 0..5 {
        let scratch = Scratch::new();
        let recipe = scratch.recipe(&medi_tiny(), TWO);
        for _ in 0..4 {
            // Some of them save their hidden states after every block.
            let keep: &[&str] = match random(&mut state) % 2 {
                0 => &[],
                _ => &["--keep-every", "0s"],
            };
            let mut child = start(quantize(&recipe, &[&QUICK, keep].concat()));
            // Killed at the start or after some block, not only at fractions of a run's time: if
            // the machine's load varied, most would finish.
            let after = (random(&mut state) % 3) as usize;
            while blocks(&scratch.out()) < after && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let share = (random(&mut state) >> 11) as f64 / (1u64 << 53) as f64;
            std::thread::sleep(whole.mul_f64(share / 4.0));
            killed += usize::from(child.try_wait().unwrap().is_none());
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            resumed += usize::from(String::from_utf8_lossy(&output.stdout).contains("resuming"));
        }
        let output = succeeded(quantize(&recipe, &QUICK).output().unwrap());
        resumed += usize::from(output.contains("resuming"));
        assert_same(&scratch.out(), &expected);
    }
    assert!(
        killed >= 5 && resumed >= 1,
        "{killed} killed, {resumed} resumed"
    );
}

#[test]
fn a_run_goes_on_from_hidden_states_that_were_kept_and_goes_over_its_blocks_again_where_they_are_damaged()
 {
    let (expected, _) = uninterrupted(TUNED, &SLOW);
    for damaged in [false, true] {
        let scratch = Scratch::new();
        let (recipe, out) = (scratch.recipe(&medi_tiny(), TUNED), scratch.out());
        let keep = [&SLOW[..], &["--keep-every", "0s"]].concat();
        killed_after_a_block(&recipe, &out, &keep);
        let done = blocks(&out);
        let kept = out.join(format!(".gptq-states-{}", done - 1));
        if damaged {
            let mut bytes = fs::read(&kept).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(&kept, bytes).unwrap();
        }
        let said = succeeded(quantize(&recipe, &SLOW).output().unwrap());
        let again = if damaged { done } else { 0 };
        assert!(
            said.contains(&format!("running {again} of them again")),
            "{said}"
        );
        assert_same(&out, &expected);
    }
}

#[test]
fn states_that_lie_on_the_disk_are_kept_and_gone_on_from_too() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), FOUR);
    // Two chunks in each stream, and no host memory for either.
    let more = ["--device", "cpu", "--samples", "32"];
    let plan = [
        &["plan", recipe.to_str().unwrap(), "--json"][..],
        &more[2..],
    ]
    .concat();
    let plan: Value = serde_json::from_str(&succeed(plan)).unwrap();
    let memory = |key: &str| plan["memory"][key].as_u64().unwrap();
    assert!(memory("least_cpu") < memory("cpu"), "all of them have room");
    let least = memory("least_cpu").to_string();
    let run = |kill: bool| {
        let scratch = Scratch::new();
        let (recipe, disk) = (scratch.recipe(&medi_tiny(), FOUR), scratch.path("disk"));
        fs::create_dir(&disk).unwrap();
        let budget = ["--host-memory", &least, "--scratch", disk.to_str().unwrap()];
        let flags = [&more[..], &budget].concat();
        if kill {
            let keep = [&flags[..], &["--keep-every", "0s"]].concat();
            killed_after_a_block(&recipe, &scratch.out(), &keep);
        }
        let said = succeeded(quantize(&recipe, &flags).output().unwrap());
        assert_eq!(said.contains("running 0 of them again"), kill, "{said}");
        assert_eq!(fs::read_dir(&disk).unwrap().count(), 0);
        contents(&scratch.out())
    };
    assert!(run(true) == run(false));
}

#[test]
fn dense_propagation_and_shards_resume_too() {
    let run = |kill: bool| {
        let scratch = Scratch::new();
        let (top, output) = ("propagate = \"dense\"", "shard_size = \"2MB\"");
        let recipe = scratch.recipe_with(&medi_tiny(), top, output, TWO);
        if kill {
            killed_after_a_block(&recipe, &scratch.out(), &SLOW);
        }
        let said = succeeded(quantize(&recipe, &SLOW).output().unwrap());
        assert_eq!(said.contains("resuming after block"), kill, "{said}");
        contents(&scratch.out())
    };
    assert!(run(true) == run(false));
}

#[test]
fn whatever_a_kill_left_of_a_replacement_one_directory_stays() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), "[[branch]]\nname = \"a\"\nbits = 4\n");
    let (expected, out) = (scratch.path("made"), scratch.out());
    let run = || succeeded(quantize(&recipe, &QUICK).output().unwrap());
    run();
    fs::rename(out.join("a"), &expected).unwrap();
    let copy = |name: &str| {
        fs::create_dir(out.join(name)).unwrap();
        for file in fs::read_dir(&expected).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), out.join(name).join(file.file_name())).unwrap();
        }
    };
    for left in 0..8 {
        let names = ["a", "a.partial", "a.old"].into_iter().enumerate();
        for (_, name) in names.filter(|(i, _)| left >> i & 1 == 1) {
            copy(name);
        }
        let said = run();
        assert_eq!(
            said.contains("a: already finished, skipped"),
            left & 1 == 1,
            "{said}"
        );
        let weights = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
        assert!(weights(&out.join("a")) == weights(&expected), "{left}");
        fs::remove_dir_all(out.join("a")).unwrap();
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "{left}");
    }
}

#[test]
fn a_finished_branch_is_kept_and_one_added_later_is_made_alone() {
    let scratch = Scratch::new();
    let one = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n";
    let recipe = scratch.recipe(&medi_tiny(), one);
    let run = |recipe: &Path| succeeded(quantize(recipe, &QUICK).output().unwrap());
    run(&recipe);
    let weights = scratch.out().join("a/model.safetensors");
    let made = fs::metadata(&weights).unwrap().modified().unwrap();
    let said = run(&recipe);
    assert!(said.contains("a: already finished, skipped"), "{said}");
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    let said = run(&recipe);
    assert!(
        said.contains("a: already finished, skipped") && said.contains("b: written"),
        "{said}"
    );
    assert_eq!(fs::metadata(&weights).unwrap().modified().unwrap(), made);
    // As if produced in one run.
    let (expected, _) = uninterrupted(TWO, &QUICK);
    assert_same(&scratch.out(), &expected);
}

#[test]
fn an_unfinished_run_goes_on_by_its_directory_alone() {
    let (expected, _) = uninterrupted(TUNED, &SLOW);
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TUNED);
    killed_after_a_block(&recipe, &scratch.out(), &SLOW);
    fs::remove_file(&recipe).unwrap();
    let out = scratch.out();
    let mut resume = command(["quantize", "--device", "cpu", "--resume", "out"]);
    resume.current_dir(out.parent().unwrap());
    let said = succeeded(resume.output().unwrap());
    assert!(said.contains("resuming after block"), "{said}");
    assert_same(&out, &expected);
    let line = refuse(["quantize", "--resume", out.to_str().unwrap()]);
    assert!(line.contains("no interrupted run"), "{line}");
}

#[test]
fn a_run_that_goes_on_keeps_its_states_where_it_is_told_to_from_here() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), FOUR);
    // No host memory for any of the hidden states.
    let more = ["--device", "cpu", "--samples", "32"];
    let plan = [
        "plan",
        recipe.to_str().unwrap(),
        "--json",
        "--samples",
        "32",
    ];
    let plan: Value = serde_json::from_str(&succeed(plan)).unwrap();
    let memory = |key: &str| plan["memory"][key].as_u64().unwrap();
    assert!(memory("least_cpu") < memory("cpu"), "all of them have room");
    let least = memory("least_cpu").to_string();
    killed_after_a_block(&recipe, &scratch.out(), &more);
    fs::create_dir(scratch.path("disk")).unwrap();
    // It was started in another directory, which has no such path.
    let args = ["quantize", "--device", "cpu", "--resume", "out"];
    let mut resume = command(args);
    resume
        .args(["--host-memory", &least, "--scratch", "disk"])
        .current_dir(scratch.path(""));
    let said = succeeded(resume.output().unwrap());
    assert!(said.contains("resuming after block"), "{said}");
    assert_eq!(fs::read_dir(scratch.path("disk")).unwrap().count(), 0);
}

#[test]
fn a_second_run_on_a_directory_is_told_who_holds_it_until_that_dies() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    let mut first = start(quantize(&recipe, &SLOW));
    wait("the journal", || {
        scratch.out().join(".gptq-journal.jsonl").exists()
    });
    let line = refused(quantize(&recipe, &QUICK).output().unwrap());
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let holder = format!("process {} on {} since 20", first.id(), host.trim());
    assert!(line.contains(&holder) && line.contains("out"), "{line}");
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(scratch.out().join(".gptq-lock").exists());
    // Also while the output is read back and evaluated.
    let text = ["--restart", "--branch", "a", "--perplexity", EVALUATION];
    let last = start(quantize(&recipe, &[&QUICK[..], &text].concat()));
    wait("the branch", || scratch.out().join("a").exists());
    signal(&last, &["STOP"]);
    let line = refused(quantize(&recipe, &QUICK).output().unwrap());
    assert!(line.contains(&format!("process {}", last.id())), "{line}");
    signal(&last, &["CONT"]);
    succeeded(last.wait_with_output().unwrap());
    assert!(!scratch.out().join(".gptq-lock").exists());
}

#[test]
fn links_in_an_output_directory_are_not_followed() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    let (out, elsewhere) = (scratch.out(), scratch.path("elsewhere"));
    fs::create_dir_all(&out).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("report.json"), "mine").unwrap();
    let link = |name: &str| std::os::unix::fs::symlink(&elsewhere, out.join(name)).unwrap();
    link("a");
    let line = refused(quantize(&recipe, &QUICK).output().unwrap());
    assert!(
        line.contains("out/a") && line.contains("did not write"),
        "{line}"
    );
    fs::remove_file(out.join("a")).unwrap();
    link("a.partial");
    link("b.old");
    succeeded(quantize(&recipe, &QUICK).output().unwrap());
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 1);
    assert_eq!(fs::read(elsewhere.join("report.json")).unwrap(), b"mine");
}

/// A separate file system, unmounted at the end.
struct Mount(PathBuf);

impl Mount {
    fn new(dir: PathBuf, megabytes: usize) -> Option<Mount> {
        fs::create_dir(&dir).unwrap();
        let size = format!("size={megabytes}m");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&dir);
        let mounted = mount.stderr(Stdio::null()).status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Mount(dir))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_stops_a_run_which_goes_on_when_there_is_room() {
    let (expected, _) = uninterrupted(TWO, &SLOW);
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    let Some(_mount) = Mount::new(scratch.out(), 30) else {
        // A limit on the length of files, which a weight file exceeds, takes its place.
        println!("skipped: no right to mount");
        let (recipe, gptq) = (recipe.display(), env!("CARGO_BIN_EXE_gptq"));
        let script = format!("trap '' XFSZ; ulimit -f 1000; {gptq} quantize {recipe} --device cpu");
        let mut limited = Command::new("sh");
        limited
            .args(["-c", &script])
            .current_dir(crate::harness::root());
        let line = refused(limited.output().unwrap());
        assert!(line.contains("model.safetensors"), "{line}");
        scratch.assert_nothing_written();
        return;
    };
    let filler = scratch.out().join("filler");
    fs::write(&filler, vec![1; 25 << 20]).unwrap();
    let line = refused(quantize(&recipe, &SLOW).output().unwrap());
    assert!(
        line.contains("are needed") && line.contains("are free"),
        "{line}"
    );
    fs::remove_file(&filler).unwrap();

    let child = start(quantize(&recipe, &SLOW));
    wait("a block", || blocks(&scratch.out()) > 0);
    let mut crowd = fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut crowd, &[1; 4096]).is_ok() {}
    let line = refused(child.wait_with_output().unwrap());
    assert!(
        line.contains("no space left") && line.contains("same command"),
        "{line}"
    );
    assert!(blocks(&scratch.out()) > 0);
    drop(crowd);
    fs::remove_file(&filler).unwrap();
    let said = succeeded(quantize(&recipe, &SLOW).output().unwrap());
    assert!(said.contains("resuming after block"), "{said}");
    assert_same(&scratch.out(), &expected);
}

#[test]
fn requantize_goes_on_too() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    succeeded(quantize(&recipe, &QUICK).output().unwrap());
    let (out, again) = (scratch.out(), scratch.path("out-recalibrated"));
    let args = [
        "requantize",
        out.to_str().unwrap(),
        "--calibration",
        "calibration/wikidoc/wikidoc_patient_information_1000.json",
        "--rows",
        "100:400",
        "--samples",
        "4",
        "--seq-len",
        "512",
    ];
    let mut child = start(command(args));
    wait("a block", || blocks(&again) > 0);
    child.kill().unwrap();
    child.wait().unwrap();
    let said = succeed(args);
    assert!(said.contains("resuming after block"), "{said}");
}
