//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use gptq_kernels::Device;
use gptq_pipeline::{Plan, Recipe, RecipeOverrides, parse_size};

use crate::completions::CompletionsArgs;
use crate::generate::GenerateArgs;
use crate::inspect::InspectArgs;

/// Turn a Llama-family checkpoint into GPTQ branches, from one config file.
#[derive(Parser)]
#[command(
    version,
    about,
    after_help = "Example:\n  gptq quantize configs/tiny.toml"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Produce every branch of a recipe
    #[command(
        after_help = "Example:\n  gptq quantize configs/tiny.toml --branch main --perplexity eval.json"
    )]
    Quantize(QuantizeArgs),
    /// Show what a recipe would produce: sizes, memory, and who can load each branch
    #[command(
        after_help = "Example:\n  gptq plan configs/meditron-7b.toml --model-config config.json"
    )]
    Plan(PlanArgs),
    /// Reopen a branch, check every tensor, run it, and measure its perplexity
    #[command(
        after_help = "Example:\n  gptq verify out/medi-tiny-GPTQ/main --text eval.json --window 1024"
    )]
    Verify(VerifyArgs),
    /// Continue a prompt, or talk
    #[command(
        after_help = "Examples:\n  gptq generate out/medi-tiny-GPTQ/main --prompt \"Asthma is\" --greedy --max-new-tokens 64\n  gptq generate out/medi-tiny-GPTQ/main --chat --system \"You are a careful doctor.\""
    )]
    Generate(GenerateArgs),
    /// Say what a checkpoint is, whoever wrote it
    #[command(after_help = "Example:\n  gptq inspect out/medi-tiny-GPTQ/main")]
    Inspect(InspectArgs),
    /// Print a shell's completion script
    #[command(
        after_help = "Example:\n  gptq completions bash > ~/.local/share/bash-completion/completions/gptq"
    )]
    Completions(CompletionsArgs),
}

#[derive(Args)]
pub(crate) struct RecipeArgs {
    /// The recipe (TOML)
    pub recipe: PathBuf,
    /// Only this branch; may be repeated
    #[arg(long, value_name = "NAME")]
    pub branch: Vec<String>,
    /// Calibrate on this file instead
    #[arg(long, value_name = "PATH")]
    pub calibration: Option<PathBuf>,
    /// Write branches below this directory instead
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Calibration windows
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Tokens per calibration window
    #[arg(long, value_name = "N")]
    pub seq_len: Option<usize>,
    /// Seed of the calibration draw
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

#[derive(Args)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: Device,
    /// Keep device memory within this, such as 22GiB; hidden states that do not fit stay on the
    /// host
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub device_memory: Option<u64>,
    /// Print where the time went; waits for the device after every step
    #[arg(long)]
    pub profile: bool,
    /// Measure each finished branch's perplexity on this text
    #[arg(long, value_name = "FILE")]
    pub perplexity: Option<PathBuf>,
    /// Check everything and show the plan, but run nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Plan from this config.json alone; the recipe's model need not be here
    #[arg(long, value_name = "FILE")]
    pub model_config: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// A branch directory, or a dense checkpoint
    pub dir: PathBuf,
    /// Measure perplexity on this file: a JSON list of texts, or plain text
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub window: usize,
    /// Run this dense model on the same text beside it
    #[arg(long, value_name = "MODEL", requires = "text")]
    pub against: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: Device,
}

impl RecipeArgs {
    /// Reads the recipe and applies the flags.
    pub(crate) fn load(self, perplexity: Option<PathBuf>) -> anyhow::Result<Recipe> {
        let mut recipe = Recipe::read(&self.recipe)?;
        recipe.apply(RecipeOverrides {
            branches: self.branch,
            calibration: self.calibration,
            output: self.output,
            samples: self.samples,
            seq_len: self.seq_len,
            seed: self.seed,
            evaluation: perplexity,
        })?;
        Ok(recipe)
    }
}

/// Prints a plan's warnings where a person sees them without mixing them into the output.
pub(crate) fn warn(plan: &Plan) {
    for warning in &plan.warnings {
        eprintln!("gptq: warning: {warning}");
    }
}
