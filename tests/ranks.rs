//! Runs that several ranks share: threads of one process, and processes as launchers start them.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use crate::checkpoints::{copy, families, without_weights};
use crate::harness::{Scratch, gptq, medi_tiny, refused, succeed, succeeded};
use crate::resume::{assert_same, blocks, contents, quantize, signal, start, wait};

/// A chunk of windows for each of eight ranks.
const EIGHT: [&str; 8] = [
    "--device",
    "cpu",
    "--rows",
    "0:400",
    "--samples",
    "64",
    "--seq-len",
    "512",
];
/// Three chunks, so that some ranks have none.
const THREE: [&str; 6] = ["--device", "cpu", "--samples", "24", "--seq-len", "512"];
const PLAIN: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\npreset = \"standard\"\n\
                     [[branch]]\nname = \"b\"\nbits = 3\npreset = \"standard\"\ntrue_sequential = false\n\
                     [[branch.override]]\nmatch = \"*.1.self_attn.o_proj\"\nskip = true\n";
const BEST: &str = "[[branch]]\nname = \"a\"\nbits = 3\npreset = \"best\"\n\
                    [[branch]]\nname = \"b\"\nbits = 8\npreset = \"standard\"\n";
const TUNED: &str = "[[branch]]\nname = \"a\"\nbits = 3\npreset = \"tuned\"\ntune = 2\n\
                     [[branch]]\nname = \"b\"\nbits = 8\npreset = \"standard\"\n";
const BUDGET: &str = "[[branch]]\nname = \"a\"\nbudget_bits = 3.75\n\
                      budget_choices = [{ bits = 3, group_size = 128 }, { bits = 4, group_size = 32 }]\n";

fn on(ranks: usize, recipe: &Path, flags: &[&str]) -> Command {
    let mut command = quantize(recipe, flags);
    command.args(["--ranks", &ranks.to_string()]);
    command
}

/// Runs a recipe on one rank, and then on each number of `ranks`: all files are the same, and the numbers in reports.
fn same_on(
    ranks: &[usize],
    model: impl Fn(&Scratch) -> std::path::PathBuf,
    top: &str,
    branches: &str,
    flags: &[&str],
) {
    let run = |ranks| {
        let scratch = Scratch::new();
        let recipe = scratch.recipe_with(&model(&scratch), top, "", branches);
        succeeded(on(ranks, &recipe, flags).output().unwrap());
        scratch
    };
    let expected = contents(&run(1).out());
    assert!(
        expected
            .keys()
            .any(|file| file.ends_with("model.safetensors"))
    );
    for &ranks in ranks {
        assert_same(&run(ranks).out(), &expected);
    }
}

#[test]
fn runs_on_1_2_4_and_8_ranks_give_the_same_files() {
    same_on(&[2, 4, 8], |_| medi_tiny(), "", PLAIN, &EIGHT);
}

#[test]
fn ranks_without_a_window_change_nothing() {
    same_on(&[8], |_| medi_tiny(), "", BEST, &THREE);
}

#[test]
fn ranks_correct_mismatch_and_tune_to_the_same_bytes() {
    same_on(&[2, 4], |_| medi_tiny(), "", TUNED, &THREE);
}

#[test]
fn ranks_spend_a_budget_and_share_dense_states_to_the_same_bytes() {
    same_on(&[4], |_| medi_tiny(), "", BUDGET, &THREE);
    same_on(
        &[2],
        |_| medi_tiny(),
        "propagate = \"dense\"\n",
        BEST,
        &THREE,
    );
}

#[test]
fn ranks_share_a_mixture_of_experts_to_the_same_bytes() {
    let model = |scratch: &Scratch| {
        let model = without_weights(scratch, "glm4_moe");
        copy(&families().join("glm4_moe"), &model, &["model.safetensors"]);
        model
    };
    let branches = "[[branch]]\nname = \"a\"\nbits = 3\ngroup_size = 32\npreset = \"best\"\n";
    let flags = ["--device", "cpu", "--samples", "96", "--seq-len", "128"];
    same_on(&[2, 8], model, "", branches, &flags);
}

#[test]
fn a_run_killed_on_some_ranks_goes_on_with_any_other_number() {
    for keep in [&[][..], &["--keep-every", "0s"]] {
        let one = Scratch::new();
        let recipe = one.recipe(&medi_tiny(), TUNED);
        succeeded(quantize(&recipe, &THREE).output().unwrap());
        let expected = contents(&one.out());
        let scratch = Scratch::new();
        let (recipe, out) = (scratch.recipe(&medi_tiny(), TUNED), scratch.out());
        for ranks in [2, 8, 1] {
            let done = blocks(&out);
            let mut child = start(on(ranks, &recipe, &[&THREE[..], keep].concat()));
            wait("a block", || {
                blocks(&out) > done || child.try_wait().unwrap().is_some()
            });
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert!(blocks(&out) > 0, "killed after a block");
        let said = succeeded(on(4, &recipe, &THREE).output().unwrap());
        assert!(said.contains("resuming"), "{said}");
        assert_same(&out, &expected);
    }
}

#[test]
fn numbers_of_ranks_that_cannot_share_a_run_are_refused() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), PLAIN);
    let recipe = recipe.to_str().unwrap();
    for ranks in ["0", "3", "16"] {
        let output = gptq(["quantize", recipe, "--device", "cpu", "--ranks", ranks]);
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let line = format!("{ranks} ranks cannot share a run; 1, 2, 4 and 8 can");
        assert!(said.contains(&line), "{said}");
    }
    scratch.assert_nothing_written();
}

/// A rank as `torchrun` starts it.
pub(crate) struct Launched {
    port: u16,
    size: usize,
}

impl Launched {
    pub(crate) fn of(size: usize) -> Launched {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        Launched { port, size }
    }

    pub(crate) fn command(&self, rank: usize, recipe: &Path, flags: &[&str]) -> Command {
        let mut command = quantize(recipe, flags);
        command
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", self.size.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", self.port.to_string());
        command
    }

    pub(crate) fn start(&self, recipe: &Path, flags: &[&str]) -> Vec<Child> {
        let ranks = (0..self.size).map(|rank| start(self.command(rank, recipe, flags)));
        ranks.collect()
    }
}

pub(crate) fn outputs(ranks: Vec<Child>) -> Vec<Output> {
    let outputs = ranks
        .into_iter()
        .map(|rank| rank.wait_with_output().unwrap());
    outputs.collect()
}

/// Ends all ranks: each has one line that holds every one of `parts`, within half a minute.
pub(crate) fn all_end(ranks: Vec<Child>, but: usize, since: Instant, parts: &[&str]) {
    for (rank, output) in outputs(ranks).into_iter().enumerate() {
        if rank != but {
            let line = refused(output);
            assert!(
                parts.iter().all(|part| line.contains(part)),
                "rank {rank}: {line}"
            );
        }
    }
    assert!(
        since.elapsed() < Duration::from_secs(30),
        "{:?}",
        since.elapsed()
    );
}

#[test]
fn processes_give_the_files_of_one_and_only_rank_0_writes_and_speaks() {
    let (one, scratch) = (Scratch::new(), Scratch::new());
    let recipe = one.recipe(&medi_tiny(), TUNED);
    succeeded(quantize(&recipe, &THREE).output().unwrap());
    let recipe = scratch.recipe(&medi_tiny(), TUNED);
    let logs: Vec<String> = (0..4)
        .map(|rank| scratch.path(&format!("{rank}.log")).display().to_string())
        .collect();
    let launched = Launched::of(4);
    let ranks = (0..4).map(|rank| {
        let flags = [&THREE[..], &["--profile", "--log-file", &logs[rank]]].concat();
        start(launched.command(rank, &recipe, &flags))
    });
    let said: Vec<String> = outputs(ranks.collect())
        .into_iter()
        .map(succeeded)
        .collect();
    assert!(
        said[0].contains("verified") && said[0].contains("rank 3"),
        "{}",
        said[0]
    );
    for phase in ["send", "wait"] {
        assert!(
            said[0].lines().any(|line| line.starts_with(phase)),
            "{}",
            said[0]
        );
    }
    assert_eq!(said[1..], ["", "", ""]);
    for (rank, log) in logs.iter().enumerate() {
        let log = fs::read_to_string(log).unwrap();
        let own = format!("rank {rank} ");
        assert!(
            !log.is_empty() && log.lines().all(|line| line.starts_with(&own)),
            "{log}"
        );
    }
    assert_same(&scratch.out(), &contents(&one.out()));
}

#[test]
fn a_rank_that_is_killed_ends_all_and_the_run_goes_on_with_one() {
    let (one, scratch) = (Scratch::new(), Scratch::new());
    let recipe = one.recipe(&medi_tiny(), PLAIN);
    succeeded(quantize(&recipe, &THREE).output().unwrap());
    let (recipe, out) = (scratch.recipe(&medi_tiny(), PLAIN), scratch.out());
    let mut ranks = Launched::of(4).start(&recipe, &THREE);
    wait("a block", || blocks(&out) > 0);
    ranks[2].kill().unwrap();
    all_end(ranks, 2, Instant::now(), &["rank 2 on ", "it is gone"]);
    assert!(!out.join("a").join("model.safetensors").exists());
    let said = succeeded(quantize(&recipe, &THREE).output().unwrap());
    assert!(said.contains("resuming"), "{said}");
    assert_same(&out, &contents(&one.out()));
}

#[test]
fn rank_0_being_killed_ends_all() {
    let scratch = Scratch::new();
    let (recipe, out) = (scratch.recipe(&medi_tiny(), PLAIN), scratch.out());
    let mut ranks = Launched::of(2).start(&recipe, &THREE);
    wait("a block", || blocks(&out) > 0);
    ranks[0].kill().unwrap();
    all_end(ranks, 0, Instant::now(), &["rank 0 on ", "it is gone"]);
}

#[test]
fn a_rank_that_hangs_ends_all() {
    let scratch = Scratch::new();
    let (recipe, out) = (scratch.recipe(&medi_tiny(), PLAIN), scratch.out());
    let mut ranks = Launched::of(2).start(&recipe, &THREE);
    wait("a block", || blocks(&out) > 0);
    let hanging = ranks.remove(1);
    signal(&hanging, &["STOP"]);
    all_end(ranks, 1, Instant::now(), &["rank 1 on ", "hangs"]);
    signal(&hanging, &["KILL"]);
    hanging.wait_with_output().unwrap();
}

#[test]
fn a_signal_to_any_rank_stops_all_where_the_run_can_go_on() {
    for asked in [0, 1] {
        let scratch = Scratch::new();
        let (recipe, out) = (scratch.recipe(&medi_tiny(), PLAIN), scratch.out());
        let ranks = Launched::of(2).start(&recipe, &THREE);
        wait("a block", || blocks(&out) > 0);
        signal(&ranks[asked], &["INT"]);
        let outputs = outputs(ranks);
        let code = |rank: usize| outputs[rank].status.code();
        assert_eq!((code(asked), code(1 - asked)), (Some(130), Some(1)));
        let line = String::from_utf8_lossy(&outputs[0].stderr).into_owned();
        assert!(
            line.contains("the same command resumes from there"),
            "{line}"
        );
        let said = succeeded(on(4, &recipe, &THREE).output().unwrap());
        assert!(said.contains("resuming"), "{said}");
    }
}

#[test]
fn ranks_that_see_other_inputs_are_refused_by_name_before_any_work() {
    let other_text = ["--seed", "7"];
    let other = Scratch::new();
    let other_recipe = other.recipe(&medi_tiny(), &PLAIN.replace("bits = 4", "bits = 2"));
    let changed = Scratch::new();
    let model = changed.copy_model();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    fs::write(model.join("config.json"), config + "\n").unwrap();
    let other_model = changed.recipe(&model, PLAIN);
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), PLAIN);
    for (recipe_of_1, flags, part) in [
        (&recipe, &other_text[..], "calibration."),
        (&other_recipe, &[], "branch.bits"),
        (&other_model, &[], "model.config"),
    ] {
        let launched = Launched::of(2);
        let ranks = vec![
            start(launched.command(0, &recipe, &THREE)),
            start(launched.command(1, recipe_of_1, &[&THREE[..], flags].concat())),
        ];
        all_end(
            ranks,
            2,
            Instant::now(),
            &[
                "rank 1 on ",
                "has other inputs or settings than rank 0",
                part,
            ],
        );
        scratch.assert_nothing_written();
    }
}

#[test]
fn ranks_that_do_not_come_together_are_named() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), PLAIN);
    let soon = [&THREE[..], &["--join-timeout", "1s"]].concat();
    let line = refused(Launched::of(2).command(0, &recipe, &soon).output().unwrap());
    assert!(
        line.contains("rank 1 of 2 did not come to rank 0 at 127.0.0.1:"),
        "{line}"
    );
    let line = refused(Launched::of(2).command(1, &recipe, &soon).output().unwrap());
    assert!(
        line.contains("rank 0 does not answer at 127.0.0.1:"),
        "{line}"
    );
    let mut both = Launched::of(2).command(1, &recipe, &soon);
    let line = refused(both.args(["--ranks", "2"]).output().unwrap());
    assert!(
        line.contains("--ranks makes ranks of this process's threads"),
        "{line}"
    );
    scratch.assert_nothing_written();
}

#[test]
fn a_plan_for_ranks_tells_memory_traffic_and_time() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), PLAIN);
    let recipe = recipe.to_str().unwrap();
    let said = succeed(["plan", recipe, "--devices", "4"]);
    let line = said
        .lines()
        .find(|line| line.starts_with("on 4 ranks of the CPU: peak memory of each "));
    let line = line.unwrap();
    assert!(
        line.contains("rank 0 exchanges ") && line.contains(" of the time of one"),
        "{line}"
    );
    let of = |ranks: &str| {
        // Several chunks of windows, so that each rank has fewer.
        let windows = ["--samples", "64", "--seq-len", "512"];
        let plan = ["plan", recipe, "--devices", ranks, "--json"];
        let json = succeed([&plan[..], &windows].concat());
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        ["cpu", "exchanged", "relative_time"].map(|key| json["scaling"][key].as_f64().unwrap())
    };
    let ([one, nothing, whole], [two, some, _]) = (of("1"), of("2"));
    assert_eq!((nothing, whole), (0.0, 1.0));
    assert!(two < one && some > 0.0, "{two} {some}");
}
