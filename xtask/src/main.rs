//! Development tasks: `cargo xtask tidy`, `cargo xtask validate`, `cargo xtask golden`.

mod golden;
mod tidy;
mod validate;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Development tasks of the gptq workspace")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check the repository's layout, dependencies between crates, and style
    Tidy,
    /// Everything CI checks
    Validate,
    /// Compare a dense model's logits with those another program wrote
    Golden {
        /// The checkpoint's directory
        #[arg(long)]
        model: PathBuf,
        /// A safetensors file with `input_ids` i32 [windows, seq] and `logits` f32 [windows, seq, vocabulary]
        #[arg(long)]
        logits: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Tidy => tidy::run(),
        Task::Validate => validate::run(),
        Task::Golden { model, logits } => golden::run(&model, &logits),
    }
}

/// The workspace's root.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}
