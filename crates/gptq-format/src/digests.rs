//! SHA-256 of a linear's tensors: what the maker wrote, for whoever reads it back.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{FormatError, PackedLinear, le_bytes};

/// Lower-case hexadecimal SHA-256 of each tensor's raw little-endian bytes, as they lie in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the tensors'")]
pub struct LinearDigests {
    pub qweight: String,
    pub qzeros: String,
    pub scales: String,
    pub g_idx: String,
}

impl LinearDigests {
    /// Of a linear as it is written.
    pub fn of(linear: &PackedLinear) -> Self {
        LinearDigests {
            qweight: sha256(&le_bytes(&linear.qweight)),
            qzeros: sha256(&le_bytes(&linear.qzeros)),
            scales: sha256(&le_bytes(&linear.scales)),
            g_idx: sha256(&le_bytes(&linear.g_idx)),
        }
    }
}

/// Lower-case hexadecimal SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// Lower-case hexadecimal SHA-256 of a file, read a piece at a time.
///
/// # Errors
/// It cannot be read.
pub fn sha256_file(path: &Path) -> Result<String, FormatError> {
    let file = File::open(path).map_err(FormatError::io(path))?;
    let mut file = BufReader::with_capacity(1 << 16, file);
    let mut hash = Sha256::new();
    loop {
        let piece = file.fill_buf().map_err(FormatError::io(path))?;
        let read = piece.len();
        if read == 0 {
            return Ok(hexadecimal(&hash.finalize()));
        }
        hash.update(piece);
        file.consume(read);
    }
}

/// Lower-case hexadecimal.
pub fn hexadecimal(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_of_little_endian_bytes() {
        // The example of FIPS 180-4.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), abc);
        assert_eq!(sha256(&le_bytes(&[0x6463_6261_i32])), sha256(b"abcd"));
    }
}
