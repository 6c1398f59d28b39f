//! The whole judgement of one directory.

use std::path::{Path, PathBuf};

use gptq_calibration::{TextTokenizer, evaluation_tokens};
use gptq_format::{Bits, FileDigest, QuantizeConfig, files, sha256_file};
use gptq_kernels::{Device, Engine, Work};
use gptq_model::{Census, Model};
use serde::{Deserialize, Serialize};

use crate::compare::{Compared, Measured, measure};
use crate::recorded::Recorded;
use crate::{Check, Perplexity, RECEIPT, Receipt, VerifyError, structure};

/// Text to measure on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// Rows of any kind that calibration reads, with their text in the column `text`; a JSON list of
    /// texts; or one plain text.
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
    /// How far it may be from the dense model, where not as far as its bits let expect.
    pub tolerances: Asked,
}

/// Tolerances that were asked for, each in place of [`Tolerances::of`]'s.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs, reason = "the names are those of the tolerances")]
pub struct Asked {
    pub perplexity_increase: Option<f64>,
    pub kl_divergence: Option<f64>,
    pub top1_agreement: Option<f64>,
    pub block_error: Option<f64>,
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

impl Tolerances {
    /// What a branch of so many bits is expected to keep. medi-tiny, 64 windows of 1024, on 40 texts, in this
    /// order: 3 bits, group 128, act order +20.6 %, 0.264, 0.712, 0.078, as AutoGPTQ does it without act order
    /// +36.7 %, 0.409, 0.647, 0.119; 2 bits, group 128 +224 %, 1.40, 0.380, 0.336, group 64 +164 %, 1.25, 0.413,
    /// 0.305. Half as much again is tolerated of group 128 at 2 bits, twice as much at 3 and 4; larger models
    /// lose less. Weights that are not the model's lie far beyond any of them.
    pub fn of(bits: Bits) -> Self {
        let [
            perplexity_increase,
            kl_divergence,
            top1_agreement,
            block_error,
        ] = match bits {
            Bits::Two => [4.0, 2.0, 0.25, 0.5],
            Bits::Three => [0.4, 0.5, 0.6, 0.15],
            Bits::Four | Bits::Eight => [0.1, 0.1, 0.8, 0.1],
        };
        Tolerances {
            perplexity_increase,
            kl_divergence,
            top1_agreement,
            block_error,
        }
    }

    /// Those that were asked for, and for the others what the fewest bits of `config` let expect.
    fn new(asked: Asked, config: Option<&QuantizeConfig>) -> Self {
        let own = config.map(|config| config.bits);
        let overrides = config.and_then(|config| config.dynamic.as_ref());
        let overrides = overrides.into_iter().flat_map(|all| all.iter());
        let bits = overrides.filter_map(|(_, it)| it.bits).chain(own);
        let usual = Tolerances::of(bits.min_by_key(|bits| bits.get()).unwrap_or(Bits::Four));
        Tolerances {
            perplexity_increase: asked
                .perplexity_increase
                .unwrap_or(usual.perplexity_increase),
            kl_divergence: asked.kl_divergence.unwrap_or(usual.kl_divergence),
            top1_agreement: asked.top1_agreement.unwrap_or(usual.top1_agreement),
            block_error: asked.block_error.unwrap_or(usual.block_error),
        }
    }
}

/// Reopens `dir`, a branch or a dense checkpoint, and checks every tensor against its configs and the
/// digests that its maker recorded; nothing is run. What does not hold is a failed check.
///
/// # Errors
/// No checkpoint, or a `config.json` that is none.
pub fn check_tensors(dir: &Path) -> Result<Vec<Check>, VerifyError> {
    let recorded = Recorded::read(dir)?;
    Ok(structure::check(dir, &Census::take(dir)?, &recorded))
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
        let census = Census::take(dir)?;
        let recorded = Recorded::read(dir)?;
        // Both read every byte.
        let (checks, listed) =
            rayon::join(|| structure::check(dir, &census, &recorded), || files(dir));
        let model = Model::<B>::new(census.config, census.checkpoint, &device);
        let listed = listed?.into_iter().filter(|f| f.name != RECEIPT);
        let digest = |f: gptq_format::FileInfo| {
            let (bytes, sha256) = (f.bytes, f.sha256);
            (f.name, FileDigest { bytes, sha256 })
        };
        let mut receipt = Receipt {
            pass: false,
            gptq_version: env!("CARGO_PKG_VERSION").into(),
            files: listed.map(digest).collect(),
            checks,
            tolerances: Tolerances::new(request.tolerances, model.checkpoint().quantize_config()),
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
    if recorded.calibration_sha256.contains(&sha256_file(text)?) {
        let detail = "this file was calibrated on; measure on other text";
        receipt.checks.push(check("text", false, detail.into()));
        return Ok(());
    }
    let tokenizer = TextTokenizer::load(model.checkpoint().dir())?;
    let evaluated = evaluation_tokens(text, &tokenizer, *window)?;
    let windows: Vec<Vec<u32>> = evaluated.windows().map(<[u32]>::to_vec).collect();
    let Measured { perplexity, dense } = measure(model, dense, &windows, on_block)?;
    let name = text.file_name().unwrap_or_default().to_string_lossy();
    receipt.perplexity = Some(Perplexity {
        text: name.into_owned(),
        window: *window,
        tokens: evaluated.scored(),
        left_over: evaluated.left_over(),
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
