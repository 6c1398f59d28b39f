//! `gptq publish`: uploads finished branches to the Hub, each as the revision of its name.

use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};
use gptq_eval::{TASK_RESULTS, TaskResults};
use gptq_format::branch_dirs;
use gptq_hub::{Changes, Hub, LocalFile, RepoId, changes, create_repo, create_revision, upload};
use gptq_plan::{RECEIPT, Receipt};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::cli::PublishArgs;
use crate::{hub, log, size, terminal, verify};

/// Card of the whole repository, in the directory of the branches.
const CARD: &str = "README.md";

pub(crate) fn run(args: PublishArgs) -> Result<()> {
    let id = RepoId::parse(&args.repo);
    let id = id.ok_or_else(|| anyhow!("--repo {:?} is not owner/name", args.repo))?;
    let branches = branches(&args.dir)?;
    let mut uploads = Vec::new();
    for (name, dir) in &branches {
        let mut files = LocalFile::list(dir)?;
        if !args.unverified {
            check_receipt(dir, &files)?;
        }
        check_answers(dir, &files)?;
        let card = args.dir.join(CARD);
        if name == "main" && card.is_file() {
            files.retain(|file| file.name != CARD);
            files.push(LocalFile {
                name: CARD.to_owned(),
                bytes: fs::metadata(&card)?.len(),
                path: card,
            });
        }
        uploads.push((name, files));
    }
    let settings = hub::settings()?;
    ensure!(
        !settings.offline,
        "HF_HUB_OFFLINE is set; publishing needs the Hub"
    );
    ensure!(
        args.dry_run || settings.token.is_some(),
        "publishing needs a token with write access; set HF_TOKEN"
    );
    let hub = Hub::new(settings)?;
    // Nothing is sent if any branch would remove weights that this program did not write.
    for (name, files) in &uploads {
        let changes = changes(&hub, &id, name, files)?;
        ensure!(
            changes.own || args.delete,
            "{id} {name}: gptq did not publish the weights there, and publishing would remove {}; check --repo, \
             or use --delete",
            some(changes.delete.iter().chain(&changes.replace)),
        );
    }
    if !args.dry_run {
        create_repo(&hub, &id, args.private)?;
    }
    let bar = bar(uploads.len());
    let mut published = Vec::new();
    for (name, files) in uploads {
        bar.set_message(name.clone());
        let mut changes = changes(&hub, &id, name, &files)?;
        if changes.create && !args.dry_run {
            create_revision(&hub, &id, name)?;
            changes = Changes {
                create: true,
                own: true,
                ..self::changes(&hub, &id, name, &files)?
            };
        }
        if let Some(warning) = losses(&format!("{id} {name}"), &changes, args.dry_run) {
            bar.suspend(|| log::warning(&warning));
        }
        if !args.dry_run {
            upload(&hub, &id, name, &changes)?;
        }
        bar.inc(1);
        if args.json {
            published.push(record(name, &changes));
            continue;
        }
        let bytes = changes.upload.iter().map(|file| file.bytes).sum();
        let line = format!(
            "{id} {name}: {} of {} files, {}{}{}",
            changes.upload.len(),
            changes.upload.len() + changes.same,
            size::decimal(bytes),
            if changes.create {
                ", a new revision"
            } else {
                ""
            },
            if args.dry_run { " (not sent)" } else { "" },
        );
        bar.suspend(|| println!("{line}"));
        if args.dry_run {
            for file in &changes.upload {
                let name = terminal::line(&file.name);
                println!("  {name} {}", size::decimal(file.bytes));
            }
            for path in &changes.delete {
                println!("  delete {}", terminal::line(path));
            }
        }
    }
    bar.finish_and_clear();
    if args.json {
        let record = json!({"repo": id.to_string(), "sent": !args.dry_run, "branches": published});
        println!("{}", serde_json::to_string_pretty(&record)?);
    }
    Ok(())
}

/// Describes the weights that an upload deletes or replaces in a revision, if this program did not
/// write them.
fn losses(revision: &str, changes: &Changes, dry_run: bool) -> Option<String> {
    let mut parts = Vec::new();
    if !changes.delete.is_empty() {
        let verb = if dry_run { "would delete" } else { "deletes" };
        parts.push(format!("{verb} {}", some(changes.delete.iter())));
    }
    if !changes.own && !changes.replace.is_empty() {
        let verb = if dry_run { "would replace" } else { "replaces" };
        parts.push(format!("{verb} {}", some(changes.replace.iter())));
    }
    let whose = match (changes.create, changes.own) {
        (true, _) => " (main, of which it begins as a copy, keeps them)",
        (false, true) => "",
        (false, false) => " (which gptq did not publish)",
    };
    (!parts.is_empty()).then(|| format!("{revision}: {}{whose}", parts.join(", ")))
}

/// Joins names into one line: all if few, otherwise the first ones.
fn some<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.map(String::as_str).collect();
    let (first, more) = names.split_at(names.len().min(8));
    match more.len() {
        0 => first.join(", "),
        n => format!("{} and {n} more", first.join(", ")),
    }
}

/// Returns a branch as JSON.
fn record(name: &str, changes: &Changes) -> Value {
    let upload = changes.upload.iter();
    json!({
        "branch": name,
        "new_revision": changes.create,
        "upload": upload
            .map(|file| json!({"name": file.name, "bytes": file.bytes}))
            .collect::<Vec<_>>(),
        "delete": changes.delete,
        "replace": changes.replace,
        "same": changes.same,
    })
}

/// Makes a bar of finished branches, on a terminal.
fn bar(branches: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}")
        .expect("the template is a constant");
    let bar = match std::io::stderr().is_terminal() {
        true => ProgressBar::new(branches as u64),
        false => ProgressBar::hidden(),
    };
    bar.enable_steady_tick(Duration::from_millis(200));
    bar.with_style(style)
}

/// Returns the name and directory of every branch; `main` first, because others begin as a copy of
/// it.
fn branches(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut branches = branch_dirs(dir)?;
    // AutoGPTQ's layout has the first, branches of every format the second.
    let marks = ["quantize_config.json", "report.json"];
    branches.retain(|(_, path)| marks.iter().any(|mark| path.join(mark).is_file()));
    if branches.is_empty() {
        bail!(
            "{}: contains no branch; name the directory that gptq quantize wrote",
            dir.display()
        );
    }
    Ok(branches)
}

/// Refuses a branch that did not pass verification, or whose files have changed since.
fn check_receipt(dir: &Path, files: &[LocalFile]) -> Result<()> {
    let remedy = format!("run gptq verify {}, or use --unverified", dir.display());
    let receipt = Receipt::read(dir)?;
    let receipt = receipt.ok_or_else(|| anyhow!("{}: not verified; {remedy}", dir.display()))?;
    ensure!(
        receipt.pass,
        "{}: did not pass: {}; correct it, run {} with other tolerances, or use --unverified",
        dir.display(),
        terminal::line(&receipt.failures().join("; ")),
        verify::again(&receipt, dir)
    );
    let own = [RECEIPT, TASK_RESULTS];
    for file in (files.iter()).filter(|file| !own.contains(&file.name.as_str())) {
        let judged = receipt.files.get(&file.name);
        let same = match judged {
            Some(judged) => judged.bytes == file.bytes && judged.sha256 == file.sha256()?,
            None => !file.name.ends_with(".safetensors"),
        };
        ensure!(
            same,
            "{}: changed since verification; {remedy}",
            file.path.display()
        );
    }
    if let Some(gone) = receipt
        .files
        .keys()
        .find(|name| !files.iter().any(|file| &file.name == *name))
    {
        bail!(
            "{}: {gone}, which was verified, is missing; {remedy}",
            dir.display()
        );
    }
    Ok(())
}

/// Refuses answers to tasks that other weights gave.
fn check_answers(dir: &Path, files: &[LocalFile]) -> Result<()> {
    let Some(answers) = TaskResults::read(dir)? else {
        return Ok(());
    };
    for (name, asked) in &answers.weights {
        let file = files.iter().find(|file| file.name == *name);
        let same = match file {
            Some(file) => file.bytes == asked.bytes && file.sha256()? == asked.sha256,
            None => false,
        };
        ensure!(
            same,
            "{}: {TASK_RESULTS} has the answers of another {name}; run gptq eval {} again, or remove it",
            dir.display(),
            dir.display()
        );
    }
    Ok(())
}
