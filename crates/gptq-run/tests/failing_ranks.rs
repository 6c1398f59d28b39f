//! A rank that fails at any step ends all ranks, with its own words, and leaves no branch half written.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::scope;
use std::time::Duration;

use gptq_kernels::Device;
use gptq_plan::{FetchedInputs, Plan, Recipe};
use gptq_ranks::{Cause, Collective, OneRank, RankError, RankShare, Threads};
use gptq_run::{RunError, RunOptions, quantize};

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// A rank that fails at one of its calls.
struct Failing {
    rank: Threads,
    calls: AtomicUsize,
    at: Option<usize>,
}

impl Failing {
    fn call(&self) -> Result<(), RankError> {
        match Some(self.calls.fetch_add(1, Ordering::Relaxed)) == self.at {
            true => Err(RankError::Refused("out of luck".to_owned())),
            false => Ok(()),
        }
    }
}

impl Collective for Failing {
    fn share(&self) -> RankShare {
        self.rank.share()
    }

    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), RankError> {
        self.call()?;
        self.rank.send(to, bytes)
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>, RankError> {
        self.call()?;
        self.rank.receive(from)
    }

    fn check(&self) -> Result<(), RankError> {
        self.call()?;
        self.rank.check()
    }

    fn end(&self, cause: Cause) {
        self.rank.end(cause);
    }

    fn leave(&self) -> Result<(), RankError> {
        self.call()?;
        self.rank.leave()
    }
}

/// Every kind of step: hidden states of the dense model, tuning, states that are saved.
fn plan(out: &Path) -> Plan {
    let text = format!(
        "[model]\nsource = \"{REPOSITORY}/tests/models/medi-tiny\"\n\
         [calibration]\nsource = \"{REPOSITORY}/calibration/wikidoc/wikidoc_patient_information_1000.json\"\n\
         rows = \"0:20\"\nsamples = 2\nseq_len = 64\n[output]\ndir = {out:?}\n\
         [[branch]]\nname = \"a\"\nbits = 4\npreset = \"tuned\"\ntune = 1\n"
    );
    let recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
    Plan::new(&recipe, &FetchedInputs::default()).unwrap()
}

/// Runs on two ranks, of which `failing` fails at call `at`; the numbers of their calls, and how they ended.
fn run(out: &Path, failing: usize, at: Option<usize>) -> [(usize, Result<(), RunError>); 2] {
    let plan = &plan(out);
    let ranks = Threads::ranks(2).unwrap().into_iter();
    let ranks = ranks.enumerate().map(|(it, rank)| Failing {
        rank,
        calls: AtomicUsize::new(0),
        at: at.filter(|_| it == failing),
    });
    let done: Vec<_> = scope(|scope| {
        let threads = ranks.map(|rank| {
            scope.spawn(move || {
                let options = RunOptions {
                    profile: false,
                    device_memory: None,
                    host_memory: None,
                    scratch: None,
                    save_every: Duration::ZERO,
                    restart: false,
                    stop: &AtomicBool::new(false),
                };
                let done = quantize(plan, Device::Cpu, &rank, options, &mut |_| {});
                (rank.calls.load(Ordering::Relaxed), done.map(drop))
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    });
    done.try_into().unwrap()
}

#[test]
fn a_rank_that_fails_at_any_step_ends_all_and_leaves_no_branch() {
    let whole = tempfile::tempdir().unwrap();
    let calls = run(&whole.path().join("out"), 0, None).map(|(calls, done)| {
        done.unwrap();
        calls
    });
    for (failing, calls) in calls.into_iter().enumerate() {
        assert!(calls > 40, "{calls}");
        // From the first to the last, a few of each rank's.
        for at in (0..calls).step_by(calls / 6).chain([calls - 1]) {
            let scratch = tempfile::tempdir().unwrap();
            let out = scratch.path().join("out");
            let ended = run(&out, failing, Some(at));
            for (rank, (_, done)) in ended.into_iter().enumerate() {
                // The last call of rank 0 comes when the branch is in place and the others have left.
                let last = at + 1 == calls;
                match done {
                    Err(error) => {
                        let line = error.to_string();
                        assert!(line.contains("out of luck"), "{rank}: {line}");
                        assert!(
                            rank == failing || line.starts_with(&format!("rank {failing} on ")),
                            "{line}"
                        );
                    }
                    Ok(()) => assert!(last && rank != failing, "rank {rank} at {at} of {failing}"),
                }
                let _ = rank;
            }
            let placed = out.join("a").join("model.safetensors").exists();
            assert!(
                !placed || at + 2 >= calls,
                "call {at} of {calls}, rank {failing}"
            );
        }
    }
}

#[test]
fn a_run_that_failed_on_two_ranks_goes_on_with_one_to_the_bytes_of_one() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let [whole, broken] = [whole.path(), broken.path()].map(|it| it.join("out"));
    let alone = |out: &Path| {
        let options = RunOptions {
            profile: false,
            device_memory: None,
            host_memory: None,
            scratch: None,
            save_every: Duration::ZERO,
            restart: false,
            stop: &AtomicBool::new(false),
        };
        quantize(&plan(out), Device::Cpu, &OneRank, options, &mut |_| {}).unwrap();
        std::fs::read(out.join("a/model.safetensors")).unwrap()
    };
    let [(_, first), _] = run(&broken, 1, Some(60));
    assert!(first.is_err());
    assert!(alone(&broken) == alone(&whole));
}
