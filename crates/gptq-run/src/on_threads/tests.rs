//! Runs whose ranks exchange matrices, on the CPU and on one CUDA device: the files of one rank, whatever their number.
//!
//! Without a CUDA device the tests of one print that they were skipped, and pass.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gptq_plan::{FetchedInputs, Recipe};

use super::*;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
const PLAIN: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\npreset = \"standard\"\n\
                     [[branch]]\nname = \"b\"\nbits = 3\npreset = \"best\"\ntrue_sequential = false\n";
const TUNED: &str = "[[branch]]\nname = \"a\"\nbits = 3\npreset = \"tuned\"\ntune = 2\n";
const BUDGET: &str = "[[branch]]\nname = \"a\"\nbudget_bits = 3.75\n\
                      budget_choices = [{ bits = 3, group_size = 128 }, { bits = 4, group_size = 32 }]\n";
const EXPERTS: &str = "[[branch]]\nname = \"a\"\nbits = 3\ngroup_size = 32\npreset = \"best\"\n";

/// A model, its windows, and branches.
#[derive(Clone, Copy)]
struct Case {
    model: &'static str,
    samples: usize,
    seq_len: usize,
    branches: &'static str,
}

impl Case {
    const fn tiny(samples: usize, seq_len: usize, branches: &'static str) -> Case {
        Case {
            model: "tests/models/medi-tiny",
            samples,
            seq_len,
            branches,
        }
    }

    const fn experts(samples: usize) -> Case {
        Case {
            model: "tests/golden/families/glm4_moe",
            samples,
            seq_len: 128,
            branches: EXPERTS,
        }
    }

    fn plan(&self, out: &Path) -> Plan {
        let Case {
            model,
            samples,
            seq_len,
            branches,
        } = self;
        let text = format!(
            "[model]\nsource = {:?}\n\
             [calibration]\nsource = \"{REPOSITORY}/calibration/wikidoc/wikidoc_patient_information_1000.json\"\n\
             samples = {samples}\nseq_len = {seq_len}\n[output]\ndir = {out:?}\n{branches}",
            self::model(model, out)
        );
        let recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
        Plan::new(&recipe, &FetchedInputs::default()).unwrap()
    }

    /// Runs on so many ranks of a device, and stops after a block if `stops`.
    fn run(
        &self,
        out: &Path,
        device: Device,
        ranks: usize,
        stops: bool,
    ) -> Result<Outcome, RunError> {
        let plan = self.plan(out);
        let stop = AtomicBool::new(false);
        let options = RunOptions {
            profile: ranks == 2,
            device_memory: None,
            host_memory: None,
            scratch: None,
            save_every: Duration::MAX,
            restart: false,
            stop: &stop,
        };
        let mut on_event = |event: Event<'_>| {
            // The last of the branches is through a block.
            if matches!(event, Event::Block { branch: 1, .. }) && stops {
                stop.store(true, Ordering::Relaxed);
            }
        };
        on_threads(
            MatrixPath::Host,
            &plan,
            &vec![device; ranks],
            options,
            &mut on_event,
        )
    }

    /// Runs on one rank and on each number of others: weights and reported errors are the same to the bit.
    fn same_on(&self, device: Device, ranks: &[usize]) {
        let results = |ranks: usize| {
            let scratch = tempfile::tempdir().unwrap();
            let out = scratch.path().join("out");
            let outcome = self.run(&out, device, ranks, false).unwrap();
            if ranks == 2 {
                assert_eq!(outcome.others.len(), 1);
                assert!(outcome.profile.seconds(crate::Phase::Send) > 0.0);
            }
            (errors(&outcome), files(&out))
        };
        let expected = results(1);
        assert!(!expected.1.is_empty());
        for &ranks in ranks {
            let found = results(ranks);
            assert!(
                found.0 == expected.0,
                "{ranks} ranks: errors {:?} for {:?}",
                found.0,
                expected.0
            );
            assert!(found.1 == expected.1, "{ranks} ranks: weights");
        }
    }

    /// Stops a run on some ranks after a block, and goes on with others.
    fn goes_on(&self, device: Device, ranks: [usize; 2]) {
        let scratch = tempfile::tempdir().unwrap();
        let [whole, broken] = ["whole", "broken"].map(|it| scratch.path().join(it));
        self.run(&whole, device, 1, false).unwrap();
        let stopped = self.run(&broken, device, ranks[0], true);
        assert!(
            matches!(stopped, Err(RunError::Stopped { done: 1.., .. })),
            "{stopped:?}"
        );
        self.run(&broken, device, ranks[1], false).unwrap();
        assert!(files(&broken) == files(&whole), "{ranks:?}");
    }
}

/// A model's directory. That of a family is made beside `out`, with the tokenizer that all families have.
fn model(name: &str, out: &Path) -> PathBuf {
    let Some(family) = name.strip_prefix("tests/golden/families/") else {
        return Path::new(REPOSITORY).join(name);
    };
    let families = Path::new(REPOSITORY).join("tests/golden/families");
    let made = out.with_file_name(family);
    if fs::create_dir(&made).is_ok() {
        let own = ["config.json", "model.safetensors"].map(|it| families.join(family).join(it));
        let common = ["tokenizer.json", "tokenizer_config.json"].map(|it| families.join(it));
        for file in own.into_iter().chain(common) {
            fs::copy(&file, made.join(file.file_name().unwrap())).unwrap();
        }
    }
    made
}

/// Errors of every linear, as bits.
fn errors(outcome: &Outcome) -> Vec<[u64; 3]> {
    let linears = outcome.reports.iter().flat_map(|it| &it.linears);
    let bits = |it: &gptq_plan::LinearReport| {
        [
            it.relative_error,
            it.rtn_error,
            it.solver_objective.unwrap_or_default(),
        ]
        .map(f64::to_bits)
    };
    linears.map(bits).collect()
}

/// Weights of every branch.
fn files(out: &Path) -> Vec<Vec<u8>> {
    let branches = ["a", "b"].map(|it| out.join(it).join("model.safetensors"));
    branches.iter().filter_map(|it| fs::read(it).ok()).collect()
}

/// The first CUDA device, or prints that there is none.
fn cuda() -> Option<Device> {
    let device = Device::Cuda(0).resolve();
    if device.is_err() {
        println!("skipped: no CUDA device");
    }
    device.ok()
}

#[test]
fn ranks_that_exchange_matrices_give_the_files_of_one() {
    // Three chunks, so that some ranks have none.
    Case::tiny(48, 256, PLAIN).same_on(Device::Cpu, &[2, 8]);
}

#[test]
fn ranks_that_exchange_matrices_tune_and_spend_budgets_to_the_same_bytes() {
    Case::tiny(32, 256, TUNED).same_on(Device::Cpu, &[4]);
    Case::tiny(32, 256, BUDGET).same_on(Device::Cpu, &[2]);
}

#[test]
fn ranks_that_exchange_matrices_share_experts_to_the_same_bytes() {
    Case::experts(64).same_on(Device::Cpu, &[2]);
}

#[test]
fn a_run_whose_ranks_exchange_matrices_goes_on_with_another_number() {
    Case::tiny(32, 256, PLAIN).goes_on(Device::Cpu, [2, 1]);
    Case::tiny(32, 256, PLAIN).goes_on(Device::Cpu, [1, 4]);
}

#[test]
fn ranks_of_one_cuda_device_give_the_files_of_one() {
    let Some(device) = cuda() else { return };
    // A chunk of 16384 tokens for each of eight ranks.
    Case::tiny(128, 1024, PLAIN).same_on(device, &[2, 4, 8]);
}

#[test]
fn ranks_of_one_cuda_device_tune_and_spend_budgets_to_the_same_bytes() {
    let Some(device) = cuda() else { return };
    Case::tiny(64, 1024, TUNED).same_on(device, &[2]);
    Case::tiny(128, 1024, BUDGET).same_on(device, &[4]);
}

#[test]
fn ranks_of_one_cuda_device_share_experts_to_the_same_bytes() {
    let Some(device) = cuda() else { return };
    Case::experts(1024).same_on(device, &[2, 8]);
}

#[test]
fn a_run_on_ranks_of_one_cuda_device_goes_on_with_another_number() {
    let Some(device) = cuda() else { return };
    Case::tiny(64, 1024, PLAIN).goes_on(device, [2, 1]);
}
