//! The whole judgement of one directory.

use std::path::{Path, PathBuf};

use gptq_calibration::{TextTokenizer, evaluation_tokens};
use gptq_format::{FormatError, files, sha256};
use gptq_kernels::{Device, Engine, Work};
use gptq_model::Model;
use serde::{Deserialize, Serialize};

use crate::compare::{Compared, Measured, measure};
use crate::recorded::Recorded;
use crate::{Check, FileDigest, Perplexity, RECEIPT, Receipt, VerifyError, structure};

/// Text to measure on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// A JSON list of texts, or one plain text.
    pub text: PathBuf,
    /// Tokens per window.
    pub window: usize,
}

/// What to check.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Run it on this text.
    pub evaluation: Option<Evaluation>,
    /// Run this dense model beside it on the same text.
    pub against: Option<PathBuf>,
    /// How far it may be from the dense model.
    pub tolerances: Tolerances,
}

/// How far a branch may be from its dense model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tolerances {
    /// Perplexity over the dense model's, as a fraction of it.
    pub perplexity_increase: f64,
    /// Mean KL divergence, nats per token.
    pub kl_divergence: f64,
    /// Least fraction of tokens with the same most likely next token.
    pub top1_agreement: f64,
    /// Largest relative error of a block.
    pub block_error: f64,
}

impl Default for Tolerances {
    fn default() -> Self {
        Tolerances {
            perplexity_increase: 0.1,
            kl_divergence: 0.1,
            top1_agreement: 0.8,
            block_error: 0.1,
        }
    }
}

/// Reopens `dir`, a branch or a dense checkpoint, and checks it as `request` says. `on_block` is told
/// how many blocks of how many the text has been through.
///
/// # Errors
/// What cannot be judged at all: no checkpoint, no text. What can be and does not hold is a failed
/// check of the receipt.
pub fn verify(
    dir: &Path,
    request: &Request,
    device: Device,
    on_block: &mut dyn FnMut(usize, usize),
) -> Result<Receipt, VerifyError> {
    device.resolve()?.run(Verify {
        dir,
        request,
        on_block,
    })?
}

struct Verify<'a> {
    dir: &'a Path,
    request: &'a Request,
    on_block: &'a mut dyn FnMut(usize, usize),
}

impl Work for Verify<'_> {
    type Output = Result<Receipt, VerifyError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let Verify {
            dir,
            request,
            on_block,
        } = self;
        let model = Model::<B>::open(dir, &device)?;
        let recorded = Recorded::read(dir)?;
        let checks = structure::check(dir, model.checkpoint(), model.config(), &recorded);
        let listed = files(dir)?.into_iter().filter(|f| f.name != RECEIPT);
        let digest = |f: gptq_format::FileInfo| {
            let (bytes, sha256) = (f.bytes, f.sha256);
            (f.name, FileDigest { bytes, sha256 })
        };
        let mut receipt = Receipt {
            pass: false,
            gptq_version: env!("CARGO_PKG_VERSION").into(),
            files: listed.map(digest).collect(),
            checks,
            tolerances: request.tolerances,
            perplexity: None,
            kl_divergence: None,
            top1_agreement: None,
            blocks: Vec::new(),
        };
        let sound = receipt.checks.iter().all(|check| check.pass);
        // Damaged files are not run: what came of it would say nothing.
        if let Some(evaluation) = request.evaluation.as_ref().filter(|_| sound) {
            let dense = (request.against.as_deref())
                .map(|dense| open_dense(&model, dense, &device))
                .transpose()?;
            let layers = model.config().layers;
            let mut on_block = |done| on_block(done, layers);
            run(
                &model,
                dense.as_ref(),
                evaluation,
                &recorded,
                &mut receipt,
                &mut on_block,
            )?;
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

fn run<B: Engine>(
    model: &Model<B>,
    dense: Option<&Model<B>>,
    evaluation: &Evaluation,
    recorded: &Recorded,
    receipt: &mut Receipt,
    on_block: &mut dyn FnMut(usize),
) -> Result<(), VerifyError> {
    let Evaluation { text, window } = evaluation;
    if *window < 2 {
        return Err(VerifyError::Window { window: *window });
    }
    let bytes = std::fs::read(text).map_err(FormatError::io(text))?;
    if recorded.calibration_sha256.contains(&sha256(&bytes)) {
        let detail = "this file was calibrated on; measure on other text";
        receipt.checks.push(check("text", false, detail.into()));
        return Ok(());
    }
    let tokenizer = TextTokenizer::load(model.checkpoint().dir())?;
    let tokens = evaluation_tokens(text, &tokenizer, *window)?;
    let windows: Vec<Vec<u32>> = tokens.chunks_exact(*window).map(<[u32]>::to_vec).collect();
    let Measured { perplexity, dense } = measure(model, dense, &windows, on_block)?;
    let name = text.file_name().unwrap_or_default().to_string_lossy();
    receipt.perplexity = Some(Perplexity {
        text: name.into_owned(),
        window: *window,
        tokens: windows.len() * (window - 1),
        value: perplexity,
        dense: dense.as_ref().map(|d| d.perplexity),
    });
    if let Some(compared) = dense {
        judge(receipt, perplexity, compared);
    }
    Ok(())
}

/// Compares what was measured with the tolerances.
fn judge(receipt: &mut Receipt, perplexity: f64, compared: Compared) {
    let Compared {
        perplexity: dense,
        kl_divergence,
        top1_agreement,
        blocks,
    } = compared;
    let allowed = receipt.tolerances;
    let increase = perplexity / dense - 1.0;
    let worst = blocks
        .iter()
        .max_by(|a, b| a.relative_error.total_cmp(&b.relative_error));
    receipt.checks.extend([
        check(
            "perplexity",
            increase <= allowed.perplexity_increase,
            format!(
                "{perplexity:.4}, dense {dense:.4}: {:+.2} %, tolerated {:+.2} %",
                100.0 * increase,
                100.0 * allowed.perplexity_increase
            ),
        ),
        check(
            "KL divergence",
            kl_divergence <= allowed.kl_divergence,
            format!("{kl_divergence:.5}, tolerated {}", allowed.kl_divergence),
        ),
        check(
            "top-1 agreement",
            top1_agreement >= allowed.top1_agreement,
            format!("{top1_agreement:.4}, at least {}", allowed.top1_agreement),
        ),
    ]);
    receipt.checks.extend(worst.map(|worst| {
        check(
            "blocks",
            worst.relative_error <= allowed.block_error,
            format!(
                "largest relative error {:.3e} in block {}, tolerated {}",
                worst.relative_error, worst.layer, allowed.block_error
            ),
        )
    }));
    receipt.kl_divergence = Some(kl_divergence);
    receipt.top1_agreement = Some(top1_agreement);
    receipt.blocks = blocks;
}

fn check(name: &str, pass: bool, detail: String) -> Check {
    Check {
        name: name.into(),
        pass,
        detail,
    }
}
