//! Operands of opcodes: bytes, lines and numbers.

/// Maximum number of bytes in a name.
pub(super) const MAX_NAME: usize = 512;

const TRUNCATED: &str = "its pickle ends in the middle; the file may be truncated";

/// Result of a step of the machine; the error is a sentence.
pub(super) type Step<T = ()> = Result<T, String>;

/// The rest of a pickle.
pub(super) struct Operands<'a>(pub(super) &'a [u8]);

impl<'a> Operands<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Step<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(TRUNCATED)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Step<u8> {
        self.array().map(|[byte]| byte)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(TRUNCATED)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn line(&mut self) -> Step<&'a str> {
        let end = self.0.iter().take(MAX_NAME).position(|&b| b == b'\n');
        let end = end.ok_or_else(|| format!("its pickle has a name over {MAX_NAME} bytes"))?;
        let line = self.bytes(end)?;
        self.bytes(1)?;
        utf8(line)
    }

    /// Reads a little-endian two's complement number of up to 8 bytes.
    pub(super) fn long(&mut self) -> Step<i64> {
        let [length] = self.array()?;
        let bytes = self.bytes(length.into())?;
        if bytes.len() > 8 {
            return Err("its pickle has an integer over 64 bits".into());
        }
        let sign = bytes
            .last()
            .map_or(0, |b| if b & 0x80 == 0 { 0 } else { 0xff });
        let mut wide = [sign; 8];
        for (wide, byte) in wide.iter_mut().zip(bytes) {
            *wide = *byte;
        }
        Ok(i64::from_le_bytes(wide))
    }
}

pub(super) fn utf8(bytes: &[u8]) -> Step<&str> {
    str::from_utf8(bytes).map_err(|_| "its pickle has a name that is not UTF-8".into())
}
