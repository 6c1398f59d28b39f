//! `gptq eval`: multiple-choice tasks put to branches and dense models, side by side.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Result, bail, ensure};
use clap::Args;
use gptq_calibration::{Calibration, RUN, TextTokenizer};
use gptq_eval::{
    DenseScore, Paired, Proportion, TASK_RESULTS, Task, TaskLayout, TaskOptions, TaskRecord,
    TaskResults, read_harness,
};
use gptq_format::FileDigest;
use gptq_kernels::Device;
use gptq_plan::{BranchReport, Plan, REPORT, Recipe};
use serde_json::json;

use crate::asked_model::{Answers, AskedModel, models};
use crate::eval_output::{as_json, percent, show};
use crate::hub::{self, Need};
use crate::{log, table};

#[derive(Args)]
pub(crate) struct EvalArgs {
    /// Branches, directories of branches, and dense models; differences are from the first dense one
    #[arg(required = true, value_name = "DIR|MODEL")]
    models: Vec<PathBuf>,
    /// Ask the questions in this file, of rows with prompt (or question, and perhaps context), choices and answer (.json,
    /// .jsonl), or in the layout of --preset; may be repeated
    #[arg(long, value_name = "FILE", required_unless_present = "harness")]
    task: Vec<PathBuf>,
    /// Layout of the file, and template: pubmedqa (ori_pqal.json, test split by test_ground_truth.json beside it), mmlu (a subject's
    /// CSV), medmcqa or medqa (JSON lines)
    #[arg(long, value_name = "NAME")]
    preset: Option<TaskLayout>,
    /// Name of the task in tables [default: from the preset or the file]
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Jinja template of a question, over its row's keys [default: the preset's]
    #[arg(long, value_name = "TEXT")]
    question_template: Option<String>,
    /// Text before shots and questions [default: the preset's]
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Text between a prompt and a choice
    #[arg(long, value_name = "TEXT", default_value = " ")]
    delimiter: String,
    /// Compare the likelihoods of the letters A, B, C, ..., which the template shows beside the choices
    #[arg(long)]
    letters: bool,
    /// Put this many questions with their answers before each question
    #[arg(long, value_name = "N", default_value_t = 0)]
    shots: usize,
    /// Take shots from the first rows of this file [default: PubMedQA's questions outside the test split]
    #[arg(long, value_name = "FILE")]
    shots_from: Option<PathBuf>,
    /// File with the answers of PubMedQA's test questions
    #[arg(long, value_name = "FILE")]
    split: Option<PathBuf>,
    /// Ask only the first questions
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Encode prompts without the tokenizer's own special tokens, such as a leading BOS
    #[arg(long)]
    no_bos: bool,
    /// Warn of questions that share text with the calibration rows of this recipe
    #[arg(long, value_name = "RECIPE")]
    recipe: Option<PathBuf>,
    /// Add the accuracies in a results file of lm-evaluation-harness to the branch's eval.json
    #[arg(long, value_name = "FILE", conflicts_with = "task")]
    harness: Option<PathBuf>,
    /// Do not write eval.json into branch directories
    #[arg(long)]
    no_save: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(short, long, default_value = "auto")]
    device: Device,
    /// Print the result as JSON, with every question's log-likelihoods
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: EvalArgs) -> Result<()> {
    let models = models(&args.models)?;
    if let Some(file) = &args.harness {
        return add_harness(file, &models, args.json);
    }
    let tasks = args.tasks()?;
    let mut warnings = Vec::new();
    let mut warn = |text: String| {
        log::warning(&text);
        warnings.push(text);
    };
    for text in shared_text(&args, &tasks, &models)? {
        warn(text);
    }
    let device = args.device.resolve()?;
    let mut answers = Vec::new();
    let mut weights = Vec::new();
    for model in &models {
        let (found, digests) = thread::scope(|scope| {
            // Hashing reads what the run reads anyway.
            let save = model.quantized && !args.no_save;
            let hashing = scope.spawn(move || save.then(|| model.digests()).transpose());
            let found = model.ask(&tasks, !args.no_bos, device, &mut warn)?;
            let digests = hashing.join().unwrap_or_else(|panic| resume_unwind(panic));
            anyhow::Ok((found, digests?))
        })?;
        answers.push(found);
        weights.push(digests);
    }
    let reference = models.iter().position(|model| !model.quantized);
    for (at, (model, digests)) in models.iter().zip(weights).enumerate() {
        let Some(digests) = digests else { continue };
        let dense = reference.map(|dense| &answers[dense]);
        let records = tasks.iter().enumerate().map(|(task, it)| {
            let dense = dense.map(|dense| &dense[task]);
            record(it, &args, device, &answers[at][task], dense)
        });
        if let Some(text) = save(model, digests, records.collect())? {
            warn(text);
        }
    }
    let reference = reference.unwrap_or(0);
    if args.json {
        let all = tasks.iter().enumerate();
        let all = all.map(|(at, task)| as_json(task, at, &models, &answers));
        let result = json!({"tasks": all.collect::<Vec<_>>(), "warnings": warnings});
        println!("{}", serde_json::to_string_pretty(&result)?);
        return Ok(());
    }
    for (at, task) in tasks.iter().enumerate() {
        show(task, at, &models, &answers, reference);
    }
    Ok(())
}

impl EvalArgs {
    fn tasks(&self) -> Result<Vec<Task>> {
        let several = self.task.len() > 1;
        ensure!(
            !several || (self.name.is_none() && self.shots_from.is_none() && self.split.is_none()),
            "--name, --shots-from and --split are of one task; give one --task, or leave them out"
        );
        let read = |file: &PathBuf| {
            Task::read(&TaskOptions {
                name: self.name.clone(),
                template: self.question_template.clone(),
                description: self.description.clone(),
                delimiter: self.delimiter.clone(),
                letters: self.letters,
                shots: self.shots,
                shots_from: self.shots_from.clone(),
                split: self.split.clone(),
                limit: self.limit,
                ..TaskOptions::new(file, self.preset.unwrap_or_default())
            })
        };
        Ok(self.task.iter().map(read).collect::<Result<_, _>>()?)
    }
}

/// Warns of tasks whose text is also that of the calibration: the same file by a branch's report, or runs of tokens that also
/// occur in the rows of the recipe.
fn shared_text(args: &EvalArgs, tasks: &[Task], models: &[AskedModel]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for model in models {
        if !model.dir.join(REPORT).is_file() {
            continue;
        }
        let report = BranchReport::read(&model.dir)?;
        for task in tasks {
            let files = &report.calibration.files;
            if files.iter().any(|file| file.sha256 == task.hashed.sha256) {
                found.push(format!(
                    "{}: calibrated on {}, the file of the task; accuracy on it is not meaningful",
                    model.name, task.hashed.name
                ));
            }
        }
    }
    let Some(recipe) = &args.recipe else {
        return Ok(found);
    };
    let recipe = Recipe::read(recipe)?;
    let plan = Plan::new(&recipe, &hub::fetch(&recipe, Need::Shapes, true)?)?;
    let tokenizer = TextTokenizer::load(&plan.model_dir)?;
    let drawn = Calibration::draw(&plan.calibration, &tokenizer)?;
    for task in tasks {
        let mut tokens = Vec::new();
        for question in &task.questions {
            tokens.extend(tokenizer.encode(&question.text, false)?);
        }
        let overlap = drawn.overlap(&tokens)?;
        if overlap.shared > 0 {
            let share = 100.0 * overlap.shared as f64 / overlap.total as f64;
            found.push(format!(
                "{} of the {} tokens of the questions of {} ({share:.1} %) are in runs of {RUN} or more that also occur in the \
                 calibration rows; accuracy on them is not meaningful",
                overlap.shared, overlap.total, task.name
            ));
        }
    }
    Ok(found)
}

fn record(
    task: &Task,
    args: &EvalArgs,
    device: Device,
    own: &Answers,
    dense: Option<&Answers>,
) -> TaskRecord {
    TaskRecord {
        name: task.name.clone(),
        file: task.hashed.clone(),
        layout: task.layout.name().to_owned(),
        template: task.template.clone(),
        description: task.description.clone(),
        delimiter: task.delimiter.clone(),
        letters: args.letters,
        shots: task.shots,
        shots_from: task.shots_from.clone(),
        questions: task.questions.len(),
        available: task.available,
        beginning_token: own.beginning_token,
        context: own.context,
        cut: own.encoded.cut,
        accuracy: own.score.accuracy,
        accuracy_norm: own.score.accuracy_norm,
        dense: dense.map(|dense| DenseScore {
            accuracy: dense.score.accuracy,
            accuracy_norm: dense.score.accuracy_norm,
            flips: Paired::of(&dense.score.right, &own.score.right),
        }),
        device: match device {
            Device::Cuda(_) => "cuda".to_owned(),
            Device::Auto | Device::Cpu => "cpu".to_owned(),
        },
        seconds: own.seconds,
    }
}

/// Adds records to a branch's `eval.json`; returns a warning if those in it were of other weights.
fn save(
    model: &AskedModel,
    weights: BTreeMap<String, FileDigest>,
    records: Vec<TaskRecord>,
) -> Result<Option<String>> {
    let (mut results, warning) = standing(model, weights)?;
    for record in records {
        results.add(record);
    }
    results.write(&model.dir)?;
    Ok(warning)
}

/// Returns the record of a branch, without what is of other weights, and a warning if there was any.
fn standing(
    model: &AskedModel,
    weights: BTreeMap<String, FileDigest>,
) -> Result<(TaskResults, Option<String>)> {
    let before = TaskResults::read(&model.dir)?.unwrap_or_default();
    let fits = before.weights == weights || before == TaskResults::default();
    let warning = (!fits).then(|| {
        format!(
            "{}: the results in {TASK_RESULTS} were of other weights, and are dropped",
            model.name
        )
    });
    let kept = if fits { before } else { TaskResults::default() };
    let results = TaskResults {
        gptq_version: env!("CARGO_PKG_VERSION").to_owned(),
        weights,
        ..kept
    };
    Ok((results, warning))
}

/// Adds the harness's results to the one branch that they are of.
fn add_harness(file: &Path, models: &[AskedModel], json: bool) -> Result<()> {
    let found = read_harness(file)?;
    let [model] = models else {
        bail!(
            "--harness: its results are of one model, and {} are named",
            models.len()
        );
    };
    ensure!(
        model.quantized,
        "{}: not a branch: {TASK_RESULTS} is kept beside quantized weights",
        model.dir.display()
    );
    let (mut results, warning) = standing(model, model.digests()?)?;
    if let Some(text) = warning {
        log::warning(&text);
    }
    for result in &found {
        results.add_harness(result.clone());
    }
    results.write(&model.dir)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    let heading = ["task", "accuracy", "by length", "questions"].map(String::from);
    let mut rows = vec![heading.to_vec()];
    for result in &found {
        let shown = |it: Option<Proportion>| it.map_or_else(|| "-".to_owned(), percent);
        let questions = result.questions.map(|n| n.to_string());
        rows.push(vec![
            result.heading(),
            shown(result.accuracy),
            shown(result.accuracy_norm),
            questions.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    println!("{}\n{}", model.name, table::render(&rows).trim_end());
    Ok(())
}
