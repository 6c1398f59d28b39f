//! Joined tokens in an unnamed temporary file, so that text of any length is tokenized once and
//! windows are read back from any position. Little-endian `u32`.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};

use crate::CalibrationError;

/// Tokens read at once when all are needed.
const PIECE: usize = 1 << 18;

/// Appends tokens.
pub(crate) struct TokenWriter {
    file: BufWriter<File>,
    len: usize,
}

/// Finished file of tokens.
#[derive(Debug)]
pub(crate) struct TokenFile {
    file: File,
    len: usize,
}

impl TokenWriter {
    pub(crate) fn new() -> Result<Self, CalibrationError> {
        Ok(TokenWriter {
            file: BufWriter::new(tempfile::tempfile().map_err(scratch)?),
            len: 0,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn push(&mut self, tokens: &[u32]) -> Result<(), CalibrationError> {
        self.len += tokens.len();
        let mut tokens = tokens.iter();
        tokens
            .try_for_each(|token| self.file.write_all(&token.to_le_bytes()))
            .map_err(scratch)
    }

    pub(crate) fn finish(self) -> Result<TokenFile, CalibrationError> {
        let flushed = self.file.into_inner();
        Ok(TokenFile {
            file: flushed.map_err(|e| scratch(e.into_error()))?,
            len: self.len,
        })
    }
}

impl TokenFile {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Reads `len` tokens from `start`; the range must be inside the file.
    pub(crate) fn read(&self, start: usize, len: usize) -> Result<Vec<u32>, CalibrationError> {
        let mut bytes = vec![0; 4 * len];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(4 * start as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(scratch)?;
        let words = bytes.as_chunks().0.iter();
        Ok(words.map(|word| u32::from_le_bytes(*word)).collect())
    }

    /// Returns all tokens in pieces.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Result<Vec<u32>, CalibrationError>> {
        let starts = (0..self.len).step_by(PIECE);
        starts.map(|start| self.read(start, PIECE.min(self.len - start)))
    }
}

fn scratch(source: io::Error) -> CalibrationError {
    CalibrationError::Scratch { source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_read_back_from_anywhere() {
        let mut writer = TokenWriter::new().unwrap();
        let tokens: Vec<u32> = (0..PIECE as u32 + 10).map(|i| i.wrapping_mul(77)).collect();
        writer.push(&tokens[..3]).unwrap();
        writer.push(&tokens[3..]).unwrap();
        let file = writer.finish().unwrap();
        assert_eq!(file.len(), tokens.len());
        assert_eq!(file.read(5, 7).unwrap(), tokens[5..12]);
        let all: Vec<u32> = file.pieces().flat_map(Result::unwrap).collect();
        assert_eq!(all, tokens);
    }
}
