//! Frames of bytes on a connection: a kind, a length, the bytes.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrameKind {
    /// Bytes for the run.
    Data,
    /// A sign of life.
    Beat,
    /// The end of the run, an [`Ended`](crate::Ended) in JSON.
    End,
    /// The sender has done its part.
    Leave,
}

impl FrameKind {
    const ALL: [FrameKind; 4] = [
        FrameKind::Data,
        FrameKind::Beat,
        FrameKind::End,
        FrameKind::Leave,
    ];
}

/// Bytes that are read at once: a length that a stranger claims is not allocated.
const PIECE: u64 = 1 << 24;

/// Writes a frame.
pub(crate) fn write(to: &mut impl Write, kind: FrameKind, bytes: &[u8]) -> io::Result<()> {
    let mut head = [0; 9];
    head[0] = kind as u8;
    head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    to.write_all(&head)?;
    to.write_all(bytes)
}

/// Reads a frame.
pub(crate) fn read(from: &mut impl Read) -> io::Result<(FrameKind, Vec<u8>)> {
    let mut kind = [0];
    from.read_exact(&mut kind)?;
    let kind = FrameKind::ALL.into_iter().find(|it| *it as u8 == kind[0]);
    let kind = kind.ok_or(io::ErrorKind::InvalidData)?;
    let mut length = [0; 8];
    from.read_exact(&mut length)?;
    let mut left = u64::from_le_bytes(length);
    let mut bytes = Vec::new();
    while left > 0 {
        let piece = left.min(PIECE);
        if from.by_ref().take(piece).read_to_end(&mut bytes)? as u64 != piece {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= piece;
    }
    Ok((kind, bytes))
}

/// Start of a greeting, with the version of this protocol.
const MAGIC: &[u8; 13] = b"gptq ranks 1\n";
/// Largest greeting in bytes.
const MAX_GREETING: u32 = 4096;

/// Writes a greeting.
pub(crate) fn greet(to: &mut impl Write, greeting: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(greeting)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(text);
    to.write_all(&bytes)
}

/// Reads a greeting; whatever is none is invalid data.
pub(crate) fn greeting<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut head = [0; 17];
    from.read_exact(&mut head)?;
    let (magic, length) = head.split_at(MAGIC.len());
    let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
    if magic != MAGIC || length > MAX_GREETING {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; length as usize];
    from.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_as_they_were_written_and_cut_ones_are_errors() {
        let mut bytes = Vec::new();
        write(&mut bytes, FrameKind::Data, &[1, 2, 3]).unwrap();
        write(&mut bytes, FrameKind::Leave, &[]).unwrap();
        let mut from = bytes.as_slice();
        assert_eq!(read(&mut from).unwrap(), (FrameKind::Data, vec![1, 2, 3]));
        assert_eq!(read(&mut from).unwrap(), (FrameKind::Leave, vec![]));
        assert!(read(&mut from).is_err());
        for cut in 0..12 {
            assert!(read(&mut &bytes[..cut]).is_err(), "{cut}");
        }
        // Nothing is allocated for a length that nobody sends.
        let mut claim = vec![0];
        claim.extend(u64::MAX.to_le_bytes());
        assert!(read(&mut claim.as_slice()).is_err());
        assert!(read(&mut [9u8; 30].as_slice()).is_err());
    }

    #[test]
    fn what_is_no_greeting_is_refused() {
        let mut bytes = Vec::new();
        greet(&mut bytes, &vec![7, 8]).unwrap();
        assert_eq!(greeting::<Vec<u8>>(&mut bytes.as_slice()).unwrap(), [7, 8]);
        let long = [MAGIC.as_slice(), &[255; 4]].concat();
        for bad in [b"GET / HTTP/1.1\r\n\r\n".as_slice(), &long, &bytes[..20]] {
            assert!(greeting::<Vec<u8>>(&mut &bad[..]).is_err());
        }
    }
}
