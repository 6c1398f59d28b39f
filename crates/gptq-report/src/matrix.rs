//! The branches below a directory, read from their files.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_eval::TaskResults;
use gptq_format::{
    Contents, FormatError, LinearShape, ModuleNames, Support, branch_dirs, client_support, layout,
    read_json,
};
use gptq_plan::{BranchReport, Receipt};

use crate::{Accuracy, Measured, ReportError, Windows, accuracy};

/// A finished branch directory.
#[derive(Clone, Debug)]
pub struct Branch {
    /// Its `report.json`.
    pub report: BranchReport,
    /// Its `verify.json`, if it was verified.
    pub receipt: Option<Receipt>,
    /// Its `eval.json`, if it was asked tasks with the weights that lie there.
    pub answers: Option<TaskResults>,
    /// Its `config.json`.
    pub config: serde_json::Value,
    /// The directory.
    pub dir: PathBuf,
    /// Total size of its weight files in bytes.
    pub bytes: u64,
}

/// Branches of one model, sorted: `main` first, then by bits and by size.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The branches, at least one.
    pub branches: Vec<Branch>,
}

impl Matrix {
    /// Reads `dir`: a branch directory, or a directory of branch directories.
    ///
    /// # Errors
    /// No branch, a file that does not parse, or branches of different models or with the same
    /// name.
    pub fn read(dir: &Path) -> Result<Matrix, ReportError> {
        let is_branch = |dir: &Path| dir.join("report.json").is_file();
        let mut branches = Vec::new();
        if is_branch(dir) {
            branches.push(Branch::read(dir)?);
        } else {
            for (_, path) in branch_dirs(dir)? {
                if is_branch(&path) {
                    branches.push(Branch::read(&path)?);
                }
            }
        }
        branches.sort_by(|a, b| a.place().partial_cmp(&b.place()).expect("no floats in it"));
        let dir = || dir.to_owned();
        let Some(first) = branches.first() else {
            return Err(ReportError::NoBranches { dir: dir() });
        };
        let model = &first.report.model;
        if let Some(other) = branches.iter().find(|b| b.report.model != *model) {
            return Err(ReportError::TwoModels {
                dir: dir(),
                first: model.clone(),
                second: other.report.model.clone(),
            });
        }
        let mut names: Vec<&str> = branches.iter().map(|b| b.report.branch.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ReportError::SameName {
                dir: dir(),
                name: pair[0].to_owned(),
            });
        }
        Ok(Matrix { branches })
    }

    /// Returns the first branch's directory; its tokenizer stands for all branches.
    pub fn dir(&self) -> &Path {
        &self.branches[0].dir
    }

    /// Returns the base model's public name.
    pub fn model(&self) -> &str {
        &self.branches[0].report.model
    }

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

impl Matrix {
    /// Returns an accuracy on each task that any branch was asked, those of most branches first.
    pub(crate) fn tasks(&self) -> Vec<Accuracy> {
        let all: Vec<Vec<Accuracy>> = self.branches.iter().map(Branch::accuracies).collect();
        accuracy::tasks(&all)
    }
}

impl Branch {
    fn read(dir: &Path) -> Result<Branch, ReportError> {
        let receipt = Receipt::read(dir)?;
        Ok(Branch {
            report: BranchReport::read(dir)?,
            answers: accuracy::answers(dir, receipt.as_ref())?,
            receipt,
            config: read_json(&dir.join("config.json"))?,
            dir: dir.to_owned(),
            bytes: weight_bytes(dir)?,
        })
    }

    /// Returns its sort key in a matrix.
    fn place(&self) -> impl PartialOrd {
        let report = &self.report;
        let bits = report.quantize_config.bits;
        (
            report.branch != "main",
            bits,
            self.bytes,
            report.branch.clone(),
        )
    }

    /// Returns the failed checks of `gptq verify`, if any.
    pub fn failure(&self) -> Option<String> {
        let receipt = self.receipt.as_ref().filter(|receipt| !receipt.pass)?;
        let first = receipt.checks.iter().find(|check| !check.pass);
        Some(match first {
            Some(check) => format!("{}: {}", check.name, check.detail),
            None => "verify.json gives no reason".to_owned(),
        })
    }

    /// Returns the shapes of its quantized linear layers.
    fn linears(&self) -> Vec<LinearShape> {
        self.report.linears.iter().map(|it| it.stored()).collect()
    }

    /// Returns true if its linear layers differ in bits or group size.
    pub fn mixed(&self) -> bool {
        let settings = |l: &LinearShape| (l.bits, l.group_size);
        let linears = self.linears();
        linears
            .windows(2)
            .any(|l| settings(&l[0]) != settings(&l[1]))
    }

    /// Returns the bits per weight of its quantized linear layers, scales, zero points and `g_idx`
    /// included; `None` if no layer is quantized.
    pub fn bits_per_weight(&self) -> Option<f64> {
        let linears = self.linears();
        let config = &self.report.quantize_config;
        let format = layout(config.checkpoint_format, config.sym);
        let stored: u64 = linears.iter().map(|it| format.stored_bits(it)).sum();
        let weights: u64 = linears.iter().map(LinearShape::weights).sum();
        (weights > 0).then(|| stored as f64 / weights as f64)
    }

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

    /// Returns its accuracies on tasks.
    pub fn accuracies(&self) -> Vec<Accuracy> {
        self.answers
            .as_ref()
            .map_or_else(Vec::new, accuracy::accuracies)
    }

    /// Returns its accuracy on the task of `other`, under the name that it has there.
    pub(crate) fn accuracy_on(&self, other: &Accuracy) -> Option<Accuracy> {
        let own = self.accuracies().into_iter().find(|it| it.same(other))?;
        Some(Accuracy {
            task: other.task.clone(),
            ..own
        })
    }

    /// Returns which clients can load it.
    pub fn clients(&self) -> Vec<Support> {
        let contents = Contents {
            names: ModuleNames::of(self.report.linears.iter().map(|linear| &linear.name)),
            ..Contents::of(&self.report.quantize_config, self.linears())
        };
        client_support(&contents)
    }
}

/// Returns the total size of the safetensors and GGUF files in `dir`.
fn weight_bytes(dir: &Path) -> Result<u64, FormatError> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).map_err(FormatError::io(dir))? {
        let path = entry.map_err(FormatError::io(dir))?.path();
        if path
            .extension()
            .is_some_and(|end| end == "safetensors" || end == "gguf")
        {
            let meta = fs::metadata(&path).map_err(FormatError::io(&path))?;
            // Saturates, since a sparse file may claim any length.
            bytes = u64::saturating_add(bytes, meta.len());
        }
    }
    Ok(bytes)
}
