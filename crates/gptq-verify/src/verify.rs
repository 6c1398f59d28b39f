//! The whole judgement of one directory.

use std::path::{Path, PathBuf};

use gptq_calibration::{TextTokenizer, evaluation_tokens};
use gptq_kernels::{Device, Engine, Work};
use gptq_model::Model;

use crate::{Structure, VerifyError, perplexity, structure};

/// Text to measure perplexity on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evaluation {
    /// A JSON list of texts, or one plain text.
    pub text: PathBuf,
    /// Tokens per window.
    pub window: usize,
}

/// A directory that passed.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What it holds.
    pub structure: Structure,
    /// On the evaluation text, if one was given.
    pub perplexity: Option<f64>,
    /// Tokens scored, if any.
    pub scored_tokens: usize,
    /// The dense model's perplexity on the same windows, if it was asked for.
    pub dense_perplexity: Option<f64>,
}

/// Reopens `dir`, a branch or a dense checkpoint, and checks it; with `evaluation`, runs it; with
/// `against`, runs that dense model beside it.
///
/// # Errors
/// The first thing that does not hold.
pub fn verify(
    dir: &Path,
    evaluation: Option<&Evaluation>,
    against: Option<&Path>,
    device: Device,
) -> Result<Verdict, VerifyError> {
    device.resolve()?.run(Verify {
        dir,
        evaluation,
        against,
    })?
}

struct Verify<'a> {
    dir: &'a Path,
    evaluation: Option<&'a Evaluation>,
    against: Option<&'a Path>,
}

impl Work for Verify<'_> {
    type Output = Result<Verdict, VerifyError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let model = Model::<B>::open(self.dir, &device)?;
        let structure = structure::check(self.dir, model.checkpoint(), model.config())?;
        let mut verdict = Verdict {
            structure,
            perplexity: None,
            scored_tokens: 0,
            dense_perplexity: None,
        };
        let Some(Evaluation { text, window }) = self.evaluation else {
            return Ok(verdict);
        };
        if *window < 2 {
            return Err(VerifyError::Window { window: *window });
        }
        let tokenizer = TextTokenizer::load(self.dir)?;
        let tokens = evaluation_tokens(text, &tokenizer, *window)?;
        let windows: Vec<Vec<u32>> = tokens.chunks_exact(*window).map(<[u32]>::to_vec).collect();
        verdict.scored_tokens = windows.len() * (window - 1);
        verdict.perplexity = Some(perplexity::perplexity(&model, &windows)?);
        if let Some(dense) = self.against {
            let dense = Model::<B>::open(dense, &device)?;
            verdict.dense_perplexity = Some(perplexity::perplexity(&dense, &windows)?);
        }
        Ok(verdict)
    }
}
