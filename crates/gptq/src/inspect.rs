//! `gptq inspect`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use gptq_format::{Inspection, LinearInfo, SharedSettings, branch_dirs};

use crate::{log, size, table, terminal};

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// A checkpoint's directory, one of its weight files, or a directory of branches
    path: PathBuf,
    /// Print everything as JSON, including every tensor with its SHA-256
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: InspectArgs) -> Result<()> {
    let branches = branches(&args.path)?;
    if !branches.is_empty() {
        return matrix(branches, args.json);
    }
    let found = Inspection::of(&args.path)?;
    for note in &found.notes {
        log::warning(note);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    let model = terminal::line(found.model_type.as_deref().unwrap_or("no config.json"));
    println!(
        "{}: {} ({model}), {} tensors, {}",
        args.path.display(),
        found.format,
        found.tensors.len(),
        size::decimal(found.tensor_bytes as u64)
    );
    if let Some(base) = &found.base_model {
        println!("quantized from {}", terminal::line(base));
    }
    if let Some(settings) = &found.settings {
        let several = || "several".to_owned();
        let act_order = match (settings.act_order, settings.without_g_idx) {
            (true, _) => "act order",
            (false, 0) => "no act order",
            (false, _) => "no act order, no g_idx (read as groups in order)",
        };
        println!(
            "{} bits, groups of {}, {}, {act_order}{} (from {})",
            settings.bits.map_or_else(several, |b| b.to_string()),
            settings.group_size.map_or_else(several, |g| g.to_string()),
            if settings.sym {
                "symmetric"
            } else {
                "asymmetric"
            },
            (settings.damp_percent).map_or_else(String::new, |d| format!(", damp {d}")),
            settings.source
        );
        println!("\n{}", shapes(&found.linears).trim_end());
        let loads = |which: bool| {
            let clients = found.clients.iter().filter(move |c| c.loads == which);
            clients.map(|c| match c.why {
                None => c.name.to_owned(),
                Some(why) => format!("{} ({why})", c.name),
            })
        };
        let some: Vec<String> = loads(true).collect();
        match some.is_empty() {
            true => println!("\nloads nowhere"),
            false => println!("\nloads in: {}", some.join(", ")),
        }
        let not: Vec<String> = loads(false).collect();
        if !not.is_empty() {
            println!("not in: {}", not.join(", "));
        }
    }
    let files = found.files.iter().map(|f| {
        let digest = f.sha256[..16].to_owned();
        vec![f.name.clone(), size::decimal(f.bytes), digest]
    });
    let heading = ["file", "size", "SHA-256, beginning"]
        .map(String::from)
        .to_vec();
    let rows: Vec<_> = [heading].into_iter().chain(files).collect();
    println!("\n{}", table::render(&rows).trim_end());
    Ok(())
}

/// Returns the checkpoints directly below `path`, unless it is one itself.
fn branches(path: &Path) -> Result<Vec<(String, PathBuf)>> {
    if !path.is_dir()
        || fs::read_dir(path)
            .with_context(|| path.display().to_string())?
            .any(|entry| entry.is_ok_and(|e| is_weights(&e.path())))
    {
        return Ok(Vec::new());
    }
    let mut found = branch_dirs(path)?;
    found.retain(|(_, dir)| dir.join("config.json").exists());
    Ok(found)
}

/// Returns true if a file may hold weights, by its name.
fn is_weights(path: &Path) -> bool {
    let known = ["safetensors", "bin", "pt"];
    (path.extension()).is_some_and(|end| known.iter().any(|known| end == *known))
}

/// Prints a table of branches, or JSON with one entry each.
fn matrix(branches: Vec<(String, PathBuf)>, json: bool) -> Result<()> {
    let mut found = Vec::new();
    for (name, dir) in branches {
        let inspection = Inspection::of(&dir)?;
        found.push((name, inspection));
    }
    if json {
        let found: BTreeMap<_, _> = found.into_iter().collect();
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    let heading = [
        "branch",
        "format",
        "bits",
        "group",
        "act order",
        "sym",
        "size",
        "loads in",
    ];
    let mut rows = vec![heading.map(String::from).to_vec()];
    for (name, it) in found {
        let settings = it.settings.as_ref();
        let of = |value: &dyn Fn(&SharedSettings) -> String| {
            settings.map_or_else(|| "-".to_owned(), value)
        };
        let several = || "several".to_owned();
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        let loads = it.clients.iter().filter(|c| c.loads).map(|c| c.name);
        rows.push(vec![
            name,
            it.format.to_owned(),
            of(&|s| s.bits.map_or_else(several, |b| b.to_string())),
            of(&|s| s.group_size.map_or_else(several, |g| g.to_string())),
            of(&|s| yes(s.act_order)),
            of(&|s| yes(s.sym)),
            size::decimal(
                it.files
                    .iter()
                    .filter(|f| is_weights(Path::new(&f.name)))
                    .map(|f| f.bytes)
                    .sum(),
            ),
            match settings {
                Some(_) => loads.collect::<Vec<_>>().join(", "),
                None => "-".to_owned(),
            },
        ]);
    }
    println!("{}", table::render(&rows).trim_end());
    Ok(())
}

/// Formats one row per kind of quantized linear layer, with its count.
fn shapes(linears: &[LinearInfo]) -> String {
    let kind = |l: &LinearInfo| {
        let name = l.name.rsplit('.').next().unwrap_or_default().to_owned();
        (name, [l.out_features, l.in_features], l.bits, l.group_size)
    };
    let mut kinds = Vec::new();
    for linear in linears {
        let this = kind(linear);
        match kinds.iter_mut().find(|(k, _)| *k == this) {
            Some((_, count)) => *count += 1,
            None => kinds.push((this, 1)),
        }
    }
    let heading = ["linear", "count", "out x in", "bits", "group"].map(String::from);
    let rows = kinds
        .into_iter()
        .map(|((name, [out, n_in], bits, group), n): (_, usize)| {
            let shape = format!("{out} x {n_in}");
            vec![
                name,
                n.to_string(),
                shape,
                bits.to_string(),
                group.to_string(),
            ]
        });
    table::render(
        &[heading.to_vec()]
            .into_iter()
            .chain(rows)
            .collect::<Vec<_>>(),
    )
}
