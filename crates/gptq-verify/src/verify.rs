//! Complete verification of one directory.

use std::path::{Path, PathBuf};

use gptq_calibration::{EvaluationText, TextTokenizer, evaluation_tokens};
use gptq_eval::TASK_RESULTS;
use gptq_format::{FileDigest, Half, files, read_json, sha256_file};
use gptq_kernels::{Device, Engine, Work};
use gptq_model::Model;
use gptq_plan::{Check, Depth, F16Range, Perplexity, RECEIPT, Receipt, Tolerances};
use gptq_spec::Census;
use serde_json::Value;

use crate::compare::measure;
use crate::recorded::Recorded;
use crate::same_weights::same_weights;
use crate::tolerance::{advice, judge};
use crate::{Asked, VerifyError, range, structure};

/// Name of the check for f16 overflow.
pub const RANGE: &str = "f16";

/// Evaluation text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// Rows in any format that calibration reads, with their text in the column `text`; a JSON list
    /// of texts; or plain text.
    pub text: PathBuf,
    /// Tokens per window.
    pub window: usize,
}

/// Checks to make.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VerifyOptions {
    /// Run the model on this text.
    pub evaluation: Option<Evaluation>,
    /// Run this dense model beside it on the same text.
    pub against: Option<PathBuf>,
    /// Compare every tensor with this branch, which it was exported from.
    pub branch: Option<PathBuf>,
    /// Tolerances that override the defaults for its settings.
    pub tolerances: Asked,
}

/// Reopens `dir`, a branch or a dense checkpoint, and checks every tensor against its configs and
/// the recorded digests, without running the model. Problems are reported as failed checks.
///
/// # Errors
/// No checkpoint, or an invalid `config.json`.
pub fn check_tensors(dir: &Path) -> Result<Vec<Check>, VerifyError> {
    let recorded = Recorded::read(dir)?;
    Ok(structure::check(dir, &Census::take(dir)?, &recorded))
}

/// Reopens `dir`, a branch or a dense checkpoint, and verifies it as `request` says. `on_progress`
/// receives the finished share of the work on a text, 0 to 1.
///
/// # Errors
/// Conditions that prevent verification: no checkpoint, no text. Other problems are failed checks
/// of the report.
pub fn verify(
    dir: &Path,
    request: &VerifyOptions,
    device: Device,
    on_progress: &mut dyn FnMut(f64),
) -> Result<Receipt, VerifyError> {
    device.resolve()?.run(Verify {
        dir,
        request,
        on_progress,
    })?
}

struct Verify<'a> {
    dir: &'a Path,
    request: &'a VerifyOptions,
    on_progress: &'a mut dyn FnMut(f64),
}

impl Work for Verify<'_> {
    type Output = Result<Receipt, VerifyError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let Verify {
            dir,
            request,
            on_progress,
        } = self;
        let census = Census::take(dir)?;
        let recorded = Recorded::read(dir)?;
        // Both read every byte.
        let (checks, listed) =
            rayon::join(|| structure::check(dir, &census, &recorded), || files(dir));
        let mut checks = checks;
        if let Some(branch) = &request.branch {
            checks.push(same_weights(&census, branch)?);
        }
        let model = Model::<B>::new(census.config, census.checkpoint, &device);
        // Answers to tasks have hashes of their own, and may be added later.
        let own = [RECEIPT, TASK_RESULTS];
        let listed = listed?
            .into_iter()
            .filter(|f| !own.contains(&f.name.as_str()));
        let digest = |f: gptq_format::FileInfo| {
            let (bytes, sha256) = (f.bytes, f.sha256);
            (f.name, FileDigest { bytes, sha256 })
        };
        let mut receipt = Receipt {
            pass: false,
            gptq_version: env!("CARGO_PKG_VERSION").into(),
            files: listed.map(digest).collect(),
            checks,
            depth: Some(Depth::Files),
            tolerances: Tolerances::default(),
            perplexity: None,
            range: None,
            nearest: None,
            advice: None,
            kl_divergence: None,
            top1_agreement: None,
            blocks: Vec::new(),
        };
        let sound = receipt.checks.iter().all(|check| check.pass);
        // Damaged files are not run: the result would be meaningless.
        if let Some(evaluation) = request.evaluation.as_ref().filter(|_| sound) {
            let dense = (request.against.as_deref())
                .map(|dense| open_dense(&model, dense, &device))
                .transpose()?;
            let asked = Asking {
                evaluation,
                tolerances: request.tolerances,
            };
            run(
                &model,
                dense.as_ref(),
                asked,
                &recorded,
                &mut receipt,
                on_progress,
            )?;
            let config = model.checkpoint().quantize_config();
            receipt.advice = advice(&receipt, config, &recorded);
        }
        receipt.pass = receipt.checks.iter().all(|check| check.pass);
        Ok(receipt)
    }
}

fn open_dense<B: Engine>(
    model: &Model<B>,
    dense: &Path,
    device: &B::Device,
) -> Result<Model<B>, VerifyError> {
    let dense = Model::<B>::open(dense, device)?.taken_in(model.half());
    let shape = |m: &Model<B>| {
        let c = m.config();
        (c.layers, c.hidden_size, c.vocabulary)
    };
    match shape(&dense) == shape(model) {
        true => Ok(dense),
        false => Err(VerifyError::OtherModel {
            dir: model.checkpoint().dir().into(),
            dense: dense.checkpoint().dir().into(),
        }),
    }
}

/// Text, models and tolerances of a run.
#[derive(Clone, Copy)]
struct Asking<'a> {
    evaluation: &'a Evaluation,
    tolerances: Asked,
}

fn run<B: Engine>(
    model: &Model<B>,
    dense: Option<&Model<B>>,
    asked: Asking<'_>,
    recorded: &Recorded,
    receipt: &mut Receipt,
    on_progress: &mut dyn FnMut(f64),
) -> Result<(), VerifyError> {
    let Evaluation { text, window } = asked.evaluation;
    let dir = model.checkpoint().dir();
    let text_sha256 = sha256_file(text)?;
    if recorded.calibration_sha256.contains(&text_sha256) {
        let detail = "this file was used for calibration; measure on other text";
        receipt
            .checks
            .push(Check::new("text", false, detail.into()));
        return Ok(());
    }
    let evaluated = evaluated(dir, asked.evaluation)?;
    let windows: Vec<Vec<u32>> = evaluated.windows().map(<[u32]>::to_vec).collect();
    let measured = measure(model, dense, &windows, on_progress)?;
    let perplexity = Perplexity {
        text: file_name(text),
        text_sha256: Some(text_sha256),
        window: *window,
        tokens: evaluated.scored(),
        left_over: evaluated.left_over(),
        value: measured.loss.exp(),
        dense: measured.dense.as_ref().map(|dense| dense.loss.exp()),
    };
    receipt.depth = Some(match dense {
        Some(_) => Depth::Beside,
        None => Depth::Text,
    });
    let dense_half = dense.map(|dense| dense.checkpoint().half());
    let (pass, detail) = range_holds(&measured.range, declared(dir, model.half())?, dense_half);
    receipt.checks.push(Check::new(RANGE, pass, detail));
    receipt.range = Some(measured.range);
    let whose = |value: f64, name: &Path| match value {
        value if value.is_finite() => None,
        _ => Some(format!("{}: the output is not finite", name.display())),
    };
    let dense_dir = dense.map(|dense| dense.checkpoint().dir());
    let lost = whose(perplexity.value, dir)
        .or_else(|| whose(perplexity.dense.unwrap_or_default(), dense_dir?));
    if let Some(detail) = lost {
        receipt.checks.push(Check::new("perplexity", false, detail));
        return Ok(());
    }
    receipt.perplexity = Some(perplexity);
    if let Some(compared) = measured.dense {
        judge(receipt, measured.loss, compared, asked.tolerances);
    }
    Ok(())
}

/// Tokenizes the evaluation text with the tokenizer in `dir`.
fn evaluated(dir: &Path, evaluation: &Evaluation) -> Result<EvaluationText, VerifyError> {
    let Evaluation { text, window } = evaluation;
    if *window < 2 {
        return Err(VerifyError::Window { window: *window });
    }
    let tokenizer = TextTokenizer::load(dir)?;
    Ok(evaluation_tokens(text, &tokenizer, *window)?)
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Runs the model in `dir` on a text, with weights converted to `half`. `on_progress` as for
/// [`verify`].
///
/// # Errors
/// No checkpoint, no text, or an output that is not finite.
pub fn perplexity(
    dir: &Path,
    half: Half,
    evaluation: &Evaluation,
    device: Device,
    on_progress: &mut dyn FnMut(f64),
) -> Result<Perplexity, VerifyError> {
    device.resolve()?.run(Alone {
        dir,
        half,
        evaluation,
        on_progress,
    })?
}

struct Alone<'a> {
    dir: &'a Path,
    half: Half,
    evaluation: &'a Evaluation,
    on_progress: &'a mut dyn FnMut(f64),
}

impl Work for Alone<'_> {
    type Output = Result<Perplexity, VerifyError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let model = Model::<B>::open(self.dir, &device)?.taken_in(self.half);
        let evaluated = evaluated(self.dir, self.evaluation)?;
        let windows: Vec<Vec<u32>> = evaluated.windows().map(<[u32]>::to_vec).collect();
        let value = measure(&model, None, &windows, self.on_progress)?
            .loss
            .exp();
        let Evaluation { text, window } = self.evaluation;
        match value.is_finite() {
            true => Ok(Perplexity {
                text: file_name(text),
                text_sha256: Some(sha256_file(text)?),
                window: *window,
                tokens: evaluated.scored(),
                left_over: evaluated.left_over(),
                value,
                dense: None,
            }),
            false => Err(VerifyError::NonFiniteOutput {
                dir: self.dir.into(),
            }),
        }
    }
}

/// Returns the compute dtype declared in `config.json`; `stored` if it names no 16-bit dtype.
fn declared(dir: &Path, stored: Half) -> Result<Half, VerifyError> {
    let config: Value = read_json(&dir.join("config.json"))?;
    let name = ["dtype", "torch_dtype"]
        .iter()
        .find_map(|key| config.get(key)?.as_str());
    let halves = [Half::F16, Half::Bf16];
    let named = halves
        .into_iter()
        .find(|half| name == Some(half.torch_name()));
    Ok(named.unwrap_or(stored))
}

/// Checks that a program that computes in `declared` can run the model, and describes the result.
/// `dense` is the dtype in which the dense model is stored, if one was compared.
fn range_holds(range: &F16Range, declared: Half, dense: Option<Half>) -> (bool, String) {
    let Some(first) = range.overflows.first() else {
        let detail = format!(
            "all values are in range; the largest is {:.4e} ({})",
            range.largest, range.at
        );
        return (true, detail);
    };
    let largest = match first.largest {
        Some(largest) => format!(" reach {largest:.3e}"),
        None => " are infinite".to_owned(),
    };
    let others = match range.overflows.len() - 1 {
        0 => String::new(),
        1 => ", and also in one other place".to_owned(),
        n => format!(", and also in {n} other places"),
    };
    let found = format!(
        "{}{largest}, beyond f16's {} ({} {}){others}",
        range::place(first.layer, &first.what),
        Half::F16.largest(),
        first.values,
        if first.values == 1 { "value" } else { "values" },
    );
    if declared == Half::Bf16 {
        return (
            true,
            format!(
                "{found}; bf16, which config.json names, can hold them; programs that compute in f16 cannot"
            ),
        );
    }
    let bf16 = "dtype = \"bf16\" in the recipe";
    let why = match (first.dense, dense) {
        (Some(false), _) => "the dense model has none there: use more bits, smaller groups or other calibration text".to_owned(),
        (Some(true), Some(Half::Bf16)) => format!("the dense model has them too, and is bf16: {bf16} keeps its range"),
        (Some(true), _) => format!("the dense model has them too, so it cannot be run in f16 either: {bf16} gives a branch that can be run"),
        (None, _) => format!("use --against MODEL to see whether the dense model has them too; if so, use {bf16}"),
    };
    (
        false,
        format!("{found}: programs that compute in f16 get NaN; {why}"),
    )
}
