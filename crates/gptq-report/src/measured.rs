//! Measurements on text, kept apart by their windows: perplexities on other windows or another text
//! are not comparable.

use serde::Serialize;

use crate::{Branch, Matrix};

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
    mark: Option<String>,
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
    fn new(measured: &gptq_plan::Perplexity) -> Measured {
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

impl Branch {
    /// Returns the measurements of `gptq verify`, then those of `gptq quantize` if on other
    /// windows.
    pub fn measured(&self) -> Vec<Measured> {
        let receipt = self.receipt.as_ref();
        let verified = receipt.and_then(|receipt| {
            Some(Measured {
                kl_divergence: receipt.kl_divergence,
                top1_agreement: receipt.top1_agreement,
                ..Measured::new(receipt.perplexity.as_ref()?)
            })
        });
        let mut all: Vec<Measured> = verified.into_iter().collect();
        if let Some(own) = self.report.perplexity.as_ref().map(Measured::new) {
            match all.iter_mut().find(|it| it.windows.same(&own.windows)) {
                Some(it) => it.dense_perplexity = it.dense_perplexity.or(own.dense_perplexity),
                None => all.push(own),
            }
        }
        all
    }

    /// Returns the same measurements, with the matrix's names for the windows.
    pub(crate) fn measured_among(&self, windows: &[Windows]) -> Vec<Measured> {
        let mut all = self.measured();
        for measured in &mut all {
            let own = windows.iter().find(|it| it.same(&measured.windows));
            measured.windows = own.unwrap_or(&measured.windows).clone();
        }
        all
    }

    /// Returns the measurements on `windows`.
    pub fn measured_on(&self, windows: &Windows) -> Option<Measured> {
        (self.measured().into_iter()).find(|it| it.windows.same(windows))
    }
}

impl Matrix {
    /// Returns all windows used by any branch: those of most branches first, ties in order of
    /// appearance.
    pub fn windows(&self) -> Vec<Windows> {
        let mut all: Vec<Windows> = Vec::new();
        for measured in self.branches.iter().flat_map(Branch::measured) {
            if !all.iter().any(|it| it.same(&measured.windows)) {
                all.push(measured.windows);
            }
        }
        let branches = |windows: &Windows| {
            let measured = self.branches.iter();
            measured
                .filter(|b| b.measured_on(windows).is_some())
                .count()
        };
        // The sort is stable, so ties keep their order.
        all.sort_by_key(|windows| std::cmp::Reverse(branches(windows)));
        let names: Vec<String> = all.iter().map(Windows::name).collect();
        for windows in &mut all {
            let name = windows.name();
            let alike = names.iter().filter(|other| **other == name).count();
            let digest = windows
                .text_sha256
                .as_ref()
                .and_then(|digest| digest.get(..8));
            windows.mark = match digest {
                Some(digest) if alike > 1 => Some(format!("SHA-256 {digest}")),
                _ if alike > 1 => Some(format!("{} tokens", windows.tokens)),
                _ => None,
            };
        }
        all
    }
}
