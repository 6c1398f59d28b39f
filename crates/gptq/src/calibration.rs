//! `gptq calibration show`.

use anyhow::Result;
use gptq_calibration::{
    Calibration, Manifest, Overlap, RUN, Sampling, TextTokenizer, evaluation_tokens,
};
use gptq_pipeline::Plan;
use serde::Serialize;

use crate::cli::{CalibrationArgs, CalibrationCommand, warn};
use crate::hub::{self, Need};
use crate::{log, size, terminal};

/// What `--json` prints.
#[derive(Serialize)]
struct Shown<'a> {
    manifest: &'a Manifest,
    first_window: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    evaluation: Option<Evaluation>,
}

#[derive(Serialize)]
struct Evaluation {
    tokens: usize,
    shared_tokens: usize,
}

pub(crate) fn run(args: CalibrationArgs) -> Result<()> {
    let CalibrationCommand::Show(args) = args.command;
    let recipe = args.recipe.load(args.perplexity)?;
    let plan = Plan::new(&recipe, &hub::fetch(&recipe, Need::Shapes, true)?)?;
    warn(&plan);
    let tokenizer = TextTokenizer::load(&plan.model_dir)?;
    let drawn = Calibration::draw(&plan.calibration, &tokenizer)?;
    let overlap = match &plan.evaluation {
        Some((text, window)) => {
            Some(drawn.overlap(&evaluation_tokens(text, &tokenizer, *window)?)?)
        }
        None => None,
    };
    let first_window = tokenizer.decode(&drawn.windows[0])?;
    if args.json {
        let shown = Shown {
            manifest: &drawn.manifest,
            first_window,
            evaluation: overlap.map(|o| Evaluation {
                tokens: o.total,
                shared_tokens: o.shared,
            }),
        };
        println!("{}", serde_json::to_string_pretty(&shown)?);
    } else {
        print(&drawn.manifest);
        println!("\nfirst window:\n{}", terminal::lines(&first_window));
    }
    if let Some(Overlap { shared, total }) = overlap.filter(|o| o.shared > 0) {
        let share = 100.0 * shared as f64 / total as f64;
        log::warning(&format!(
            "{shared} of the evaluation text's {total} tokens ({share:.1} %) lie in runs of \
             {RUN} or more that the calibration rows hold too; perplexity on them says little"
        ));
    }
    Ok(())
}

fn print(manifest: &Manifest) {
    let line = |name: &str, value: String| println!("{name:<12}{}", terminal::line(&value));
    line("source", manifest.source.clone());
    if let Some(revision) = &manifest.revision {
        line("revision", revision.clone());
    }
    for file in &manifest.files {
        let size = size::decimal(file.bytes);
        line(
            "file",
            format!("{}, {size}, SHA-256 {}", file.name, file.sha256),
        );
    }
    let mut rows = format!("{} used of {}", manifest.row_count, manifest.rows);
    if manifest.min_tokens > 0 {
        rows += &format!(", of at least {} tokens", manifest.min_tokens);
    }
    if manifest.dedupe {
        rows += ", without repeats";
    }
    if manifest.null_rows > 0 {
        rows += &format!(", {} left out for a null", manifest.null_rows);
    }
    line("rows", rows);
    line("document", format!("{:?}", manifest.template));
    line(
        "tokenizer",
        format!("SHA-256 {}", manifest.tokenizer_sha256),
    );
    line("tokens", manifest.available_tokens.to_string());
    let sampling = match manifest.sampling {
        Sampling::Concatenate => "consecutive".to_owned(),
        Sampling::RandomWindows => format!("drawn with seed {}", manifest.seed),
    };
    let (samples, length) = (manifest.samples, manifest.seq_len);
    line("windows", format!("{samples} of {length}, {sampling}"));
    let share = 100.0 * manifest.unique_tokens as f64 / (samples * length) as f64;
    let unique = manifest.unique_tokens;
    line(
        "unique",
        format!("{unique} tokens, {share:.1} % of what the windows hold"),
    );
}
