//! Checks of a run's texts before it starts: the tokenizer, the calibration rows, and the
//! evaluation text.

use std::fs::File;
use std::path::Path;

use gptq_calibration::{
    Calibration, CalibrationError, EvaluationText, Rendering, TextTokenizer, evaluation_tokens,
    first_look,
};

use gptq_format::read_json_within;
use serde_json::Value;

use crate::{Plan, PlanError};

/// Most bytes of `tokenizer.json`.
const MAX_TOKENIZER: u64 = 128 << 20;

/// Depth of the checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// A quick look: large files are not read to their end.
    First,
    /// Everything that a run reads.
    Whole,
}

/// Checks the tokenizer and both texts of a plan, and returns warnings, one line each.
///
/// # Errors
/// Errors that would end a run: a missing file or column, a row that cannot be rendered, a chat
/// template that does not parse, token ids beyond the vocabulary, too little text.
pub fn check_texts(plan: &Plan, look: Look) -> Result<Vec<String>, PlanError> {
    let dir = &plan.model_dir;
    let is_alone = !dir.join("tokenizer.json").exists() && !has_weights(plan);
    let tokenizer = match is_alone {
        true => None,
        false => Some(TextTokenizer::load(dir)?),
    };
    let mut warnings = Vec::new();
    let settings = &plan.calibration;
    let rows = match (look, &tokenizer) {
        (Look::Whole, Some(tokenizer)) if settings.source.is_here() => {
            Calibration::draw(settings, tokenizer)?.warnings()
        }
        _ => first_look(settings, tokenizer.as_ref())?,
    };
    if let Some((path, _)) = &plan.evaluation {
        File::open(path).map_err(|source| CalibrationError::Io {
            path: path.clone(),
            source,
        })?;
        if settings.source.holds(path)? {
            return Err(CalibrationError::CalibratedOn { path: path.clone() }.into());
        }
    }
    let Some(tokenizer) = &tokenizer else {
        warnings.push(format!(
            "{}: contains neither a tokenizer.json nor weights; tokens are not checked",
            dir.display()
        ));
        return Ok(warnings);
    };
    let joins = match settings.rendering {
        Rendering::Template(_) | Rendering::Messages { chatml: true, .. } => true,
        Rendering::Messages { .. } | Rendering::Tokens { .. } => plan.evaluation.is_some(),
    };
    warnings.extend(tokenizer.end_warning().filter(|_| joins));
    warnings.extend(rows);
    if let Some((path, window)) = &plan.evaluation {
        let text = match look {
            Look::First => EvaluationText::first_look(path, tokenizer, *window)?,
            Look::Whole => evaluation_tokens(path, tokenizer, *window)?,
        };
        warnings.extend(text.warnings());
    }
    Ok(warnings)
}

/// Returns what a reader makes of the model's tokenizer that others do not, for the plan; `None` where all agree.
pub fn tokenizer_note(plan: &Plan) -> Option<&'static str> {
    lacks_scores(&plan.model_dir).then_some(
        "llama.cpp: the model has no tokenizer.model; its converter then guesses the scores of tokens, and some texts \
         are split otherwise; gptq export --to gguf takes them from tokenizer.json",
    )
}

/// Returns true if the tokenizer in `dir` is one of SentencePiece whose own file, which has the scores, is missing.
fn lacks_scores(dir: &Path) -> bool {
    // What cannot be read is refused elsewhere.
    let tokenizer: Value = match dir.join("tokenizer.model").exists() {
        true => return false,
        false => read_json_within(&dir.join("tokenizer.json"), MAX_TOKENIZER).unwrap_or_default(),
    };
    let steps = tokenizer["pre_tokenizer"].to_string();
    tokenizer["model"]["byte_fallback"] == true && !steps.contains("\"ByteLevel\"")
}

/// Returns true if the model's directory holds more than its shapes.
fn has_weights(plan: &Plan) -> bool {
    let entries = std::fs::read_dir(&plan.model_dir).into_iter().flatten();
    let mut names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.any(|name| {
        [".safetensors", ".bin", ".pt", ".pth"]
            .iter()
            .any(|end| name.ends_with(end))
    })
}
