//! The pieces of a SentencePiece model (`tokenizer.model`): a protobuf message whose field 1 is a piece, which has a text
//! (1), a score (2) and a type (3). Source: `sentencepiece_model.proto`.

/// A piece of the vocabulary.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    pub(crate) score: f32,
    /// 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte; the numbers of GGUF.
    pub(crate) kind: i32,
}

/// Most pieces that are read.
const MAX_PIECES: usize = 1 << 22;

/// A field's number and value.
enum ProtoField<'a> {
    Number(u64),
    Four([u8; 4]),
    Bytes(&'a [u8]),
    Eight,
}

/// Reads the pieces; `None` if the bytes are no such message.
pub(crate) fn pieces(mut bytes: &[u8]) -> Option<Vec<Piece>> {
    let mut pieces = Vec::new();
    while !bytes.is_empty() {
        if let (1, ProtoField::Bytes(piece)) = field(&mut bytes)? {
            pieces.push(piece_of(piece)?);
        }
        if pieces.len() > MAX_PIECES {
            return None;
        }
    }
    Some(pieces)
}

fn piece_of(mut bytes: &[u8]) -> Option<Piece> {
    let mut piece = Piece {
        text: String::new(),
        score: 0.0,
        kind: 1,
    };
    while !bytes.is_empty() {
        match field(&mut bytes)? {
            (1, ProtoField::Bytes(text)) => piece.text = String::from_utf8(text.to_vec()).ok()?,
            (2, ProtoField::Four(score)) => piece.score = f32::from_le_bytes(score),
            (3, ProtoField::Number(kind)) => piece.kind = i32::try_from(kind).ok()?,
            _ => {}
        }
    }
    Some(piece)
}

fn field<'a>(bytes: &mut &'a [u8]) -> Option<(u64, ProtoField<'a>)> {
    let tag = varint(bytes)?;
    let value = match tag & 7 {
        0 => ProtoField::Number(varint(bytes)?),
        1 => {
            *bytes = bytes.get(8..)?;
            ProtoField::Eight
        }
        2 => {
            let length = usize::try_from(varint(bytes)?).ok()?;
            let value = bytes.get(..length)?;
            *bytes = bytes.get(length..)?;
            ProtoField::Bytes(value)
        }
        5 => {
            let (value, rest) = bytes.split_first_chunk::<4>()?;
            *bytes = rest;
            ProtoField::Four(*value)
        }
        _ => return None,
    };
    Some((tag >> 3, value))
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 127) << shift;
        if byte & 128 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_and_other_bytes_are_none() {
        // Two pieces, and a message of other settings (field 2).
        let mut bytes = vec![0x0a, 14, 0x0a, 5];
        bytes.extend(b"<unk>");
        bytes.extend([0x15, 0, 0, 0, 0, 0x18, 2]);
        bytes.extend([0x0a, 8, 0x0a, 1, b'a', 0x15, 0, 0, 0x80, 0xbf]);
        bytes.extend([0x12, 2, 0x08, 1]);
        let found = pieces(&bytes).unwrap();
        assert_eq!((found[0].text.as_str(), found[0].kind), ("<unk>", 2));
        assert_eq!(
            (found[1].text.as_str(), found[1].score, found[1].kind),
            ("a", -1.0, 1)
        );
        for end in 1..bytes.len() {
            let _ = pieces(&bytes[..end]);
        }
        assert_eq!(pieces(b"{\"not\": \"protobuf\"}"), None);
    }
}
