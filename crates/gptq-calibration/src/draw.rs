//! Drawing windows, and the manifest of what was drawn.

use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{CalibrationError, RowRange, Template, TextTokenizer, source};

/// How windows are taken from the joined rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// Seeded windows anywhere in the joined rows; they may overlap.
    #[default]
    RandomWindows,
    /// Consecutive windows from the start.
    Concatenate,
}

/// What to calibrate on.
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrationSettings {
    /// A JSON file with a list of rows.
    pub source: PathBuf,
    /// A row as one document.
    pub template: Template,
    /// Which rows.
    pub rows: RowRange,
    /// Windows.
    pub samples: usize,
    /// Tokens per window.
    pub seq_len: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// How windows are taken.
    pub sampling: Sampling,
}

/// What went into a calibration; names no path of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// File name of the source.
    pub source: String,
    /// SHA-256 of the source.
    pub source_sha256: String,
    /// The range of rows asked for.
    pub rows: String,
    /// Rows used.
    pub row_count: usize,
    /// The template.
    pub template: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// Tokens in the joined rows.
    pub available_tokens: usize,
    /// How windows were taken.
    pub sampling: Sampling,
    /// Seed of the draw.
    pub seed: u64,
    /// Windows drawn.
    pub samples: usize,
    /// Tokens per window.
    pub seq_len: usize,
    /// Positions of the joined rows that lie in at least one window.
    pub unique_tokens: usize,
}

/// Token windows and where they came from.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// `samples` windows of `seq_len` tokens, all full.
    pub windows: Vec<Vec<u32>>,
    /// Where they came from.
    pub manifest: Manifest,
}

impl Calibration {
    /// Reads, renders, tokenises and samples.
    ///
    /// Errors when the source does not parse, a row lacks a column, or the text is too short for the
    /// windows; nothing is padded or repeated.
    pub fn draw(
        settings: &CalibrationSettings,
        tokenizer: &TextTokenizer,
    ) -> Result<Self, CalibrationError> {
        let source::Rows { rows, sha256 } = source::read_rows(&settings.source, settings.rows)?;
        let documents = rows
            .iter()
            .map(|(index, row)| settings.template.render(*index, row))
            .collect::<Result<Vec<_>, _>>()?;
        let tokens = tokenizer.join(documents)?;
        let starts = starts(settings, tokens.len())?;
        let windows = starts
            .iter()
            .map(|&start| tokens[start..start + settings.seq_len].to_vec())
            .collect();
        let name = settings.source.file_name().unwrap_or_default();
        Ok(Calibration {
            windows,
            manifest: Manifest {
                source: name.to_string_lossy().into_owned(),
                source_sha256: sha256,
                rows: settings.rows.to_string(),
                row_count: rows.len(),
                template: settings.template.as_str().to_owned(),
                tokenizer_sha256: tokenizer.sha256().to_owned(),
                available_tokens: tokens.len(),
                sampling: settings.sampling,
                seed: settings.seed,
                samples: settings.samples,
                seq_len: settings.seq_len,
                unique_tokens: covered(starts, settings.seq_len),
            },
        })
    }
}

fn starts(
    settings: &CalibrationSettings,
    available: usize,
) -> Result<Vec<usize>, CalibrationError> {
    let CalibrationSettings {
        samples, seq_len, ..
    } = *settings;
    let needed = match settings.sampling {
        Sampling::Concatenate => samples.saturating_mul(seq_len),
        Sampling::RandomWindows => seq_len,
    };
    if available < needed {
        let (fit, fit_len) = match settings.sampling {
            Sampling::Concatenate => (available / seq_len, available / samples),
            // One window fits or none does: only a shorter one helps.
            Sampling::RandomWindows => (0, available),
        };
        return Err(CalibrationError::TooLittleText {
            available,
            samples,
            seq_len,
            needed,
            fit,
            fit_len,
        });
    }
    Ok(match settings.sampling {
        Sampling::Concatenate => (0..samples).map(|i| i * seq_len).collect(),
        Sampling::RandomWindows => {
            let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
            let places = (available - seq_len + 1) as u128;
            // The high half of a 64-bit product: fixed here, so that a library's own choice of
            // algorithm can never change a published draw. Its bias is below places / 2^64.
            let draw = |_| ((u128::from(rng.next_u64()) * places) >> 64) as usize;
            (0..samples).map(draw).collect()
        }
    })
}

/// How many positions lie in a window.
fn covered(mut starts: Vec<usize>, seq_len: usize) -> usize {
    starts.sort_unstable();
    let mut end = 0;
    let mut total = 0;
    for start in starts {
        total += (start + seq_len) - end.clamp(start, start + seq_len);
        end = end.max(start + seq_len);
    }
    total
}

/// The joined tokens of an evaluation text: `.json` holds a list of texts, anything else is one
/// text. Errors when they do not fill a window.
pub fn evaluation_tokens(
    path: &Path,
    tokenizer: &TextTokenizer,
    window: usize,
) -> Result<Vec<u32>, CalibrationError> {
    let tokens = tokenizer.join(source::read_texts(path)?)?;
    if tokens.len() < window {
        return Err(CalibrationError::TooLittleEvaluation {
            available: tokens.len(),
            window,
        });
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(path: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "../..", path].iter().collect()
    }

    fn settings(sampling: Sampling) -> CalibrationSettings {
        CalibrationSettings {
            source: root("calibration/wikidoc/wikidoc_patient_information_1000.json"),
            template: Template::parse("{input}\n{output}").unwrap(),
            rows: "0:50".parse().unwrap(),
            samples: 4,
            seq_len: 512,
            seed: 3,
            sampling,
        }
    }

    fn tokenizer() -> TextTokenizer {
        TextTokenizer::load(&root("tests/models/medi-tiny")).unwrap()
    }

    #[test]
    fn concatenated_windows_are_the_text_from_its_start() {
        let tokenizer = tokenizer();
        let drawn = Calibration::draw(&settings(Sampling::Concatenate), &tokenizer).unwrap();
        assert_eq!(drawn.windows.len(), 4);
        assert_eq!(drawn.windows[0][0], 1, "the tokenizer's own <s> leads");
        assert!(
            drawn.windows.concat().contains(&2),
            "documents end with </s>"
        );
        assert_eq!(drawn.manifest.unique_tokens, 4 * 512);
        assert_eq!(drawn.manifest.row_count, 50);
    }

    #[test]
    fn a_seed_gives_the_same_windows_and_another_seed_others() {
        let tokenizer = tokenizer();
        let draw = |seed| {
            let settings = CalibrationSettings {
                seed,
                ..settings(Sampling::RandomWindows)
            };
            Calibration::draw(&settings, &tokenizer).unwrap().windows
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
        assert!(draw(3).iter().all(|w| w.len() == 512));
    }

    #[test]
    fn too_little_text_says_what_would_fit() {
        let tokenizer = tokenizer();
        let settings = CalibrationSettings {
            samples: 1000,
            ..settings(Sampling::Concatenate)
        };
        let error = Calibration::draw(&settings, &tokenizer).unwrap_err();
        let CalibrationError::TooLittleText {
            available,
            needed,
            fit,
            fit_len,
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!(needed, 512_000);
        assert_eq!((fit, fit_len), (available / 512, available / 1000));
        let rows = CalibrationSettings {
            rows: "5000:".parse().unwrap(),
            ..settings
        };
        assert!(matches!(
            Calibration::draw(&rows, &tokenizer),
            Err(CalibrationError::NoRows {
                available: 1000,
                ..
            })
        ));
    }

    #[test]
    fn covered_positions_are_counted_once() {
        assert_eq!(covered(vec![0, 10, 3], 5), 13);
        assert_eq!(covered(vec![4, 4], 5), 5);
    }
}
