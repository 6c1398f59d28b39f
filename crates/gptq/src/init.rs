//! `gptq init`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use gptq_format::write_file;
use gptq_plan::last_name;

use crate::cli::InitArgs;
use crate::model_recipe::draft_recipe;

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
