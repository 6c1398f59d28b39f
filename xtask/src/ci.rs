//! Everything that CI checks, in one list: `.ci/run` builds this program and runs it. Each step is told with its time.
//!
//! Tests that need a device, a mount or another program pass without it, and print `skipped: REASON`. The summary has
//! them, and `GPTQ_REQUIRE=cuda,mount` makes those that lack one of these a failure.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};

use crate::{root, tidy};

/// A check, by name.
type Step = (&'static str, fn() -> anyhow::Result<()>);

const STEPS: [Step; 7] = [
    ("format", || cargo(&["fmt", "--all", "--check"], &[])),
    ("lints", lints),
    ("documentation", documentation),
    ("build", || {
        cargo(
            &[
                "build",
                "--locked",
                "--workspace",
                "--all-targets",
                "--quiet",
            ],
            &[],
        )
    }),
    ("tidy", tidy::run),
    ("tests", tests),
    ("fuzz targets", fuzz_targets),
];

/// Words of `GPTQ_REQUIRE`, and what the reasons that they exclude begin with.
const REQUIREMENTS: [(&str, &str); 5] = [
    ("cuda", "no CUDA device"),
    ("two-cuda", "needs 2 CUDA devices"),
    ("nccl", "no NCCL"),
    ("mount", "no right to mount"),
    ("chromium", "no Chromium"),
];

/// Runs every check; errors at the first failure.
pub(crate) fn run() -> anyhow::Result<()> {
    required()?;
    let mut times = Vec::new();
    for (name, check) in STEPS {
        println!("== {name}");
        let begun = Instant::now();
        check().with_context(|| name.to_owned())?;
        times.push((name, begun.elapsed().as_secs()));
    }
    for (name, seconds) in times {
        println!("{name:<14}{seconds:>6} s");
    }
    Ok(())
}

fn lints() -> anyhow::Result<()> {
    let args = [
        "clippy",
        "--locked",
        "--workspace",
        "--all-targets",
        "--quiet",
    ];
    cargo(&[&args[..], &["--", "-D", "warnings"]].concat(), &[])
}

fn documentation() -> anyhow::Result<()> {
    let args = ["doc", "--locked", "--workspace", "--no-deps", "--quiet"];
    cargo(&args, &[("RUSTDOCFLAGS", "-D warnings")])
}

fn tests() -> anyhow::Result<()> {
    let mut command = Command::new(cargo_program());
    command
        .args(["test", "--locked", "--workspace", "--", "--show-output"])
        .current_dir(root())
        .stdout(Stdio::piped());
    let mut child = command.spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("its output is piped")?;
    let skipped = relay(output, &mut |line| println!("{line}"))?;
    let status = child.wait()?;
    for (reason, tests) in &skipped {
        println!("skipped, {reason}: {}", tests.len());
    }
    ensure!(status.success(), "cargo test failed");
    lacking(&skipped, &required()?)
}

/// Passes on the lines of a test run, but for what passing tests print, and returns skipped tests by their reason.
fn relay(
    output: impl Read,
    print: &mut dyn FnMut(&str),
) -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let mut skipped: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (mut hidden, mut test) = (false, String::new());
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        match &*line {
            "successes:" => hidden = true,
            "failures:" => hidden = false,
            result if result.starts_with("test result: ") => hidden = false,
            _ => {}
        }
        if !hidden {
            print(&line);
            continue;
        }
        if let Some(name) = line.strip_prefix("---- ") {
            test = name.trim_end_matches(" stdout ----").to_owned();
        }
        if let Some(reason) = line.strip_prefix("skipped: ") {
            let tests = skipped.entry(reason.to_owned()).or_default();
            tests.insert(test.clone());
        }
    }
    Ok(skipped)
}

/// Returns the words of `GPTQ_REQUIRE` with their reasons.
fn required() -> anyhow::Result<Vec<(&'static str, &'static str)>> {
    let words = std::env::var("GPTQ_REQUIRE").unwrap_or_default();
    let words = words.split(',').filter(|word| !word.is_empty());
    words
        .map(|word| {
            let mut known = REQUIREMENTS.into_iter();
            known.find(|(name, _)| *name == word).with_context(|| {
                let names = REQUIREMENTS.map(|(name, _)| name).join(", ");
                format!("GPTQ_REQUIRE: {word:?} is not one of {names}")
            })
        })
        .collect()
}

/// Errors if tests were skipped for want of something that is required.
fn lacking(
    skipped: &BTreeMap<String, BTreeSet<String>>,
    required: &[(&str, &str)],
) -> anyhow::Result<()> {
    for (word, start) in required {
        let tests: Vec<&str> = skipped
            .iter()
            .filter(|(reason, _)| reason.starts_with(start))
            .flat_map(|(_, tests)| tests.iter().map(String::as_str))
            .collect();
        if !tests.is_empty() {
            bail!("GPTQ_REQUIRE={word}, but {start}: {}", tests.join(", "));
        }
    }
    Ok(())
}

/// Checks the fuzz targets, a workspace of their own that includes some of our modules by path.
fn fuzz_targets() -> anyhow::Result<()> {
    let manifest = root().join("fuzz/Cargo.toml");
    let target = std::env::var_os("CARGO_TARGET_DIR");
    let target = target.map_or_else(|| root().join("target"), PathBuf::from);
    let flags: [&OsStr; 8] = [
        "check".as_ref(),
        "--locked".as_ref(),
        "--quiet".as_ref(),
        "--bins".as_ref(),
        "--manifest-path".as_ref(),
        manifest.as_ref(),
        "--target-dir".as_ref(),
        target.as_ref(),
    ];
    cargo(&flags, &[])
}

fn cargo_program() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn cargo<S: AsRef<OsStr>>(args: &[S], environment: &[(&str, &str)]) -> anyhow::Result<()> {
    let status = Command::new(cargo_program())
        .args(args)
        .envs(environment.iter().copied())
        .current_dir(root())
        .status()
        .context("cannot start cargo")?;
    let command = args.first().map(|arg| arg.as_ref().to_string_lossy());
    ensure!(
        status.success(),
        "cargo {} failed",
        command.unwrap_or_default()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "running 3 tests\ntest a ... ok\ntest b ... ok\ntest c ... FAILED\n\nsuccesses:\n\n\
                          ---- a stdout ----\nskipped: no CUDA device\n\n---- b stdout ----\nhello\n\n\nsuccesses:\n    \
                          a\n    b\n\nfailures:\n\n---- c stdout ----\nskipped: is not a word of passing tests\n\n\
                          test result: FAILED. 2 passed; 1 failed\n";

    #[test]
    fn skipped_tests_are_found_and_output_of_passing_ones_is_left_out() {
        let mut shown = Vec::new();
        let mut print = |line: &str| shown.push(line.to_owned());
        let skipped = relay(OUTPUT.as_bytes(), &mut print).unwrap();
        let expected = BTreeSet::from(["a".to_owned()]);
        assert_eq!(
            skipped,
            BTreeMap::from([("no CUDA device".to_owned(), expected)])
        );
        assert!(shown.iter().any(|line| line == "---- c stdout ----"));
        assert!(!shown.iter().any(|line| line == "hello"));

        let required = |word: &str| [*REQUIREMENTS.iter().find(|it| it.0 == word).unwrap()];
        let failed = lacking(&skipped, &required("cuda")).unwrap_err();
        assert!(
            failed
                .to_string()
                .contains("GPTQ_REQUIRE=cuda, but no CUDA device: a")
        );
        assert!(lacking(&skipped, &required("mount")).is_ok());
    }
}
