//! Results of lm-evaluation-harness, as it writes them itself: `{"results": {TASK: {"acc,none": ...}}, "n-shot", "n-samples",
//! "lm_eval_version", ...}`.

use std::path::Path;

use gptq_format::{FormatError, read_json};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Proportion;

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
    pub accuracy: Option<Proportion>,
    /// `acc_norm`, if it was measured.
    pub accuracy_norm: Option<Proportion>,
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
    let model = model(&file);
    let count = |value: Option<&Value>| usize::try_from(value?.as_u64()?).ok();
    let mut found = Vec::new();
    for (task, measured) in results {
        let measurement = |metric: &str| {
            let value = measured.get(format!("{metric},none"))?.as_f64()?;
            let stderr = measured.get(format!("{metric}_stderr,none"));
            let stderr = stderr.and_then(Value::as_f64);
            Some(Proportion { value, stderr })
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

/// Returns the last part of the model's name, as it was given to the harness: in `model_args`, a text or an object, or, from a
/// program, in place of the kind of model.
fn model(file: &Value) -> String {
    let config = file.get("config").unwrap_or(&Value::Null);
    let arguments = config.get("model_args").unwrap_or(&Value::Null);
    let in_text = arguments.as_str().and_then(|text| {
        let mut pairs = text.split(',');
        pairs.find_map(|pair| pair.trim().strip_prefix("pretrained="))
    });
    let in_object = arguments.get("pretrained").and_then(Value::as_str);
    let kind = config.get("model").and_then(Value::as_str);
    let name = in_text.or(in_object).or(kind).unwrap_or_default();
    let last = Path::new(name).file_name().unwrap_or_default();
    last.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_harness_wrote_is_read_with_its_version() {
        let file = [
            env!("CARGO_MANIFEST_DIR"),
            "../../tests/golden/eval/results.json",
        ];
        let found = read_harness(&file.iter().collect::<PathBuf>()).unwrap();
        let [pubmedqa, spaced] = found.as_slice() else {
            unreachable!("{found:?}");
        };
        assert_eq!(spaced.heading(), "spaced, by lm_eval 0.4.13");
        assert_eq!(
            (spaced.model.as_str(), spaced.questions),
            ("medi-tiny", Some(9))
        );
        let accuracy = spaced.accuracy.unwrap();
        assert_eq!(accuracy.value, 4.0 / 9.0);
        assert!((accuracy.stderr.unwrap() - 0.175_682).abs() < 1e-6);
        assert_eq!((pubmedqa.shots, pubmedqa.questions), (Some(3), Some(5)));
        assert_eq!(pubmedqa.heading(), "pubmedqa-3, 3 shots, by lm_eval 0.4.13");
    }

    #[test]
    fn a_model_is_named_without_its_directories_and_other_files_are_refused() {
        for config in [
            json!({"model": "hf", "model_args": "dtype=float16, pretrained=/home/me/medi-tiny,x=1"}),
            json!({"model": "hf", "model_args": {"pretrained": "me/medi-tiny"}}),
            json!({"model": "models/medi-tiny", "model_args": null}),
        ] {
            assert_eq!(model(&json!({"config": config})), "medi-tiny");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.json");
        for (text, word) in [
            ("{}", "results"),
            (
                r#"{"results": {"a": {"acc,none": 0.5}}}"#,
                "lm_eval_version",
            ),
            (
                r#"{"results": {"a": {"bleu,none": 0.5}}, "lm_eval_version": "0.4.13"}"#,
                "no task",
            ),
            (
                r#"{"results": {"a": {"acc,none": 1.5}}, "lm_eval_version": "0.4.13"}"#,
                "between 0 and 1",
            ),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read_harness(&path).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
