//! Drawing of calibration windows.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::documents::{Batch, LeftOut, ReadLimit};
use crate::source_file::SourceFile;
use crate::token_file::{TokenFile, TokenWriter};
use crate::{
    CalibrationError, CalibrationSettings, Difference, Manifest, Overlap, Sampling, TextTokenizer,
    documents, overlap,
};

/// Token windows and their origin.
#[derive(Debug)]
pub struct Calibration {
    /// `samples` windows of `seq_len` tokens, all full.
    pub windows: Vec<Vec<u32>>,
    /// Origin of the windows.
    pub manifest: Manifest,
    /// Difference in the first rows' tokens between two ways of building the tokenizer, if any.
    pub difference: Option<Difference>,
    tokens: TokenFile,
}

impl Calibration {
    /// Reads, renders, tokenizes and samples: one thread reads, all tokenize; with consecutive
    /// windows both stop once the windows are full.
    ///
    /// Errors if a file does not parse, a row lacks a column, or the text is too short for the
    /// windows; nothing is padded or repeated.
    pub fn draw(
        settings: &CalibrationSettings,
        tokenizer: &TextTokenizer,
    ) -> Result<Self, CalibrationError> {
        let files = settings.source.files()?;
        let chat = settings.chat(tokenizer)?;
        let rules = tokenizer.token_rules();
        let (hashed, joined) = thread::scope(|scope| {
            let (files, chat, rules) = (&files, chat.as_ref(), &rules);
            let hashing = scope.spawn(|| {
                let hashes = files.iter().map(SourceFile::hash);
                hashes.collect::<Result<Vec<_>, CalibrationError>>()
            });
            let (sender, batches) = sync_channel(2);
            let reading = scope.spawn(move || {
                let mut give = |batch| match sender.send(batch) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                };
                documents::send(settings, files, chat, rules, ReadLimit::ALL, &mut give)
            });
            let joined = join(settings, tokenizer, batches);
            // The reader's error explains more than its consequences do.
            reading
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))?;
            let joined = joined?;
            let hashed = hashing
                .join()
                .unwrap_or_else(|panic| resume_unwind(panic))?;
            Ok::<_, CalibrationError>((hashed, joined))
        })?;
        let Joined {
            row_count,
            left_out,
            mended_rows,
            masked_tokens,
            dated,
            difference,
            tokens,
        } = joined;
        let starts = starts(settings, tokens.len())?;
        let windows = starts
            .iter()
            .map(|&start| tokens.read(start, settings.seq_len))
            .collect::<Result<_, _>>()?;
        Ok(Calibration {
            windows,
            manifest: Manifest {
                source: settings.source.name(),
                revision: settings.source.revision().map(str::to_owned),
                files: hashed,
                rows: settings.rows.to_string(),
                row_count,
                null_rows: left_out.nulls,
                blank_rows: left_out.blank,
                objected_rows: left_out.objections,
                mended_rows,
                masked_tokens,
                date: chat.filter(|_| dated).map(|chat| chat.date().to_owned()),
                min_tokens: settings.min_tokens,
                dedupe: settings.dedupe,
                template: settings.rendering.describe(),
                tokenizer_sha256: tokenizer.sha256().to_owned(),
                available_tokens: tokens.len(),
                sampling: settings.sampling,
                seed: settings.seed,
                samples: settings.samples,
                seq_len: settings.seq_len,
                unique_tokens: covered(starts, settings.seq_len),
            },
            difference,
            tokens,
        })
    }

    /// Returns warnings about the text, one line each.
    pub fn warnings(&self) -> Vec<String> {
        let difference = self.difference.as_ref().map(ToString::to_string);
        let manifest = &self.manifest;
        let mended = match manifest.mended_rows {
            0 => None,
            rows => Some(format!(
                "{rows} rows contain unpaired surrogates, as in text cut within a character; each was replaced \
                 by U+FFFD"
            )),
        };
        let objected = match manifest.objected_rows {
            0 => None,
            rows => Some(format!(
                "{rows} rows were skipped because the chat template refused them"
            )),
        };
        let more = mended.into_iter().chain(objected);
        let more = more.chain(manifest.repetition_warning());
        difference.into_iter().chain(more).collect()
    }

    /// Computes how much of an evaluation text occurs in the rows used.
    pub fn overlap(&self, evaluation: &[u32]) -> Result<Overlap, CalibrationError> {
        overlap::overlap(&self.tokens, evaluation)
    }
}

/// Joined tokens, the number of rows used, and the counts of [`Batch`] for the others.
struct Joined {
    row_count: usize,
    left_out: LeftOut,
    mended_rows: usize,
    masked_tokens: usize,
    dated: bool,
    difference: Option<Difference>,
    tokens: TokenFile,
}

/// Tokenizes and joins batches.
fn join(
    settings: &CalibrationSettings,
    tokenizer: &TextTokenizer,
    batches: Receiver<Batch>,
) -> Result<Joined, CalibrationError> {
    let enough = match settings.sampling {
        Sampling::Concatenate => settings.samples.saturating_mul(settings.seq_len),
        Sampling::RandomWindows => usize::MAX,
    };
    let mut writer = TokenWriter::new()?;
    let mut row_count = 0;
    let (mut left_out, mut mended_rows, mut masked_tokens) = (LeftOut::default(), 0, 0);
    let mut difference = None;
    let (mut is_first, mut dated) = (true, false);
    for batch in batches {
        left_out += batch.left_out;
        mended_rows += batch.mended;
        masked_tokens += batch.masked;
        dated |= batch.dated;
        // The first batch is enough to compare the tokenizers.
        if std::mem::take(&mut is_first) {
            difference = tokenizer.difference(&batch.documents)?;
        }
        for tokens in tokenizer.encode_all(batch.documents)? {
            if tokens.len() >= settings.min_tokens {
                writer.push(&tokens)?;
                row_count += 1;
            }
        }
        if writer.len() >= enough {
            break;
        }
    }
    Ok(Joined {
        row_count,
        left_out,
        mended_rows,
        masked_tokens,
        dated,
        difference,
        tokens: writer.finish()?,
    })
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
            // Either one window fits or none, in which case only a shorter one helps.
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
            // High half of a 64-bit product: fixed here, so that a library's choice of algorithm
            // can never change a published draw. Its bias is below places / 2^64.
            let draw = |_| ((u128::from(rng.next_u64()) * places) >> 64) as usize;
            (0..samples).map(draw).collect()
        }
    })
}

/// Returns the number of positions covered by at least one window.
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

#[cfg(test)]
mod chats;
#[cfg(test)]
mod formats;
#[cfg(test)]
mod left_out;
#[cfg(test)]
mod same_rows;
#[cfg(test)]
mod tests;
