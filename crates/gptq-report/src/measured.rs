//! Measurements on text, kept apart by their windows: perplexities on other windows or another text
//! are not comparable.

use serde::Serialize;

/// Windows of a text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Windows {
    /// File name of the text.
    pub text: String,
    /// SHA-256 of the text, if a report has it.
    #[serde(skip)]
    pub text_sha256: Option<String>,
    /// Tokens per window.
    pub window: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// Suffix that distinguishes windows of the same name.
    #[serde(skip)]
    pub(crate) mark: Option<String>,
}

impl Windows {
    /// Returns true if measurements on these and on `other` are comparable.
    pub fn same(&self, other: &Windows) -> bool {
        let all = |it: &Windows| {
            let Windows {
                text, text_sha256, ..
            } = it;
            (text.clone(), text_sha256.clone(), it.window, it.tokens)
        };
        all(self) == all(other)
    }

    /// Returns a heading: `"eval.json, windows of 1024"`.
    pub fn name(&self) -> String {
        let mark = self.mark.as_ref().map(|mark| format!(" ({mark})"));
        format!(
            "{}{}, windows of {}",
            self.text,
            mark.unwrap_or_default(),
            self.window
        )
    }
}

/// Measurements of a branch on some windows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// Windows that were measured on.
    #[serde(flatten)]
    pub windows: Windows,
    /// Perplexity of the branch.
    pub perplexity: f64,
    /// Perplexity of the dense model.
    pub dense_perplexity: Option<f64>,
    /// Mean KL divergence from the dense model, nats.
    pub kl_divergence: Option<f64>,
    /// Share of positions with the dense model's most likely token.
    pub top1_agreement: Option<f64>,
}

impl Measured {
    pub(crate) fn new(measured: &gptq_plan::Perplexity) -> Measured {
        Measured {
            windows: Windows {
                text: measured.text.clone(),
                text_sha256: measured.text_sha256.clone(),
                window: measured.window,
                tokens: measured.tokens,
                mark: None,
            },
            perplexity: measured.value,
            dense_perplexity: measured.dense,
            kl_divergence: None,
            top1_agreement: None,
        }
    }
}
