//! `gptq calibration show`.

use std::path::Path;

use anyhow::Result;
use gptq_calibration::{
    Calibration, EvaluationText, Manifest, Overlap, RUN, Sampling, SpecialToken, TextTokenizer,
};
use gptq_plan::Plan;
use serde::Serialize;

use crate::cli::{CalibrationArgs, CalibrationCommand, warn};
use crate::hub::{self, Need};
use crate::table::count;
use crate::{size, terminal};

/// JSON output of `--json`.
#[derive(Serialize)]
struct Shown<'a> {
    manifest: &'a Manifest,
    /// Token between documents.
    end_token: Option<Token<'a>>,
    /// Token that the tokenizer puts before each document.
    bos_token: Option<Token<'a>>,
    first_window: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    evaluation: Option<EvaluationSummary>,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct Token<'a> {
    text: &'a str,
    id: u32,
}

#[derive(Serialize)]
struct EvaluationSummary {
    text: String,
    documents: usize,
    #[serde(skip_serializing_if = "is_zero")]
    rows_left_out: usize,
    tokens: usize,
    window: usize,
    windows: usize,
    /// Tokens after the last full window.
    left_over: usize,
    shared_tokens: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

pub(crate) fn run(args: CalibrationArgs) -> Result<()> {
    let CalibrationCommand::Show(args) = args.command;
    let recipe = args.recipe.load(args.perplexity, None)?;
    let mut plan = Plan::new(&recipe, &hub::fetch(&recipe, Need::Shapes, true)?)?;
    let tokenizer = TextTokenizer::load(&plan.model_dir)?;
    let drawn = Calibration::draw(&plan.calibration, &tokenizer)?;
    plan.warnings.extend(tokenizer.end_warning());
    plan.warnings.extend(drawn.warnings());
    let evaluation = match &plan.evaluation {
        Some((path, window)) => {
            let text = EvaluationText::read(path, &tokenizer, *window)?;
            let overlap = drawn.overlap(&text.tokens)?;
            plan.warnings.extend(text_warnings(&text, overlap));
            Some(evaluation(path, &text, overlap))
        }
        None => None,
    };
    warn(&plan);
    let first_window = tokenizer.decode(&drawn.windows[0])?;
    if args.json {
        let shown = Shown {
            manifest: &drawn.manifest,
            end_token: tokenizer.end().map(Token::of),
            bos_token: tokenizer.beginning().map(Token::of),
            first_window,
            evaluation,
            warnings: plan.warnings,
        };
        println!("{}", serde_json::to_string_pretty(&shown)?);
        return Ok(());
    }
    print(&drawn.manifest, &tokenizer);
    if let Some(evaluation) = evaluation {
        line("evaluation", evaluation.describe());
    }
    println!("\nfirst window:\n{}", terminal::lines(&first_window));
    Ok(())
}

impl Token<'_> {
    fn of(token: &SpecialToken) -> Token<'_> {
        Token {
            text: &token.text,
            id: token.id,
        }
    }
}

/// Warns about an evaluation text, given its overlap with the calibration text.
fn text_warnings(text: &EvaluationText, overlap: Overlap) -> Vec<String> {
    let Overlap { shared, total } = overlap;
    let short = (total < text.window).then(|| {
        format!(
            "the evaluation text's {total} tokens do not fill one window of {}; the largest that fits is {total}: \
             --window {total}, or window = {total} under [evaluation]",
            text.window
        )
    });
    let shared = (shared > 0).then(|| {
        let share = 100.0 * shared as f64 / total as f64;
        format!(
            "{shared} of the evaluation text's {total} tokens ({share:.1} %) are in runs of \
             {RUN} or more that also occur in the calibration rows; perplexity on them is not meaningful"
        )
    });
    let lines = short.into_iter().chain(text.warnings());
    lines.chain(shared).collect()
}

fn evaluation(path: &Path, text: &EvaluationText, overlap: Overlap) -> EvaluationSummary {
    EvaluationSummary {
        text: path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned(),
        documents: text.documents,
        rows_left_out: text.rows_left_out,
        tokens: text.tokens.len(),
        window: text.window,
        windows: text.windows().count(),
        left_over: text.left_over(),
        shared_tokens: overlap.shared,
    }
}

impl EvaluationSummary {
    fn describe(&self) -> String {
        let left_out = match self.rows_left_out {
            0 => String::new(),
            rows => format!(", {} without text skipped", count(rows, "row")),
        };
        let left_over = match self.left_over {
            0 => String::new(),
            tokens => format!(", {} after the last not scored", count(tokens, "token")),
        };
        let overlap = match self.shared_tokens {
            0 => "none".to_owned(),
            tokens => count(tokens, "token"),
        };
        format!(
            "{}: {}{left_out}, {}, {} of {}{left_over}; overlap with the calibration rows: {overlap}",
            self.text,
            count(self.documents, "document"),
            count(self.tokens, "token"),
            count(self.windows, "window"),
            self.window
        )
    }
}

/// Describes a range of rows.
fn range(rows: &str) -> String {
    match rows.split_once(':') {
        Some(("0", "")) => "all rows".to_owned(),
        Some((first, "")) => format!("rows {first} to the last"),
        _ => format!("rows {rows}"),
    }
}

fn line(name: &str, value: String) {
    println!("{name:<12}{}", terminal::line(&value));
}

fn print(manifest: &Manifest, tokenizer: &TextTokenizer) {
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
    let mut rows = format!("{} used of {}", manifest.row_count, range(&manifest.rows));
    if manifest.min_tokens > 0 {
        rows += &format!(", each of at least {} tokens", manifest.min_tokens);
    }
    if manifest.dedupe {
        rows += ", without repeats";
    }
    if manifest.null_rows > 0 {
        rows += &format!(", {} skipped for a null", manifest.null_rows);
    }
    if manifest.objected_rows > 0 {
        let objected = manifest.objected_rows;
        rows += &format!(", {objected} skipped because the chat template refused them");
    }
    if manifest.blank_rows > 0 {
        rows += &format!(", {} skipped without text", manifest.blank_rows);
    }
    if manifest.mended_rows > 0 {
        rows += &format!(
            ", {} with unpaired surrogates replaced",
            manifest.mended_rows
        );
    }
    line("rows", rows);
    line("document", format!("{:?}", manifest.template));
    if let Some(date) = &manifest.date {
        line("date", date.clone());
    }
    line(
        "tokenizer",
        format!("SHA-256 {}", manifest.tokenizer_sha256),
    );
    let name = |token: Option<&SpecialToken>| match token {
        Some(SpecialToken { text, id }) => format!("{text:?} ({id})"),
        None => "none".to_owned(),
    };
    let (end, beginning) = (name(tokenizer.end()), name(tokenizer.beginning()));
    line(
        "joined by",
        format!("end token {end}; before each document: {beginning}"),
    );
    let masked = match manifest.masked_tokens {
        0 => String::new(),
        masked => format!(", {masked} masked ones removed"),
    };
    line("tokens", format!("{}{masked}", manifest.available_tokens));
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
        format!("{unique} tokens, {share:.1} % of the windows' size"),
    );
}
