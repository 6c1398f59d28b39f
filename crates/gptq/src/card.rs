//! `gptq card`.

use std::fs;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use gptq_format::write_file;
use gptq_report::{CardSettings, Matrix, PromptTemplate, card, facts};

use crate::cli::CardArgs;
use crate::log;

pub(crate) fn run(args: CardArgs) -> Result<()> {
    let matrix = Matrix::read(&args.dir)?;
    let settings = CardSettings {
        repo: args.repo,
        prompt: match &args.prompt_template {
            Some(name) => PromptTemplate::load(name, matrix.dir())?,
            None => PromptTemplate::of(matrix.dir())?,
        },
        base_card: args.base_card.as_deref().map(read).transpose()?,
        base_model: args.base_model,
        dataset: args.dataset,
        license: args.license,
        language: args.language,
    };
    let facts = facts(&matrix, &settings)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&facts)?);
        return Ok(());
    }
    let template = match &args.card_template {
        Some(path) => Some((path.display().to_string(), read(path)?)),
        None => None,
    };
    let template = template.as_ref();
    let text = card(
        &facts,
        template.map(|(name, text)| (name.as_str(), text.as_str())),
    )?;
    let path = args.output.unwrap_or_else(|| args.dir.join("README.md"));
    if !args.force && path.exists() && read(&path)? != text {
        bail!(
            "{} exists with different content; --force replaces it, --output names another file",
            path.display()
        );
    }
    write_file(&path, text.as_bytes())?;
    for (key, option) in facts.missing() {
        log::warning(&format!("the card has no {key}; {option} adds it"));
    }
    for (branch, why) in facts.failures() {
        log::warning(&format!(
            "{branch} failed verification, which the card states ({why}); gptq publish refuses it"
        ));
    }
    println!("written to {}", path.display());
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| anyhow!("{}: {e}", path.display()))
}
