//! The record of tasks in a branch's directory, `eval.json`.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_calibration::HashedFile;
use gptq_format::{FileDigest, FormatError, read_json, write_json};
use serde::{Deserialize, Serialize};

use crate::{HarnessResult, Paired, Proportion};

/// File name of the record in a branch directory.
pub const TASK_RESULTS: &str = "eval.json";

/// Most tasks of a record, and questions of a task.
const MAX_TASKS: usize = 1 << 12;
const MAX_QUESTIONS: usize = 1 << 20;
/// Most bytes of a name or a template.
const MAX_TEXT: usize = 1 << 16;

/// Answers of a branch to tasks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TaskResults {
    /// Version of the program that asked last.
    pub gptq_version: String,
    /// The weight files that were asked, by name.
    pub weights: BTreeMap<String, FileDigest>,
    /// A record of each task.
    pub tasks: Vec<TaskRecord>,
    /// Results that lm-evaluation-harness has for these weights.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub harness: Vec<HarnessResult>,
}

/// Answers of a branch to a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// Name of the task.
    pub name: String,
    /// File of the questions.
    pub file: HashedFile,
    /// Layout of the file.
    pub layout: String,
    /// Template of a question.
    pub template: String,
    /// Text before everything.
    pub description: String,
    /// Text between a prompt and a choice.
    pub delimiter: String,
    /// Letters were scored in place of the choices' texts.
    pub letters: bool,
    /// Number of shots.
    pub shots: usize,
    /// File of the shots, if they are from another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shots_from: Option<HashedFile>,
    /// Number of questions asked.
    pub questions: usize,
    /// Number of questions in the file.
    pub available: usize,
    /// The tokenizer's own token stood before prompts.
    pub beginning_token: bool,
    /// Tokens that the model takes at once; longer prompts were cut from the left.
    pub context: usize,
    /// Number of requests that were cut, of one for each choice.
    pub cut: usize,
    /// Share of questions whose likeliest choice is right.
    pub accuracy: Proportion,
    /// The same by likelihood for each character.
    pub accuracy_norm: Proportion,
    /// Answers of the dense model, if it was asked in the same call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense: Option<DenseScore>,
    /// Device of the run, `cpu` or `cuda`.
    pub device: String,
    /// Seconds that it took, loading included.
    pub seconds: f64,
}

/// Answers of the dense model to a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DenseScore {
    /// Its share of right answers by likelihood.
    pub accuracy: Proportion,
    /// The same by likelihood for each character.
    pub accuracy_norm: Proportion,
    /// Questions that only it, and only the branch, answers rightly.
    pub flips: Paired,
}

impl TaskRecord {
    /// Returns a text that is the same of answers to the same requests, whose accuracies can be compared.
    pub fn key(&self) -> String {
        let texts = [
            &self.name,
            &self.template,
            &self.description,
            &self.delimiter,
        ];
        let shots = self.shots_from.as_ref().map(|from| &from.sha256);
        let sizes = (
            self.shots,
            self.questions,
            self.beginning_token,
            self.letters,
        );
        format!("{texts:?} {} {shots:?} {sizes:?}", self.file.sha256)
    }

    /// Returns its heading in tables: `pubmedqa, 3 shots`, with the number of questions where it is not all.
    pub fn heading(&self) -> String {
        let shots = match self.shots {
            0 => String::new(),
            1 => ", 1 shot".to_owned(),
            n => format!(", {n} shots"),
        };
        let part = match self.questions < self.available {
            true => format!(", first {}", self.questions),
            false => String::new(),
        };
        format!("{}{shots}{part}", self.name)
    }

    fn check(&self, at: usize) -> Result<(), String> {
        let texts = [
            &self.name,
            &self.template,
            &self.description,
            &self.delimiter,
        ];
        if texts.iter().any(|it| it.len() > MAX_TEXT) {
            return Err(format!("tasks[{at}]: a text is over {MAX_TEXT} bytes"));
        }
        if self.questions > MAX_QUESTIONS || self.available > MAX_QUESTIONS {
            return Err(format!("tasks[{at}]: over {MAX_QUESTIONS} questions"));
        }
        let dense = self.dense.iter();
        let shares = dense.flat_map(|it| [it.accuracy, it.accuracy_norm]);
        let mut shares = [self.accuracy, self.accuracy_norm]
            .into_iter()
            .chain(shares);
        match shares.all(|it| (0.0..=1.0).contains(&it.value)) {
            true => Ok(()),
            false => Err(format!("tasks[{at}]: an accuracy is not between 0 and 1")),
        }
    }
}

impl TaskResults {
    /// Reads the record in `dir`; `None` if there is none.
    ///
    /// # Errors
    /// A record that cannot be read, or has a number that nothing measured can be.
    pub fn read(dir: &Path) -> Result<Option<Self>, FormatError> {
        let path = dir.join(TASK_RESULTS);
        if !path.exists() {
            return Ok(None);
        }
        let results: TaskResults = read_json(&path)?;
        match results.check() {
            Ok(()) => Ok(Some(results)),
            Err(reason) => Err(FormatError::Malformed { path, reason }),
        }
    }

    /// Writes the record into `dir`.
    ///
    /// # Errors
    /// A directory that cannot be written to.
    pub fn write(&self, dir: &Path) -> Result<(), FormatError> {
        write_json(&dir.join(TASK_RESULTS), self)
    }

    /// Adds a record, in place of one of the same task.
    pub fn add(&mut self, record: TaskRecord) {
        match self.tasks.iter_mut().find(|it| it.key() == record.key()) {
            Some(old) => *old = record,
            None => self.tasks.push(record),
        }
    }

    /// Adds a result of the harness, in place of one of the same task and number of shots.
    pub fn add_harness(&mut self, result: HarnessResult) {
        let same = |it: &&mut HarnessResult| it.task == result.task && it.shots == result.shots;
        match self.harness.iter_mut().find(same) {
            Some(old) => *old = result,
            None => self.harness.push(result),
        }
    }

    fn check(&self) -> Result<(), String> {
        if self.tasks.len() > MAX_TASKS || self.harness.len() > MAX_TASKS {
            return Err(format!("over {MAX_TASKS} tasks"));
        }
        let tasks = self.tasks.iter().enumerate();
        tasks
            .map(|(at, task)| task.check(at))
            .chain(self.harness.iter().map(HarnessResult::check))
            .collect()
    }
}
