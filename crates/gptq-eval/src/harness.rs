//! Results of lm-evaluation-harness, as it writes them itself: `{"results": {TASK: {"acc,none": ...}}, "n-shot", "n-samples",
//! "lm_eval_version", ...}`.

use std::path::Path;

use gptq_format::{FormatError, read_json};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Measurement;

/// Most bytes of a name.
const MAX_NAME: usize = 1024;

/// A task in a file of results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HarnessResult {
    /// Name of the task.
    pub task: String,
    /// Version of lm_eval.
    pub version: String,
    /// Model as it was given to the harness; a directory without those above it.
    pub model: String,
    /// Number of shots, if the file says.
    pub shots: Option<usize>,
    /// Number of questions, if the file says.
    pub questions: Option<usize>,
    /// `acc`, if it was measured.
    pub accuracy: Option<Measurement>,
    /// `acc_norm`, if it was measured.
    pub accuracy_norm: Option<Measurement>,
}

impl HarnessResult {
    /// Returns its heading in tables: `pubmedqa, 3 shots, by lm_eval 0.4.13`.
    pub fn heading(&self) -> String {
        let shots = match self.shots {
            None | Some(0) => String::new(),
            Some(1) => ", 1 shot".to_owned(),
            Some(n) => format!(", {n} shots"),
        };
        format!("{}{shots}, by lm_eval {}", self.task, self.version)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        let texts = [&self.task, &self.version, &self.model];
        let shares = [self.accuracy, self.accuracy_norm].into_iter().flatten();
        let within = shares.into_iter().all(|it| (0.0..=1.0).contains(&it.value));
        match within && texts.iter().all(|it| it.len() <= MAX_NAME) {
            true => Ok(()),
            false => Err(format!(
                "the harness's result of {:?} has an accuracy that is not between 0 and 1, or a name over {MAX_NAME} bytes",
                self.task.chars().take(64).collect::<String>()
            )),
        }
    }
}

/// Reads the accuracies in a file of results. Tasks without any, such as those of generated text, are left out.
///
/// # Errors
/// A file that cannot be read, is none of the harness's, or has no accuracy in it.
pub fn read_harness(path: &Path) -> Result<Vec<HarnessResult>, FormatError> {
    let file: Value = read_json(path)?;
    let wrong = |reason: &str| FormatError::Malformed {
        path: path.into(),
        reason: reason.to_owned(),
    };
    let results = file.get("results").and_then(Value::as_object);
    let results = results.ok_or_else(|| {
        wrong("no \"results\": not a results file of lm-evaluation-harness (--output_path)")
    })?;
    let version = file.get("lm_eval_version").and_then(Value::as_str);
    let version = version.ok_or_else(|| {
        wrong("no \"lm_eval_version\": not a results file of lm-evaluation-harness 0.4 or later")
    })?;
    let model = file.get("model_name").and_then(Value::as_str);
    let model = Path::new(model.unwrap_or_default()).file_name();
    let model = model.unwrap_or_default().to_string_lossy().into_owned();
    let count = |value: Option<&Value>| usize::try_from(value?.as_u64()?).ok();
    let mut found = Vec::new();
    for (task, measured) in results {
        let measurement = |metric: &str| {
            let value = measured.get(format!("{metric},none"))?.as_f64()?;
            let stderr = measured.get(format!("{metric}_stderr,none"));
            let stderr = stderr.and_then(Value::as_f64);
            Some(Measurement { value, stderr })
        };
        let result = HarnessResult {
            task: task.clone(),
            version: version.to_owned(),
            model: model.clone(),
            shots: count(file.get("n-shot").and_then(|it| it.get(task))),
            questions: count(
                file.get("n-samples")
                    .and_then(|it| it.get(task)?.get("effective")),
            ),
            accuracy: measurement("acc"),
            accuracy_norm: measurement("acc_norm"),
        };
        if result.accuracy.is_some() || result.accuracy_norm.is_some() {
            result.check().map_err(|why| wrong(&why))?;
            found.push(result);
        }
    }
    match found.is_empty() {
        true => Err(wrong("no task of it has an acc or acc_norm")),
        false => Ok(found),
    }
}
