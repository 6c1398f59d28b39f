//! Layouts of task files: how rows are read, and what is asked.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::EvalError;
use crate::layouts::rows::file_stem;
use crate::layouts::{medmcqa, medqa, mmlu, plain, pubmedqa};
use crate::question::TaskRows;

/// Layout of a task file, with the template that lm-evaluation-harness has for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TaskLayout {
    /// Rows with `prompt`, or `question` and perhaps `context`; `choices`; `answer`.
    #[default]
    Plain,
    /// PubMedQA's `ori_pqal.json`: questions by their PubMed id.
    PubMedQa,
    /// MMLU's CSV of a subject, without a heading.
    Mmlu,
    /// MedMCQA's JSON lines.
    MedMcQa,
    /// MedQA's JSON lines, with 4 or 5 options.
    MedQa,
}

impl TaskLayout {
    /// All layouts that have a name.
    pub const NAMED: [TaskLayout; 4] = [
        TaskLayout::PubMedQa,
        TaskLayout::Mmlu,
        TaskLayout::MedMcQa,
        TaskLayout::MedQa,
    ];

    /// Returns its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            TaskLayout::Plain => "plain",
            TaskLayout::PubMedQa => "pubmedqa",
            TaskLayout::Mmlu => "mmlu",
            TaskLayout::MedMcQa => "medmcqa",
            TaskLayout::MedQa => "medqa",
        }
    }

    /// Returns its template, which makes a row's text.
    pub fn template(self) -> &'static str {
        match self {
            TaskLayout::Plain => plain::TEMPLATE,
            TaskLayout::PubMedQa => pubmedqa::TEMPLATE,
            TaskLayout::Mmlu => mmlu::TEMPLATE,
            TaskLayout::MedMcQa => medmcqa::TEMPLATE,
            TaskLayout::MedQa => medqa::TEMPLATE,
        }
    }

    /// Returns the text before shots and questions of the file at `path`.
    pub(crate) fn description(self, path: &Path) -> String {
        match self {
            TaskLayout::Mmlu => mmlu::description(path),
            _ => String::new(),
        }
    }

    /// Returns the name of the task in the file at `path`.
    pub(crate) fn task_name(self, path: &Path) -> String {
        match self {
            TaskLayout::Plain => file_stem(path),
            TaskLayout::Mmlu => format!("mmlu_{}", mmlu::subject(path)),
            named => named.name().to_owned(),
        }
    }

    /// Reads the rows of `path`; of PubMedQA, `split` is the file with the test questions' answers.
    pub(crate) fn read(self, path: &Path, split: Option<&Path>) -> Result<TaskRows, EvalError> {
        let alone = |questions| TaskRows {
            questions,
            others: Vec::new(),
        };
        match self {
            TaskLayout::Plain => plain::read(path).map(alone),
            TaskLayout::PubMedQa => pubmedqa::read(path, split),
            TaskLayout::Mmlu => mmlu::read(path).map(alone),
            TaskLayout::MedMcQa => medmcqa::read(path).map(alone),
            TaskLayout::MedQa => medqa::read(path).map(alone),
        }
    }
}

impl fmt::Display for TaskLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TaskLayout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = TaskLayout::NAMED.into_iter().find(|it| it.name() == text);
        named.ok_or_else(|| {
            let names: Vec<&str> = TaskLayout::NAMED.iter().map(|it| it.name()).collect();
            format!("not one of {}", names.join(", "))
        })
    }
}
