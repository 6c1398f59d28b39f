//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use gptq_kernels::Devices;
use gptq_plan::{Plan, Recipe, parse_size};
use gptq_ranks::Threads;
use humantime::parse_duration;

use crate::bug;
use crate::eval::EvalArgs;
use crate::export::ExportArgs;
use crate::generate::GenerateArgs;
use crate::init::InitArgs;
use crate::inspect::InspectArgs;
use crate::log;
use crate::model_recipe::find_recipe;
use crate::recipe_args::{ChangeArgs, DraftArgs, RowArgs};
use crate::verify::VerifyArgs;

/// Quantize language models with GPTQ: every size of a model in one run, each read back and checked.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  gptq quantize models/my-model --calibration my.jsonl --bits 4\n  gptq quantize configs/tiny.toml"
)]
pub(crate) struct Cli {
    /// Append a log to this file; RUST_LOG chooses what is logged
    #[arg(long, global = true, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Write a commented recipe for a model, to change and to quantize
    #[command(
        after_help = "Examples:\n  gptq init models/my-model --calibration my.jsonl\n  \
                      gptq init epfl-llm/meditron-7b --matrix published -"
    )]
    Init(InitArgs),
    /// Show what a run would produce: sizes, memory, and which clients load each branch
    #[command(
        after_help = "Example:\n  gptq plan configs/meditron-7b.toml --model-config config.json"
    )]
    Plan(PlanArgs),
    /// Inspect calibration data
    Calibration(CalibrationArgs),
    /// Quantize a model: every branch of a recipe, or branches that flags describe
    #[command(
        after_help = "Examples:\n  gptq quantize configs/tiny.toml --branch main --perplexity eval.json\n  \
                      gptq quantize models/my-model --calibration my.jsonl --bits 4"
    )]
    Quantize(QuantizeArgs),
    /// Quantize finished branches again with other calibration data, and compare
    #[command(
        after_help = "Example:\n  gptq requantize out/medi-tiny-GPTQ --calibration my.jsonl --column text"
    )]
    Requantize(RequantizeArgs),
    /// Reopen a branch or all branches of a directory, check every tensor, and compare with the
    /// dense model
    #[command(
        after_help = "Example:\n  gptq verify out/medi-tiny-GPTQ --text eval.json --against models/medi-tiny"
    )]
    Verify(VerifyArgs),
    /// Write report.html and tables about finished branches
    #[command(after_help = "Example:\n  gptq report out/medi-tiny-GPTQ")]
    Report(ReportArgs),
    /// Write the model card, the README.md of a Hub repository
    #[command(
        after_help = "Example:\n  gptq card out/meditron-7B-GPTQ --repo user/meditron-7B-GPTQ \\\n    \
                      --base-card models/meditron-7b/README.md"
    )]
    Card(CardArgs),
    /// Upload every verified branch to the Hub, each as the revision of its name
    #[command(
        after_help = "Example:\n  gptq publish out/meditron-7B-GPTQ --repo user/meditron-7B-GPTQ --dry-run"
    )]
    Publish(PublishArgs),
    /// Write finished branches of any tool in another format, codes and scales as they are
    #[command(
        after_help = "Example:\n  gptq export out/medi-tiny-GPTQ/gptq-8bit--1g-actorder_True --to compressed-tensors --output out/for-vllm"
    )]
    Export(ExportArgs),
    /// Ask branches and dense models multiple-choice questions, and compare their accuracies
    #[command(
        after_help = "Example:\n  gptq eval models/medi-tiny out/medi-tiny-GPTQ --task pubmedqa/ori_pqal.json --preset pubmedqa --shots 3"
    )]
    Eval(EvalArgs),
    /// Continue a prompt, or chat
    #[command(
        after_help = "Examples:\n  gptq generate out/medi-tiny-GPTQ/main --prompt \"Asthma is\" --greedy --max-new-tokens 64\n  gptq generate out/medi-tiny-GPTQ/main --chat --system \"You are a careful doctor.\""
    )]
    Generate(GenerateArgs),
    /// Describe a checkpoint of any tool
    #[command(after_help = "Example:\n  gptq inspect out/medi-tiny-GPTQ/main")]
    Inspect(InspectArgs),
    /// Print a shell's completion script
    #[command(
        after_help = "Example:\n  gptq completions bash > ~/.local/share/bash-completion/completions/gptq"
    )]
    Completions(CompletionsArgs),
}

impl Command {
    /// Describes the command for a bug report, without local paths.
    pub(crate) fn about(&self) -> String {
        let (name, path) = match self {
            Command::Init(_) => ("init", None),
            Command::Quantize(args) => ("quantize", args.recipe.as_ref()),
            Command::Plan(args) => ("plan", Some(&args.recipe.recipe)),
            Command::Calibration(CalibrationArgs {
                command: CalibrationCommand::Show(args),
            }) => ("calibration show", Some(&args.recipe.recipe)),
            Command::Requantize(args) => ("requantize", Some(&args.dir)),
            Command::Publish(args) => ("publish", Some(&args.dir)),
            Command::Report(args) => ("report", Some(&args.dir)),
            Command::Card(args) => ("card", Some(&args.dir)),
            Command::Export(args) => ("export", Some(&args.dir)),
            Command::Verify(_) => ("verify", None),
            Command::Eval(_) => ("eval", None),
            Command::Generate(_) => ("generate", None),
            Command::Inspect(_) => ("inspect", None),
            Command::Completions(_) => ("completions", None),
        };
        match path {
            Some(path) => format!("{name} {}", bug::public(path)),
            None => name.to_owned(),
        }
    }
}

#[derive(Args)]
pub(crate) struct CompletionsArgs {
    /// Shell to write completions for
    pub shell: Shell,
}

#[derive(Args)]
pub(crate) struct RecipeArgs {
    /// The recipe (TOML); or a model, its directory or owner/name on the Hub, with flags in place of a recipe
    #[arg(value_name = "RECIPE|MODEL")]
    pub recipe: PathBuf,
    #[command(flatten)]
    pub draft: DraftArgs,
    #[command(flatten)]
    pub changes: ChangeArgs,
}

/// Flags for running a recipe.
#[derive(Args)]
pub(crate) struct RunArgs {
    /// auto, cpu, cuda, cuda:N, or GPUs that share the run, such as cuda:0,1 or cuda:all
    #[arg(short, long, default_value = "auto")]
    pub device: Devices,
    /// Share the run among this many ranks of this process: 1, 2, 4 or 8, on the CPU
    #[arg(long, value_name = "N", value_parser = parse_ranks)]
    pub ranks: Option<usize>,
    /// Wait this long for the ranks that a launcher (torchrun, srun, mpirun) starts
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "60s")]
    pub join_timeout: Duration,
    /// Limit device memory to this, such as 22GiB; hidden states that do not fit stay on the host
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub device_memory: Option<u64>,
    /// Limit host memory to this, such as 64GiB; hidden states that do not fit go to --scratch
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub host_memory: Option<u64>,
    /// Directory for hidden states that do not fit into memory [default: the output directory]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Save the hidden states in the output directory each time this much work was done, which
    /// limits what an interrupted run has to repeat
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "10min")]
    pub keep_every: Duration,
    /// Print where the time went; synchronizes with the device after every step
    #[arg(long)]
    pub profile: bool,
    /// Measure each finished branch's perplexity on this text: plain text, a JSON list of texts, or
    /// rows with a column text (.json, .jsonl, .csv, .parquet, .arrow), also as .gz or .zst
    #[arg(long, value_name = "FILE")]
    pub perplexity: Option<PathBuf>,
    /// Start over: quantize every branch, ignoring finished and interrupted runs in the output
    /// directory
    #[arg(long)]
    pub restart: bool,
    /// Print the result as JSON to standard output, and progress to standard error
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(crate) struct QuantizeArgs {
    /// The recipe (TOML); or a model, its directory or owner/name on the Hub, with --calibration
    #[arg(required_unless_present = "resume", value_name = "RECIPE|MODEL")]
    pub recipe: Option<PathBuf>,
    /// Resume the interrupted run in this directory, with the recipe and flags it was started with
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["recipe", "changes", "inputs", "reading", "drafts", "restart"]
    )]
    pub resume: Option<PathBuf>,
    #[command(flatten)]
    pub draft: DraftArgs,
    #[command(flatten)]
    pub changes: ChangeArgs,
    #[command(flatten)]
    pub run: RunArgs,
    /// Check everything and show the plan without running it
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Args)]
pub(crate) struct RequantizeArgs {
    /// A directory of finished branches, or a single branch
    pub dir: PathBuf,
    /// Calibrate on this: a file, a glob, or a dataset on the Hub
    #[arg(short, long, value_name = "SOURCE")]
    pub calibration: String,
    /// The base model: its directory, or owner/name on the Hub [default: from the reports]
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Quantize only this branch; may be repeated
    #[arg(long, value_name = "NAME")]
    pub branch: Vec<String>,
    /// Write branches below this directory [default: DIR-recalibrated]
    #[arg(short, long, value_name = "DIR2")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub rows: RowArgs,
    /// Number of calibration windows [default: as before]
    #[arg(short = 'n', long, value_name = "N")]
    pub samples: Option<usize>,
    /// Tokens per calibration window [default: as before]
    #[arg(long, value_name = "N")]
    pub seq_len: Option<usize>,
    #[command(flatten)]
    pub run: RunArgs,
}

#[derive(Args)]
pub(crate) struct PublishArgs {
    /// A directory of finished branches
    pub dir: PathBuf,
    /// Target repository, owner/name; created if missing
    #[arg(long, value_name = "OWNER/NAME")]
    pub repo: String,
    /// Create the repository as private
    #[arg(long)]
    pub private: bool,
    /// Show what would be uploaded, without uploading
    #[arg(long)]
    pub dry_run: bool,
    /// Upload branches without a passing verify.json too
    #[arg(long)]
    pub unverified: bool,
    /// Also remove weights that gptq did not publish: delete those without a local file, replace
    /// the others
    #[arg(long)]
    pub delete: bool,
    /// Print what was uploaded as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(crate) struct CalibrationArgs {
    #[command(subcommand)]
    pub command: CalibrationCommand,
}

#[derive(Subcommand)]
pub(crate) enum CalibrationCommand {
    /// Show a recipe's calibration data, its first window, and the overlap with the evaluation text
    #[command(after_help = "Example:\n  gptq calibration show configs/tiny.toml")]
    Show(ShowArgs),
}

#[derive(Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// The evaluation text to compare with, instead of the recipe's; formats as for quantize
    /// --perplexity
    #[arg(long, value_name = "FILE")]
    pub perplexity: Option<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Plan from this config.json alone; the recipe's model need not be downloaded
    #[arg(long, value_name = "FILE")]
    pub model_config: Option<PathBuf>,
    /// Show which branches can be split over this many devices, and by which clients
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=1024))]
    pub tp: Option<u16>,
    /// Show memory, traffic and time of a run that this many GPUs, or ranks of CPUs, share
    #[arg(long, value_name = "N", value_parser = parse_ranks)]
    pub devices: Option<usize>,
    /// Print the plan as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(crate) struct ReportArgs {
    /// A branch directory, or a directory of branches
    pub dir: PathBuf,
    /// Print the table as JSON as well
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub(crate) struct CardArgs {
    /// A branch directory, or a directory of branches
    pub dir: PathBuf,
    /// Hub repository that the branches will be published in
    #[arg(long, value_name = "USER/NAME")]
    pub repo: String,
    /// own (the tokenizer's chat template), chatml, llama-2, alpaca, plain, or a file with {prompt}
    /// in place of the user's text [default: own if there is one, else plain]
    #[arg(long, value_name = "NAME")]
    pub prompt_template: Option<String>,
    /// A minijinja template instead of the built-in one; --json prints its variables
    #[arg(long, value_name = "FILE")]
    pub card_template: Option<PathBuf>,
    /// The base model's own card: it is appended, and provides licence and language
    #[arg(long, value_name = "FILE")]
    pub base_card: Option<PathBuf>,
    /// Hub id of the base model, if the reports do not have it
    #[arg(long, value_name = "ID")]
    pub base_model: Option<String>,
    /// Hub id of the calibration data, if the reports do not have it
    #[arg(long, value_name = "ID")]
    pub dataset: Option<String>,
    /// Licence identifier, instead of the base card's
    #[arg(long, value_name = "ID")]
    pub license: Option<String>,
    /// Language code, instead of the base card's
    #[arg(long, value_name = "CODE")]
    pub language: Option<String>,
    /// Output file [default: README.md in DIR]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Replace a file with different content
    #[arg(long)]
    pub force: bool,
    /// Print the template's variables as JSON, and write nothing
    #[arg(long)]
    pub json: bool,
}

/// Parses a number of ranks that can share a run.
fn parse_ranks(text: &str) -> Result<usize, String> {
    let ranks = text.parse::<usize>().map_err(|error| error.to_string())?;
    Threads::ranks(ranks).map_err(|error| error.to_string())?;
    Ok(ranks)
}

impl RecipeArgs {
    /// Reads the recipe, or makes one of the model, and applies the flags. With `config`, a model's config is that file.
    pub(crate) fn load(
        self,
        perplexity: Option<PathBuf>,
        config: Option<&Path>,
    ) -> anyhow::Result<Recipe> {
        let found = find_recipe(&self.recipe, self.draft, self.changes, perplexity, config)?;
        Ok(found.recipe)
    }
}

/// Prints a plan's warnings to standard error.
pub(crate) fn warn(plan: &Plan) {
    for warning in &plan.warnings {
        log::warning(warning);
    }
}
