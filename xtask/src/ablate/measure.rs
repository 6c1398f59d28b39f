//! One row: `gptq quantize` with a branch per setting, then `gptq verify` of all branches on each text beside the
//! dense model.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use super::models::{Model, Setting, WINDOW};
use super::results::{BranchResults, Loss, RowResults, Text};
use super::rows::{Columns, Row};

/// What all rows are measured with.
pub(super) struct Measurement<'a> {
    pub(super) binary: PathBuf,
    pub(super) device: &'a str,
    /// Description of the machine.
    pub(super) machine: &'a str,
    /// Directory for the recipe and the branches of the row at hand.
    pub(super) work: &'a Path,
    pub(super) calibration: &'a Path,
    /// The text by which options are chosen, and the one by which nothing is.
    pub(super) texts: [&'a Path; 2],
    /// Warnings shown so far.
    pub(super) warned: BTreeSet<String>,
}

impl Measurement<'_> {
    /// Measures `row` on `model`, which is in `source`. Its branches are removed afterwards.
    pub(super) fn row(
        &mut self,
        model: &Model,
        source: &Path,
        row: &Row,
    ) -> anyhow::Result<(RowResults, [Text; 2])> {
        let branches = self.work.join("branches");
        remove(&branches)?;
        fs::create_dir_all(self.work)?;
        let recipe = self.work.join("recipe.toml");
        let text = recipe_text(model, source, self.calibration, row, &branches)?;
        fs::write(&recipe, text)?;
        let start = Instant::now();
        self.quantize(&recipe)?;
        let seconds = start.elapsed().as_secs_f64();
        eprintln!("{}, {}: quantized in {seconds:.1} s", model.name, row.key);
        let mut found = Vec::new();
        for text in self.texts {
            let start = Instant::now();
            found.push(self.verify(&branches, source, text)?);
            let seconds = start.elapsed().as_secs_f64();
            let file = text.file_name().unwrap_or_default().display();
            eprintln!(
                "{}, {}: verified on {file} in {seconds:.1} s",
                model.name, row.key
            );
        }
        let mut measured = BTreeMap::new();
        for (at, setting) in row.settings(model).iter().enumerate() {
            let name = branch_name(at);
            let result = branch(&branches.join(&name), &name, &found)
                .with_context(|| format!("branch {:?}", setting.name))?;
            measured.insert(setting.name.to_owned(), result);
        }
        let texts = [text_of(&found[0])?, text_of(&found[1])?];
        remove(&branches)?;
        let row = RowResults {
            machine: self.machine.to_owned(),
            date: chrono::Local::now().date_naive().to_string(),
            seconds,
            branches: measured,
        };
        Ok((row, texts))
    }

    fn quantize(&mut self, recipe: &Path) -> anyhow::Result<()> {
        let mut command = Command::new(&self.binary);
        command.arg("quantize").arg(recipe);
        command.args(["--device", self.device]);
        let done = self.output(&mut command)?;
        ensure!(
            done.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        Ok(())
    }

    /// Returns a verification report for each of `branches`, by name.
    fn verify(&mut self, branches: &Path, dense: &Path, text: &Path) -> anyhow::Result<Reports> {
        let mut command = Command::new(&self.binary);
        command.arg("verify").arg(branches);
        command.arg("--against").arg(dense).arg("--text").arg(text);
        command.args(["--json", "--no-receipt", "--device", self.device]);
        let done = self.output(&mut command)?;
        // A branch that loses more than is tolerated makes the command fail after it has printed the reports.
        match serde_json::from_slice(&done.stdout) {
            Ok(reports) => Ok(reports),
            Err(_) => bail!("{command:?}: {}", String::from_utf8_lossy(&done.stderr)),
        }
    }

    /// Runs `command`, and shows each of its warnings once.
    fn output(&mut self, command: &mut Command) -> anyhow::Result<std::process::Output> {
        let done = command
            .output()
            .with_context(|| format!("starting {command:?}"))?;
        for line in String::from_utf8_lossy(&done.stderr).lines() {
            if line.starts_with("gptq: warning:") && self.warned.insert(line.to_owned()) {
                eprintln!("{line}");
            }
        }
        Ok(done)
    }
}

/// Verification reports by the branch's name.
type Reports = BTreeMap<String, Value>;

fn remove(dir: &Path) -> anyhow::Result<()> {
    match dir.exists() {
        true => Ok(fs::remove_dir_all(dir)?),
        false => Ok(()),
    }
}

fn branch_name(at: usize) -> String {
    format!("b{at}")
}

fn recipe_text(
    model: &Model,
    source: &Path,
    calibration: &Path,
    row: &Row,
    branches: &Path,
) -> anyhow::Result<String> {
    let path = |path: &Path| -> anyhow::Result<toml::Value> {
        let path = std::path::absolute(path)?;
        Ok(toml::Value::String(path.to_string_lossy().into_owned()))
    };
    let mut text = format!(
        "[model]\nsource = {}\n\n[calibration]\nsource = {}\ntemplate = \"{{input}}\\n{{output}}\"\n\
         rows = \"0:1000\"\nsamples = {}\nseq_len = {WINDOW}\nsampling = \"concatenate\"\n\n\
         [output]\ndir = {}\n\n[defaults]\nsym = true\ndamp_percent = 0.1\n{}\n",
        path(source)?,
        path(calibration)?,
        model.windows,
        path(branches)?,
        row.options,
    );
    for (at, setting) in row.settings(model).iter().enumerate() {
        let lines = branch_lines(row.columns, setting)?;
        write!(
            text,
            "\n[[branch]]\nname = \"{}\"\n{lines}\n",
            branch_name(at)
        )?;
    }
    Ok(text)
}

fn branch_lines(columns: Columns, setting: &Setting) -> anyhow::Result<String> {
    let Setting {
        bits,
        group_size,
        stored,
        ..
    } = setting;
    Ok(match columns {
        Columns::Settings | Columns::Sizes => format!("bits = {bits}\ngroup_size = {group_size}"),
        Columns::Budgets => {
            let stored = stored.context("a size budget without a size")?;
            format!("budget_bits = {stored}")
        }
    })
}

/// Reads the results of the branch in `dir`.
fn branch(dir: &Path, name: &str, found: &[Reports]) -> anyhow::Result<BranchResults> {
    let report: Value = serde_json::from_slice(&fs::read(dir.join("report.json"))?)?;
    let linears = report["linears"].as_array();
    let linears = linears.context("a report without linear layers")?;
    let errors = (linears.iter()).filter_map(|it| it["relative_error"].as_f64());
    let seconds = report["seconds"].as_f64();
    Ok(BranchResults {
        texts: [loss(&found[0], name)?, loss(&found[1], name)?],
        mean_relative_error: errors.sum::<f64>() / linears.len() as f64,
        seconds: seconds.context("a report without seconds")?,
    })
}

/// Reads a branch's distance from the dense model. It is absent if the branch's output is not finite.
fn loss(reports: &Reports, name: &str) -> anyhow::Result<Loss> {
    let report = reports.get(name).context("not verified")?;
    // Damaged files are not run.
    if report["depth"] != "beside" {
        let checks = report["checks"].as_array().into_iter().flatten();
        let failed = checks.filter(|check| check["pass"] != true);
        let details: Vec<String> = failed.map(|check| check["detail"].to_string()).collect();
        bail!("not run: {}", details.join("; "));
    }
    Ok(Loss {
        perplexity: report["perplexity"]["value"].as_f64(),
        kl_divergence: report["kl_divergence"].as_f64(),
    })
}

/// Reads which text was verified on, from any branch whose output is finite.
fn text_of(reports: &Reports) -> anyhow::Result<Text> {
    let measured = (reports.values()).map(|report| &report["perplexity"]);
    let text = |measured: &Value| {
        Some(Text {
            file: measured["text"].as_str()?.to_owned(),
            sha256: measured["text_sha256"].as_str()?.to_owned(),
            tokens: measured["tokens"].as_u64()?,
            dense: measured["dense"].as_f64()?,
        })
    };
    let mut texts = measured.filter_map(text);
    texts.next().context("no branch with a finite output")
}

#[cfg(test)]
mod tests {
    use super::super::models::{MEDI, SMOLLM2};
    use super::super::rows::chosen;
    use super::*;

    fn recipe(model: &Model, key: &str) -> toml::Table {
        let rows = chosen(&[key.to_owned()]).unwrap();
        let [source, calibration, branches] = ["a \"b\"", "rows.json", "out"].map(Path::new);
        let text = recipe_text(model, source, calibration, rows[0], branches).unwrap();
        text.parse().unwrap()
    }

    #[test]
    fn a_row_has_a_branch_for_each_setting_in_the_default_order() {
        let recipe = recipe(&SMOLLM2, "best");
        let branches = recipe["branch"].as_array().unwrap();
        assert_eq!(branches.len(), SMOLLM2.settings.len());
        assert_eq!(branches[2]["bits"].as_integer(), Some(3));
        assert_eq!(branches[2]["group_size"].as_integer(), Some(64));
        assert_eq!(recipe["calibration"]["samples"].as_integer(), Some(127));
        assert!(recipe["defaults"].get("desc_act").is_none());
        let source = recipe["model"]["source"].as_str().unwrap();
        assert!(source.ends_with("a \"b\""), "{source}");
    }

    #[test]
    fn a_budget_is_the_size_of_the_setting_above_it() {
        let recipe = recipe(&MEDI, "standard-budget");
        let branch = &recipe["branch"][0];
        assert_eq!(branch["budget_bits"].as_float(), Some(2.342));
        assert!(branch.get("bits").is_none());
    }

    #[test]
    fn a_branch_that_was_not_run_is_an_error_and_one_that_is_not_finite_is_blank() {
        let reports: Reports = serde_json::from_str(
            "{\"b0\": {\"depth\": \"files\", \"checks\": [{\"pass\": false, \"detail\": \"damaged\"}]},
              \"b1\": {\"depth\": \"beside\", \"perplexity\": null, \"kl_divergence\": null}}",
        )
        .unwrap();
        let error = loss(&reports, "b0").err().unwrap().to_string();
        assert!(error.contains("damaged"), "{error}");
        let loss = loss(&reports, "b1").unwrap();
        assert_eq!((loss.perplexity, loss.kl_divergence), (None, None));
        assert!(text_of(&reports).is_err());
    }
}
