//! Answers to tasks as tables and as JSON.

use gptq_eval::{Paired, Proportion, Task};
use serde_json::{Value, json};

use crate::asked_model::{Answers, AskedModel};
use crate::table::{self, count};
use crate::terminal;

/// Formats a share with its standard error, in percent.
pub(crate) fn percent(it: Proportion) -> String {
    let stderr = it.stderr.map(|error| format!(" ± {:.2}", 100.0 * error));
    format!("{:.2}{} %", 100.0 * it.value, stderr.unwrap_or_default())
}

/// Prints the answers to a task: accuracies, with differences from those of model `reference`, and flips.
pub(crate) fn show(
    task: &Task,
    at: usize,
    models: &[AskedModel],
    answers: &[Vec<Answers>],
    reference: usize,
) {
    let n = task.questions.len();
    let shots = match task.shots {
        0 => String::new(),
        shots => format!(", {}", count(shots, "shot")),
    };
    let most = task.answers().into_values().max().unwrap_or_default();
    println!(
        "\n{}{shots}: {} of {}; the most frequent answer is right for {:.2} %",
        terminal::line(&task.name),
        count(n, "question"),
        terminal::line(&task.hashed.name),
        100.0 * most as f64 / n as f64
    );
    let heading = [
        "model",
        "accuracy",
        "difference",
        "by length",
        "difference",
        "seconds",
    ];
    let mut rows = vec![heading.map(String::from).to_vec()];
    for (model, answers_of) in models.iter().zip(answers) {
        let (own, right) = (&answers_of[at].score, &answers[reference][at].score);
        let difference = |own: Proportion, right: Proportion| {
            format!("{:+.2}", 100.0 * (own.value - right.value))
        };
        rows.push(vec![
            model.name.clone(),
            percent(own.accuracy),
            difference(own.accuracy, right.accuracy),
            percent(own.accuracy_norm),
            difference(own.accuracy_norm, right.accuracy_norm),
            format!("{:.1}", answers_of[at].seconds),
        ]);
    }
    println!("{}", table::render(&rows).trim_end());
    if models.len() < 2 {
        return;
    }
    let heading = ["from", "to", "lost", "won", "McNemar's p"].map(String::from);
    let mut rows = vec![heading.to_vec()];
    for (first, second, paired) in pairs(at, models, answers) {
        rows.push(vec![
            first.name.clone(),
            second.name.clone(),
            paired.lost.to_string(),
            paired.won.to_string(),
            format!("{:.4}", paired.p),
        ]);
    }
    println!("\n{}", table::render(&rows).trim_end());
}

/// Compares every two models, the earlier with the later.
fn pairs<'a>(
    at: usize,
    models: &'a [AskedModel],
    answers: &[Vec<Answers>],
) -> Vec<(&'a AskedModel, &'a AskedModel, Paired)> {
    let all = models.iter().zip(answers).enumerate();
    let pairs = all.flat_map(|(n, (first, own))| {
        let later = models.iter().zip(answers).skip(n + 1);
        later.map(move |(second, other)| {
            let paired = Paired::of(&own[at].score.right, &other[at].score.right);
            (first, second, paired)
        })
    });
    pairs.collect()
}

/// Returns the answers to a task as JSON.
pub(crate) fn as_json(
    task: &Task,
    at: usize,
    models: &[AskedModel],
    answers: &[Vec<Answers>],
) -> Value {
    let asked = models.iter().zip(answers).map(|(model, answers)| {
        let own = &answers[at];
        let questions = task.questions.iter().enumerate().map(|(n, question)| {
            json!({
                "place": question.place,
                "log_likelihoods": own.log_likelihoods[n],
                "choice": own.score.choices[n].plain,
                "choice_by_length": own.score.choices[n].normalized,
                "answer": question.answer,
            })
        });
        json!({
            "model": model.name,
            "quantized": model.quantized,
            "accuracy": own.score.accuracy,
            "accuracy_norm": own.score.accuracy_norm,
            "beginning_token": own.beginning_token,
            "context": own.context,
            "cut": own.encoded.cut,
            "without_tokens": own.encoded.without_tokens,
            "seconds": own.seconds,
            "questions": questions.collect::<Vec<_>>(),
        })
    });
    let pairs = pairs(at, models, answers).into_iter();
    let pairs = pairs.map(|(first, second, paired)| {
        json!({
            "from": first.name,
            "to": second.name,
            "lost": paired.lost,
            "won": paired.won,
            "p": paired.p,
        })
    });
    json!({
        "name": task.name,
        "file": task.hashed,
        "layout": task.layout.name(),
        "template": task.template,
        "description": task.description,
        "delimiter": task.delimiter,
        "shots": task.shots,
        "shots_from": task.shots_from,
        "questions": task.questions.len(),
        "available": task.available,
        "models": asked.collect::<Vec<_>>(),
        "pairs": pairs.collect::<Vec<_>>(),
    })
}
