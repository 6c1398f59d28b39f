//! Validates a struct in the compact protocol of Thrift
//! (<https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>), in which
//! Parquet writes its footer and its page headers, before the library reads it: the library trusts
//! the counts, and would skip 2³¹ missing list values one by one.
//!
//! Every element of a list takes at least a byte, so the time is bounded by the input. Types that
//! Parquet does not use here are refused: maps, and lists of booleans, whose elements the library
//! skips without reading a byte.

use std::io::{self, Read};

/// Maximum nesting depth, as in the library.
const DEEPEST: usize = 64;

/// Content of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Integer(i64),
    Struct,
    Other,
}

/// Called for every field, with the ids that lead to it, outermost first, and its content.
pub(crate) type EachField<'a> = dyn FnMut(&[i16], Field) -> Result<(), String> + 'a;

/// Reads one struct to its end.
pub(crate) fn look_through(input: impl Read, each: &mut EachField<'_>) -> io::Result<()> {
    let path = Vec::new();
    StructCheck { input, path, each }.structure(0)
}

struct StructCheck<'a, 'b, R> {
    input: R,
    path: Vec<i16>,
    each: &'a mut EachField<'b>,
}

impl<R: Read> StructCheck<'_, '_, R> {
    fn structure(&mut self, depth: usize) -> io::Result<()> {
        let mut id = 0_i16;
        loop {
            let head = self.byte()?;
            let kind = head & 0xf;
            if kind == 0 {
                return Ok(());
            }
            let next = match head >> 4 {
                0 => i16::try_from(self.integer()?).ok(),
                step => id.checked_add(i16::from(step)),
            };
            id = next.ok_or_else(|| malformed("a field's number is out of range"))?;
            self.path.push(id);
            let field = match kind {
                4..=6 => Field::Integer(self.integer()?),
                12 => Field::Struct,
                _ => Field::Other,
            };
            (self.each)(&self.path, field).map_err(malformed)?;
            // The field type already holds the value of a boolean.
            if !matches!(kind, 1 | 2 | 4..=6) {
                self.skip(kind, depth)?;
            }
            self.path.pop();
        }
    }

    /// Skips a value that has bytes of its own.
    fn skip(&mut self, kind: u8, depth: usize) -> io::Result<()> {
        if depth == DEEPEST {
            return Err(malformed("nested too deep"));
        }
        match kind {
            3 => self.byte().map(drop),
            4..=6 => self.integer().map(drop),
            7 => self.skip_bytes(8),
            8 => {
                let length = self.unsigned()?;
                self.skip_bytes(length)
            }
            9 | 10 => {
                let head = self.byte()?;
                let count = match head >> 4 {
                    15 => self.unsigned()?,
                    count => u64::from(count),
                };
                (0..count).try_for_each(|_| self.skip(head & 0xf, depth + 1))
            }
            12 => self.structure(depth + 1),
            _ => Err(malformed(format!("a value of type {kind}"))),
        }
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.input.read_exact(&mut byte)?;
        let [byte] = byte;
        Ok(byte)
    }

    fn unsigned(&mut self) -> io::Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number of more than ten bytes"))
    }

    /// Reads a zigzag integer.
    fn integer(&mut self) -> io::Result<i64> {
        let value = self.unsigned()?;
        Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    fn skip_bytes(&mut self, length: u64) -> io::Result<()> {
        let skipped = io::copy(&mut self.input.by_ref().take(length), &mut io::sink())?;
        match skipped == length {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn malformed(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(bytes: &[u8]) -> io::Result<Vec<(Vec<i16>, Field)>> {
        let mut found = Vec::new();
        look_through(bytes, &mut |path, field| {
            found.push((path.to_vec(), field));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn fields_are_told_with_the_path_to_them() {
        // 1: -2 (i32), 5: {1: 300 (i32), 3: "ab"}, 7: true, 8: [{1: 1 (i64)}, {}].
        let bytes = b"\x15\x03\x4c\x15\xd8\x04\x28\x02ab\x00\x21\x19\x2c\x16\x02\x00\x00\x00";
        let expected = vec![
            (vec![1], Field::Integer(-2)),
            (vec![5], Field::Struct),
            (vec![5, 1], Field::Integer(300)),
            (vec![5, 3], Field::Other),
            (vec![7], Field::Other),
            (vec![8], Field::Other),
            (vec![8, 1], Field::Integer(1)),
        ];
        assert_eq!(fields(bytes).unwrap(), expected);
    }

    #[test]
    fn a_list_that_is_not_there_is_an_error_at_once() {
        for kind in 0..=15 {
            // 1: a list of 2^31 - 1 elements, and nothing after it.
            let list = [0x19, 0xf0 | kind, 0xff, 0xff, 0xff, 0xff, 0x07];
            assert!(fields(&list).is_err(), "{kind}");
        }
        // Lists of booleans, which the library skips without reading, even if they are present.
        let booleans = [0x19, 0x21, 1, 1, 0];
        assert!(fields(&booleans).is_err());
        let nested = [[0x19].repeat(DEEPEST + 1), vec![0; DEEPEST + 2]].concat();
        assert_eq!(fields(&nested).unwrap_err().to_string(), "nested too deep");
    }
}
