//! `gptq init`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use clap::Args;
use gptq_format::write_file;
use gptq_plan::last_name;

use crate::model_recipe::draft_recipe;
use crate::recipe_args::{DraftArgs, InputArgs};

#[derive(Args)]
pub(crate) struct InitArgs {
    /// The model: its directory, or owner/name on the Hub, of which only the config is read
    model: String,
    /// Recipe to write; - for standard output [default: the model's name with .toml, here]
    recipe: Option<PathBuf>,
    #[command(flatten)]
    draft: DraftArgs,
    #[command(flatten)]
    inputs: InputArgs,
    /// Held-out text that the recipe's branches will be measured on
    #[arg(long, value_name = "FILE")]
    perplexity: Option<PathBuf>,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: InitArgs) -> Result<()> {
    let own = || PathBuf::from(format!("{}.toml", last_name(&args.model)));
    let path = args.recipe.unwrap_or_else(own);
    let is_stdout = path.as_os_str() == "-";
    ensure!(
        is_stdout || args.force || !path.exists(),
        "{} exists; name another file, or replace it with --force",
        path.display()
    );
    let recipe = draft_recipe(&args.model, args.draft, args.inputs, args.perplexity, None)?;
    if is_stdout {
        print!("{}", recipe.text());
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| anyhow!("{}: {e}", parent.display()))?;
    }
    write_file(&path, recipe.text().as_bytes())?;
    let path = path.display();
    eprintln!("written to {path}; next: gptq plan {path}, then gptq quantize {path}");
    Ok(())
}
