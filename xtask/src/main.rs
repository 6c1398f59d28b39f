//! Development tasks: `cargo xtask tidy`, `cargo xtask ci`, `cargo xtask golden`,
//! `cargo xtask synth`, `cargo xtask bench`, `cargo xtask ablate`, `cargo xtask clients`.

#![forbid(unsafe_code)]

mod ablate;
mod bench;
mod ci;
mod clients;
mod dependencies;
mod design;
mod exports;
mod golden;
mod rust_source;
mod synth;
mod tidy;

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
    /// Run everything that CI checks, each step with its time
    Ci,
    /// Compare a model's logits or greedy tokens with those of another program
    Golden {
        /// The checkpoint's directory
        #[arg(long)]
        model: PathBuf,
        /// A safetensors file with `input_ids` i32 [windows, seq] and `logits` f32 [windows, seq, vocabulary]
        #[arg(long, required_unless_present = "tokens")]
        logits: Option<PathBuf>,
        /// tests/golden/generate.json
        #[arg(long)]
        tokens: Option<PathBuf>,
    },
    /// Write a random-weight checkpoint of a known model's shape
    Synth {
        /// Directory to write
        dir: PathBuf,
        /// llama2-7b or tiny
        #[arg(long)]
        shape: synth::Shape,
        /// Decoder blocks, instead of the shape's own
        #[arg(long)]
        layers: Option<usize>,
        /// A directory to copy tokenizer.json and tokenizer_config.json from
        #[arg(long)]
        tokenizer: Option<PathBuf>,
    },
    /// Measure whole runs and device operations, and print the table
    Bench(bench::BenchArgs),
    /// Measure every option of the method alone and together, and write ACCURACY.md
    Ablate(ablate::AblateArgs),
    /// Load a branch of every model family with Transformers and GPTQModel, and write CLIENTS.md
    Clients(clients::ClientsArgs),
    /// Export branches to every format, compare their weights in the formats' own packages, and write EXPORTS.md
    Exports(exports::ExportsArgs),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().task {
        Task::Tidy => tidy::run(),
        Task::Ci => ci::run(),
        Task::Golden {
            model,
            logits,
            tokens,
        } => {
            if let Some(logits) = logits {
                golden::logits(&model, &logits)?;
            }
            tokens.map_or(Ok(()), |tokens| golden::tokens(&model, &tokens))
        }
        Task::Synth {
            dir,
            shape,
            layers,
            tokenizer,
        } => synth::run(&dir, shape, layers, tokenizer.as_deref()),
        Task::Bench(args) => bench::run(&args),
        Task::Ablate(args) => ablate::run(&args),
        Task::Clients(args) => clients::run(&args),
        Task::Exports(args) => exports::run(&args),
    }
}

/// Returns the workspace's root.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask is in the workspace")
        .to_owned()
}
