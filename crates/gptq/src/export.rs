//! `gptq export`.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Args;
use gptq_export::{ExportSource, TableType, write_directory, write_gguf};
use gptq_format::{FormatName, branch_dirs};

use crate::text_progress::TextProgress;
use crate::{log, size};

#[derive(Args)]
pub(crate) struct ExportArgs {
    /// A branch directory, or a directory of branches
    pub dir: PathBuf,
    /// Format of the new files: gptq, compressed-tensors, mlx, or gguf for llama.cpp
    #[arg(long, value_name = "FORMAT")]
    pub to: FormatName,
    /// The new branch's directory or GGUF file, or the directory of all branches [default: DIR-FORMAT, or DIR.gguf]
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,
    /// Element type of embedding, head and skipped linear layers in a GGUF file: f16 keeps the branch's 16 bits
    #[arg(long, value_name = "f16|q8_0", default_value = "f16", value_parser = tables)]
    pub tables: TableType,
}

fn tables(name: &str) -> Result<TableType, String> {
    match name {
        "f16" => Ok(TableType::Half),
        "q8_0" => Ok(TableType::Q8_0),
        _ => Err("valid are f16 and q8_0".to_owned()),
    }
}

pub(crate) fn run(args: ExportArgs) -> Result<()> {
    let output = match args.output {
        Some(output) => output,
        None => beside(&args.dir, args.to)?,
    };
    let branches = match args.dir.join("config.json").exists() {
        true => vec![(args.dir.clone(), output)],
        false => branches(&args.dir, &output, args.to)?,
    };
    // Everything is refused before anything is written.
    for (dir, _) in &branches {
        let source = ExportSource::open(dir)?;
        source.warnings().iter().for_each(|it| log::warning(it));
        gptq_export::check(&source, args.to)?;
    }
    for (dir, target) in branches {
        let mut progress = TextProgress::of("written", &dir.display().to_string());
        let (source, mut show) = (ExportSource::open(&dir)?, |done| progress.show(done));
        let bytes = match args.to {
            FormatName::Gguf => write_gguf(&source, args.tables, &target, &mut show)?,
            format => write_directory(&source, format, &target, &mut show)?,
        };
        println!(
            "{}: {}, {}",
            target.display(),
            args.to.name(),
            size::decimal(bytes)
        );
    }
    Ok(())
}

/// Returns the path beside `dir` that is named after the format too.
fn beside(dir: &Path, to: FormatName) -> Result<PathBuf> {
    let name = dir.file_name();
    let Some(name) = name else {
        anyhow::bail!("{}: choose a directory with --output", dir.display());
    };
    let mut name = name.to_os_string();
    match (to, dir.join("config.json").exists()) {
        (FormatName::Gguf, true) => name.push(".gguf"),
        _ => name.push(format!("-{}", to.name())),
    }
    Ok(dir.with_file_name(name))
}

/// Returns the branches directly below `dir`, each with its target below `output`.
fn branches(dir: &Path, output: &Path, to: FormatName) -> Result<Vec<(PathBuf, PathBuf)>> {
    let mut found = match dir.is_dir() {
        true => branch_dirs(dir)?,
        false => Vec::new(),
    };
    found.retain(|(_, path)| path.join("config.json").exists());
    ensure!(
        !found.is_empty(),
        "{}: neither a branch nor a directory of them; it has no config.json, nor has anything \
         directly below it",
        dir.display()
    );
    let target = |(name, path): (String, PathBuf)| match to {
        FormatName::Gguf => (path, output.join(format!("{name}.gguf"))),
        _ => (path, output.join(name)),
    };
    Ok(found.into_iter().map(target).collect())
}
