//! Checkpoints that tasks are put to, and their answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use gptq_calibration::TextTokenizer;
use gptq_eval::{EncodedTask, Encoder, Task, TaskScore, context_length};
use gptq_format::{FileDigest, FormatError};
use gptq_kernels::Device;
use gptq_likelihood::log_likelihoods;
use gptq_spec::Census;

use crate::log;
use crate::table::count;
use crate::text_progress::TextProgress;
use crate::verify::branches;

/// A checkpoint to ask.
pub(crate) struct AskedModel {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) quantized: bool,
    /// Names of its weight files.
    pub(crate) weights: Vec<String>,
}

/// Answers of a model to a task.
pub(crate) struct Answers {
    pub(crate) encoded: EncodedTask,
    pub(crate) beginning_token: bool,
    pub(crate) context: usize,
    pub(crate) log_likelihoods: Vec<Vec<f64>>,
    pub(crate) score: TaskScore,
    pub(crate) seconds: f64,
}

/// Returns the checkpoints that `paths` name, those of a directory of branches one by one.
pub(crate) fn models(paths: &[PathBuf]) -> Result<Vec<AskedModel>> {
    let mut found = Vec::new();
    for path in paths {
        match path.join("config.json").exists() {
            true => found.push(path.clone()),
            false => found.extend(branches(path)?.into_iter().map(|(_, dir)| dir)),
        }
    }
    let last = |dir: &Path| {
        let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
        let name = whole.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    let names: Vec<String> = found.iter().map(|dir| last(dir)).collect();
    let asked = found.into_iter().enumerate();
    asked
        .map(|(at, dir)| {
            let census = Census::take(&dir)?;
            census.warnings.iter().for_each(|it| log::warning(it));
            let alike = names.iter().filter(|name| **name == names[at]).count();
            Ok(AskedModel {
                name: match alike {
                    1 => names[at].clone(),
                    _ => dir.display().to_string(),
                },
                quantized: census.checkpoint.quantize_config().is_some(),
                weights: census.checkpoint.files().to_vec(),
                dir,
            })
        })
        .collect()
}

impl AskedModel {
    /// Hashes its weight files.
    pub(crate) fn digests(&self) -> Result<BTreeMap<String, FileDigest>, FormatError> {
        let files = self.weights.iter().map(|name| {
            let digest = FileDigest::of(&self.dir.join(name), || false)?;
            Ok((name.clone(), digest.unwrap_or_default()))
        });
        files.collect()
    }

    /// Puts all tasks to the model, loaded once.
    pub(crate) fn ask(
        &self,
        tasks: &[Task],
        special_tokens: bool,
        device: Device,
        warn: &mut dyn FnMut(String),
    ) -> Result<Vec<Answers>> {
        let began = Instant::now();
        let tokenizer = TextTokenizer::load(&self.dir)?;
        let context = context_length(&self.dir)?;
        let encoder = Encoder::new(&tokenizer, special_tokens, context);
        let encoded = tasks.iter().map(|task| encoder.encode(task));
        let encoded: Vec<EncodedTask> = encoded.collect::<Result<_, _>>()?;
        for (task, encoded) in tasks.iter().zip(&encoded) {
            let all = encoded.questions.iter().map(Vec::len).sum::<usize>();
            if encoded.cut > 0 {
                warn(format!(
                    "{}: {} of {all} requests of {} are longer than the {context} tokens that the model takes, and were cut from \
                     the left",
                    self.name, encoded.cut, task.name
                ));
            }
            if let Some(first) = encoded.without_tokens.first() {
                warn(format!(
                    "{}: {} of {} with a choice that leaves no token behind the prompt, first {first}; it has the \
                     log-likelihood 0, above any other; use another --delimiter or template",
                    self.name,
                    count(encoded.without_tokens.len(), "question"),
                    task.name
                ));
            }
        }
        let requests = encoded.iter().flat_map(|it| it.questions.iter().flatten());
        let requests: Vec<_> = requests.cloned().collect();
        let mut progress = TextProgress::of("of the questions asked", &self.name);
        let found = log_likelihoods(&self.dir, device, &requests, &mut |done| {
            progress.show(done)
        })?;
        drop(progress);
        let seconds = began.elapsed().as_secs_f64();
        let mut found = found.into_iter();
        let answers = tasks.iter().zip(encoded).map(|(task, encoded)| {
            let questions = encoded.questions.iter();
            let log_likelihoods: Vec<Vec<f64>> = questions
                .map(|choices| found.by_ref().take(choices.len()).collect())
                .collect();
            Answers {
                score: TaskScore::of(&task.questions, &log_likelihoods),
                beginning_token: encoder.adds_beginning(),
                context,
                log_likelihoods,
                encoded,
                seconds,
            }
        });
        Ok(answers.collect())
    }
}
