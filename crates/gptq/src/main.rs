//! `gptq`: produce a matrix of GPTQ branches from one config file, and verify what was written.
//!
//! Exit status: 0 when everything asked for held, 1 when something did not, 2 for a wrong command line,
//! 130 and 143 when SIGINT or SIGTERM stopped it.

mod calibration;
mod card;
mod cli;
mod completions;
mod generate;
mod hub;
mod inspect;
mod plan;
mod progress;
mod publish;
mod quantize;
mod report;
mod requantize;
mod signals;
mod size;
mod table;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::signals::Signals;

/// `gptq` below the user's cache directory, as the XDG specification has it.
fn cache_directory() -> Option<PathBuf> {
    let directory = |name| std::env::var_os(name).map(PathBuf::from);
    let absolute = |path: &PathBuf| path.is_absolute();
    directory("XDG_CACHE_HOME")
        .filter(absolute)
        .or_else(|| Some(directory("HOME").filter(absolute)?.join(".cache")))
        .map(|cache| cache.join("gptq"))
}

fn main() -> ExitCode {
    if let Some(directory) = cache_directory() {
        gptq_kernels::keep_kernels(&directory.join("kernels"));
    }
    let command = Cli::parse().command;
    let signals = match Signals::install() {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("gptq: signals cannot be taken over: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = match command {
        Command::Quantize(args) => quantize::run(args, &signals),
        Command::Plan(args) => plan::run(args),
        Command::Requantize(args) => requantize::run(args, &signals),
        Command::Calibration(args) => calibration::run(args),
        Command::Publish(args) => publish::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Report(args) => report::run(args),
        Command::Card(args) => card::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line: a library's message names the thing and the remedy, and holds its source's.
            eprintln!("gptq: {error}");
            signals.status().map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}
