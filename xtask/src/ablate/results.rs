//! Measurements, as `ACCURACY.json` has them: by model, row and setting. Each row is added when it is complete.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::models::Model;

const FILE: &str = "ACCURACY.json";

/// All measurements so far.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Results {
    /// Description of the second text.
    pub(super) second_name: String,
    /// Results by [`Model::name`].
    pub(super) models: BTreeMap<String, ModelResults>,
}

/// Measurements on one model.
#[derive(Serialize, Deserialize)]
pub(super) struct ModelResults {
    /// The text by which options are chosen, and the one by which nothing is.
    pub(super) texts: [Text; 2],
    /// Results by the row's key.
    pub(super) rows: BTreeMap<String, RowResults>,
}

/// A text, and the dense model's perplexity on it.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Text {
    pub(super) file: String,
    pub(super) sha256: String,
    /// Tokens scored.
    pub(super) tokens: u64,
    pub(super) dense: f64,
}

/// One row.
#[derive(Serialize, Deserialize)]
pub(super) struct RowResults {
    /// Description of the machine.
    pub(super) machine: String,
    /// Day of the measurement.
    pub(super) date: String,
    /// Seconds of the run that made all branches, from process start to exit.
    pub(super) seconds: f64,
    /// Branches by the setting's name.
    pub(super) branches: BTreeMap<String, BranchResults>,
}

/// One branch.
#[derive(Serialize, Deserialize)]
pub(super) struct BranchResults {
    /// On the first and on the second text.
    pub(super) texts: [Loss; 2],
    /// Mean relative error of the linear layers' outputs, against the original weights.
    pub(super) mean_relative_error: f64,
    /// Wall time spent on this branch alone.
    pub(super) seconds: f64,
}

/// Distance from the dense model on one text. A value that is not finite is absent.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct Loss {
    pub(super) perplexity: Option<f64>,
    /// Nats per token.
    pub(super) kl_divergence: Option<f64>,
}

impl Results {
    /// Reads the results in `dir`; empty if there are none, or only those of the form with one model.
    pub(super) fn read(dir: &Path) -> anyhow::Result<Results> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Ok(Results::default());
        }
        let read = || -> anyhow::Result<Results> {
            let value: serde_json::Value = serde_json::from_slice(&fs::read(&path)?)?;
            if value.get("models").is_none() {
                eprintln!(
                    "{}: results of one model, which are replaced",
                    path.display()
                );
                return Ok(Results::default());
            }
            Ok(serde_json::from_value(value)?)
        };
        read().with_context(|| path.display().to_string())
    }

    /// Writes the results into `dir`, so that an interruption leaves the former ones or these.
    pub(super) fn write(&self, dir: &Path) -> anyhow::Result<()> {
        let partial = dir.join(format!("{FILE}.partial"));
        fs::write(
            &partial,
            format!("{}\n", serde_json::to_string_pretty(self)?),
        )?;
        Ok(fs::rename(partial, dir.join(FILE))?)
    }

    /// Returns a row's results, if it was measured.
    pub(super) fn row(&self, model: &Model, key: &str) -> Option<&RowResults> {
        self.models.get(model.name)?.rows.get(key)
    }

    /// Adds a row, or replaces it.
    ///
    /// # Errors
    /// Rows measured on another text.
    pub(super) fn add(
        &mut self,
        model: &Model,
        key: &str,
        row: RowResults,
        texts: [Text; 2],
    ) -> anyhow::Result<()> {
        let of = (self.models)
            .entry(model.name.to_owned())
            .or_insert_with(|| ModelResults {
                texts: texts.clone(),
                rows: BTreeMap::new(),
            });
        for (before, now) in of.texts.iter().zip(&texts) {
            ensure!(
                (&before.sha256, before.tokens) == (&now.sha256, now.tokens),
                "{}: the rows in {FILE} were measured on another text ({}: {}; {}: {})",
                model.name,
                before.file,
                before.sha256,
                now.file,
                now.sha256
            );
        }
        of.rows.insert(key.to_owned(), row);
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::models::{MEDI, SMOLLM2};
    use super::*;

    pub(crate) fn text(sha256: &str, dense: f64) -> Text {
        Text {
            file: format!("{sha256}.json"),
            sha256: sha256.to_owned(),
            tokens: 1023,
            dense,
        }
    }

    pub(crate) fn row(setting: &str, perplexity: Option<f64>) -> RowResults {
        let loss = Loss {
            perplexity,
            kl_divergence: perplexity.map(|it| it / 1000.0),
        };
        let branch = BranchResults {
            texts: [loss, loss],
            mean_relative_error: 0.01,
            seconds: 0.5,
        };
        RowResults {
            machine: "A machine".to_owned(),
            date: "2026-12-01".to_owned(),
            seconds: 2.0,
            branches: BTreeMap::from([(setting.to_owned(), branch)]),
        }
    }

    #[test]
    fn rows_of_several_runs_are_read_back_together() {
        let dir = tempfile::tempdir().unwrap();
        let texts = [text("a", 18.343), text("b", 122.3)];
        for (model, key, perplexity) in [
            (&MEDI, "best", Some(18.5)),
            (&SMOLLM2, "best", None),
            (&MEDI, "standard", Some(18.6)),
            (&MEDI, "best", Some(18.4)),
        ] {
            let mut results = Results::read(dir.path()).unwrap();
            let row = row("4-bit g32", perplexity);
            results.add(model, key, row, texts.clone()).unwrap();
            results.write(dir.path()).unwrap();
        }
        let results = Results::read(dir.path()).unwrap();
        let first = |model: &Model, key: &str| {
            results.row(model, key).unwrap().branches["4-bit g32"].texts[0].perplexity
        };
        assert_eq!(first(&MEDI, "best"), Some(18.4));
        assert_eq!(first(&MEDI, "standard"), Some(18.6));
        assert_eq!(first(&SMOLLM2, "best"), None);
        assert!(results.row(&SMOLLM2, "standard").is_none());
    }

    #[test]
    fn a_row_on_another_text_is_refused() {
        let mut results = Results::default();
        let mut add = |key: &str, second: &str| {
            let texts = [text("a", 18.343), text(second, 122.3)];
            results.add(&MEDI, key, row("4-bit g32", Some(18.5)), texts)
        };
        add("best", "b").unwrap();
        let error = add("standard", "c").unwrap_err().to_string();
        assert!(error.contains("another text"), "{error}");
    }

    #[test]
    fn results_of_one_model_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{\"rows\": []}").unwrap();
        assert!(Results::read(dir.path()).unwrap().models.is_empty());
    }
}
