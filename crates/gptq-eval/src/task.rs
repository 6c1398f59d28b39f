//! A task: questions with their prompts.
//!
//! ```text
//! prompt   = description, (text delimiter answer shot-delimiter) for each shot, text
//! request  = prompt, delimiter, choice
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gptq_calibration::HashedFile;
use gptq_format::FileDigest;

use crate::prompt::PromptText;
use crate::question::{QuestionRow, TaskRows, letter};
use crate::{EvalError, Question, TaskLayout};

/// Text between a shot and what follows it, as in the harness.
const SHOT_DELIMITER: &str = "\n\n";

/// Options for reading a task and asking its questions.
#[derive(Clone, Debug)]
pub struct TaskOptions {
    /// File of the questions.
    pub file: PathBuf,
    /// Layout of its rows.
    pub layout: TaskLayout,
    /// Name, in place of the layout's.
    pub name: Option<String>,
    /// Template of a question, in place of the layout's.
    pub template: Option<String>,
    /// Text before everything, in place of the layout's.
    pub description: Option<String>,
    /// Text between a prompt and a choice.
    pub delimiter: String,
    /// Letters are scored in place of the choices' texts, which the template shows.
    pub letters: bool,
    /// Number of questions with answers before each question.
    pub shots: usize,
    /// File of the shots, in the same layout.
    pub shots_from: Option<PathBuf>,
    /// File that says which questions of PubMedQA are test questions.
    pub split: Option<PathBuf>,
    /// Number of questions to ask, the first ones.
    pub limit: Option<usize>,
}

impl TaskOptions {
    /// Returns the options of a task file in a layout.
    pub fn new(file: &Path, layout: TaskLayout) -> Self {
        TaskOptions {
            file: file.into(),
            layout,
            name: None,
            template: None,
            description: None,
            delimiter: " ".to_owned(),
            letters: false,
            shots: 0,
            shots_from: None,
            split: None,
            limit: None,
        }
    }
}

/// Questions of a file, and how they are asked.
#[derive(Clone, Debug)]
pub struct Task {
    /// Name in tables.
    pub name: String,
    /// File of the questions.
    pub file: PathBuf,
    /// The file, hashed.
    pub hashed: HashedFile,
    /// Layout of the file.
    pub layout: TaskLayout,
    /// Template of a question.
    pub template: String,
    /// Text before everything.
    pub description: String,
    /// Text between a prompt and a choice.
    pub delimiter: String,
    /// Number of shots.
    pub shots: usize,
    /// File of the shots, if they are from another one.
    pub shots_from: Option<HashedFile>,
    /// Number of questions in the file.
    pub available: usize,
    /// Questions that are asked.
    pub questions: Vec<Question>,
    /// Questions that shots are taken from.
    pool: Vec<Question>,
}

impl Task {
    /// Reads a task.
    ///
    /// # Errors
    /// A file that cannot be read, a row that lacks something, a template that does not fit the rows, or too few shots.
    pub fn read(options: &TaskOptions) -> Result<Task, EvalError> {
        let (file, layout) = (options.file.as_path(), options.layout);
        let template = options.template.as_deref().unwrap_or(layout.template());
        let text = PromptText::new(template)?;
        let TaskRows { questions, others } = layout.read(file, options.split.as_deref())?;
        let available = questions.len();
        let asked = options.limit.unwrap_or(usize::MAX);
        let make = |file: &Path, rows: Vec<QuestionRow>| -> Result<Vec<Question>, EvalError> {
            let rows = rows.into_iter();
            rows.map(|row| question(file, &text, row, options.letters))
                .collect()
        };
        let questions = make(file, questions.into_iter().take(asked).collect())?;
        if questions.is_empty() {
            return Err(EvalError::file(file, "a limit of 0 leaves no questions"));
        }
        let mut shots_from = None;
        let pool = match (&options.shots_from, options.shots) {
            (_, 0) => Vec::new(),
            (Some(from), _) => {
                shots_from = Some(hashed(from)?);
                let rows = layout.read(from, options.split.as_deref())?;
                // PubMedQA's own file is also that of its shots: those that are no test questions.
                let rows = match rows.others.is_empty() {
                    true => rows.questions,
                    false => rows.others,
                };
                make(from, rows)?
            }
            (None, shots) if others.is_empty() => return Err(EvalError::NoShots { shots }),
            (None, _) => make(file, others)?,
        };
        let task = Task {
            name: options
                .name
                .clone()
                .unwrap_or_else(|| layout.task_name(file)),
            file: file.into(),
            hashed: hashed(file)?,
            layout,
            template: template.to_owned(),
            description: options
                .description
                .clone()
                .unwrap_or_else(|| layout.description(file)),
            delimiter: options.delimiter.clone(),
            shots: options.shots,
            shots_from,
            available,
            questions,
            pool,
        };
        for question in &task.questions {
            let available = task.shots_for(question).count();
            if available < task.shots {
                return Err(EvalError::TooFewShots {
                    path: options.shots_from.clone().unwrap_or_else(|| file.into()),
                    shots: task.shots,
                    available,
                });
            }
        }
        Ok(task)
    }

    /// Returns the shots of a question: the first that are not the question itself.
    fn shots_for<'a>(&'a self, question: &'a Question) -> impl Iterator<Item = &'a Question> {
        let same = |it: &&Question| it.text == question.text && it.choices == question.choices;
        (self.pool.iter())
            .filter(move |it| !same(it))
            .take(self.shots)
    }

    /// Returns what stands before the choices of `question`, without the delimiter.
    pub fn prompt(&self, question: &Question) -> String {
        let mut prompt = self.description.clone();
        for shot in self.shots_for(question) {
            let answer = shot.choices.get(shot.answer);
            let answer = answer.map(String::as_str).unwrap_or_default();
            for part in [&shot.text, &self.delimiter, answer, SHOT_DELIMITER] {
                prompt.push_str(part);
            }
        }
        prompt + &question.text
    }

    /// Returns the number of right answers of each choice, by its index: what is right most often is an accuracy that needs no
    /// model.
    pub fn answers(&self) -> BTreeMap<usize, usize> {
        let mut counts = BTreeMap::new();
        for question in &self.questions {
            *counts.entry(question.answer).or_insert(0) += 1;
        }
        counts
    }
}

fn question(
    file: &Path,
    text: &PromptText,
    row: QuestionRow,
    letters: bool,
) -> Result<Question, EvalError> {
    let rendered = text.render(&row.values);
    let rendered = rendered.map_err(|why| EvalError::row(file, &row.place, "template", why))?;
    let names = || (0..row.choices.len()).map(|at| Some(letter(at)?.to_owned()));
    let choices = match letters.then(|| names().collect::<Option<Vec<String>>>()) {
        None => row.choices,
        Some(Some(names)) => names,
        Some(None) => {
            let reason = format!("{} choices, more than there are letters", row.choices.len());
            return Err(EvalError::row(file, &row.place, "choices", reason));
        }
    };
    Ok(Question {
        place: row.place,
        text: rendered,
        choices,
        answer: row.answer,
    })
}

fn hashed(path: &Path) -> Result<HashedFile, EvalError> {
    let digest = FileDigest::of(path, || false)?.unwrap_or_default();
    let name = path.file_name().unwrap_or_default();
    Ok(HashedFile {
        name: name.to_string_lossy().into_owned(),
        bytes: digest.bytes,
        sha256: digest.sha256,
    })
}

#[cfg(test)]
mod tests;
