//! Accuracies on tasks, kept apart by what was asked: those on other questions, or asked in another way, are not
//! comparable.

use std::fs;
use std::path::Path;

use gptq_eval::TaskResults;
use gptq_format::FormatError;
use gptq_plan::Receipt;
use serde::Serialize;

/// Accuracy of a branch on a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// Heading: task, shots, and who measured it if not gptq.
    pub task: String,
    /// Number of questions, if known.
    pub questions: Option<usize>,
    /// Share of right answers by likelihood, or by likelihood for each character where only that was measured.
    pub accuracy: f64,
    /// Its standard error.
    pub stderr: Option<f64>,
    /// Share of right answers by likelihood for each character.
    pub accuracy_norm: Option<f64>,
    /// The dense model's accuracy.
    pub dense_accuracy: Option<f64>,
    /// Everything that makes it comparable.
    #[serde(skip)]
    pub(crate) key: String,
}

impl Accuracy {
    /// Returns true if both are on the same questions, asked the same way.
    pub(crate) fn same(&self, other: &Accuracy) -> bool {
        self.key == other.key
    }

    /// Formats accuracy and standard error in percent.
    pub(crate) fn percent(&self) -> String {
        let stderr = self.stderr.map(|error| format!(" ± {:.2}", 100.0 * error));
        format!(
            "{:.2}{} %",
            100.0 * self.accuracy,
            stderr.unwrap_or_default()
        )
    }

    /// Formats the difference from the dense model's in points of percent.
    pub(crate) fn over(&self) -> Option<String> {
        let dense = self.dense_accuracy?;
        Some(format!("{:+.2}", 100.0 * (self.accuracy - dense)))
    }
}

/// Reads the answers in `dir`; `None` if there are none, or they are of other weights than lie there.
pub(crate) fn answers(
    dir: &Path,
    receipt: Option<&Receipt>,
) -> Result<Option<TaskResults>, FormatError> {
    let results = TaskResults::read(dir)?;
    Ok(results.filter(|results| {
        results.weights.iter().all(|(name, asked)| {
            let own = fs::metadata(dir.join(name)).map(|it| it.len());
            let verified = receipt.and_then(|receipt| receipt.files.get(name));
            own.is_ok_and(|bytes| bytes == asked.bytes)
                && verified.is_none_or(|verified| verified.sha256 == asked.sha256)
        })
    }))
}

/// Returns the accuracies in answers: gptq's own, then the harness's.
pub(crate) fn accuracies(results: &TaskResults) -> Vec<Accuracy> {
    let own = results.tasks.iter().map(|it| Accuracy {
        task: it.heading(),
        questions: Some(it.questions),
        accuracy: it.accuracy.value,
        stderr: it.accuracy.stderr,
        accuracy_norm: Some(it.accuracy_norm.value),
        dense_accuracy: it.dense.as_ref().map(|dense| dense.accuracy.value),
        key: it.key(),
    });
    let harness = results.harness.iter().filter_map(|it| {
        let measured = it.accuracy.or(it.accuracy_norm)?;
        Some(Accuracy {
            task: it.heading(),
            questions: it.questions,
            accuracy: measured.value,
            stderr: measured.stderr,
            accuracy_norm: it.accuracy_norm.map(|norm| norm.value),
            dense_accuracy: None,
            key: format!("{} {:?}", it.heading(), it.questions),
        })
    });
    own.chain(harness).collect()
}

/// Returns one accuracy for each task that any of `all`, a list for each branch, is on: the tasks of most branches first, under
/// names that tell them apart.
pub(crate) fn tasks(all: &[Vec<Accuracy>]) -> Vec<Accuracy> {
    let mut tasks: Vec<Accuracy> = Vec::new();
    for accuracy in all.iter().flatten() {
        if !tasks.iter().any(|it| it.same(accuracy)) {
            tasks.push(accuracy.clone());
        }
    }
    let branches = |task: &Accuracy| {
        let on = |own: &&Vec<Accuracy>| own.iter().any(|it| it.same(task));
        all.iter().filter(on).count()
    };
    // The sort is stable, so ties keep their order.
    tasks.sort_by_key(|task| std::cmp::Reverse(branches(task)));
    let names: Vec<String> = tasks.iter().map(|it| it.task.clone()).collect();
    for (at, task) in tasks.iter_mut().enumerate() {
        let before = names[..at]
            .iter()
            .filter(|name| **name == task.task)
            .count();
        if before > 0 {
            task.task = format!("{} ({})", task.task, before + 1);
        }
    }
    tasks
}
