//! The fields of `report.json` that verification compares with.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_format::{FormatError, MAX_REPORT, TensorDigests, read_json_within};
use serde::Deserialize;

/// Recorded fields.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    /// Digests of every linear layer's tensors by module; `None` if they were not recorded.
    pub digests: Option<BTreeMap<String, TensorDigests>>,
    /// SHA-256 of the calibration sources.
    pub calibration_sha256: Vec<String>,
    /// Preset and number of calibration tokens, for the advice.
    pub preset: Option<String>,
    pub calibration_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Report {
    preset: Option<String>,
    #[serde(default)]
    linears: Vec<LinearRecord>,
    calibration: Option<CalibrationRecord>,
}

#[derive(Deserialize)]
struct LinearRecord {
    name: String,
    digests: Option<TensorDigests>,
}

#[derive(Deserialize)]
struct CalibrationRecord {
    #[serde(default)]
    samples: usize,
    #[serde(default)]
    seq_len: usize,
    /// SHA-256 of the source, from older reports, which had a single source file.
    source_sha256: Option<String>,
    #[serde(default)]
    files: Vec<CalibrationFile>,
}

#[derive(Deserialize)]
struct CalibrationFile {
    sha256: String,
}

impl Recorded {
    /// Reads `report.json` in `dir`; without one, nothing is recorded.
    pub(crate) fn read(dir: &Path) -> Result<Self, FormatError> {
        let path = dir.join("report.json");
        if !path.exists() {
            return Ok(Recorded::default());
        }
        let report: Report = read_json_within(&path, MAX_REPORT)?;
        let digests: BTreeMap<_, _> = report
            .linears
            .into_iter()
            .filter_map(|linear| Some((linear.name, linear.digests?)))
            .collect();
        let tokens = (report.calibration.as_ref()).map(|c| c.samples.saturating_mul(c.seq_len));
        Ok(Recorded {
            preset: report.preset,
            calibration_tokens: tokens.filter(|&tokens| tokens > 0),
            digests: (!digests.is_empty()).then_some(digests),
            calibration_sha256: report.calibration.map_or_else(Vec::new, |calibration| {
                let files = calibration.files.into_iter().map(|file| file.sha256);
                files.chain(calibration.source_sha256).collect()
            }),
        })
    }
}
