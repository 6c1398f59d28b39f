//! `gptq`: quantizes a model into a matrix of GPTQ branches from a recipe or from flags, and verifies the
//! result.
//!
//! Exit status: 0 for success, 1 if something failed, 2 for a wrong command line, 130 and 143 if
//! stopped by SIGINT or SIGTERM.

#![forbid(unsafe_code)]

mod asked_model;
mod bug;
mod calibration;
mod card;
mod cli;
mod completions;
mod environment;
mod eval;
mod eval_output;
mod export;
mod generate;
mod hub;
mod init;
mod inspect;
mod log;
mod model_recipe;
mod plan;
mod progress;
mod publish;
mod quantize;
mod ranks;
mod recipe_args;
mod report;
mod requantize;
mod signals;
mod size;
mod table;
mod terminal;
mod text_progress;
mod time_left;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::signals::Signals;

fn main() -> ExitCode {
    gptq_format::install_sigbus_handler();
    bug::watch();
    if let Some(directory) = environment::cache_directory() {
        gptq_kernels::keep_kernels(directory.join("gptq/kernels"));
    }
    let Cli { log_file, command } = Cli::parse();
    let signals = match Signals::install() {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("gptq: cannot install signal handlers: {error}");
            return ExitCode::FAILURE;
        }
    };
    // A token stored in a file is a secret even if the environment has none.
    let secrets = hub::token().into_iter().collect();
    let result = log::start(log_file.as_deref(), environment::text("RUST_LOG"), secrets);
    let result = result.and_then(|()| {
        let about = command.about();
        bug::guard(&about, || run(command, &signals))
            .unwrap_or_else(|line| Err(anyhow::Error::msg(line)))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            // One line: messages include their sources and remedies.
            eprintln!("gptq: {}", terminal::line(&error.to_string()));
            signals.status().map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}

fn run(command: Command, signals: &Signals) -> anyhow::Result<()> {
    match command {
        Command::Init(args) => init::run(args),
        Command::Quantize(args) => quantize::run(args, signals),
        Command::Plan(args) => plan::run(args),
        Command::Requantize(args) => requantize::run(args, signals),
        Command::Calibration(args) => calibration::run(args),
        Command::Publish(args) => publish::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Export(args) => export::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Report(args) => report::run(args),
        Command::Card(args) => card::run(args),
    }
}
