//! Locations of tensors in a safetensors file: 8 bytes with the header's length, a JSON header, the
//! elements.
//!
//! Limits: [`MAX_HEADER`] bytes of header, [`MAX_TENSORS`], [`MAX_DIMENSIONS`], [`MAX_NAME`] bytes in a
//! name. Tensors that overlap, leave gaps or end outside the file are refused by the `safetensors`
//! crate.

use std::path::Path;

use safetensors::SafeTensors;

use crate::FormatError;
use crate::place::Place;

/// Maximum size of a header; that of a 70B model in one file has under 200 kB.
const MAX_HEADER: u64 = 32 << 20;
const MAX_TENSORS: usize = 1 << 18;
const MAX_DIMENSIONS: usize = 8;
const MAX_NAME: usize = 512;

/// Returns every tensor of the mapped file `bytes`.
///
/// Errors if the header does not parse, is over a limit, or disagrees with the file's length.
pub(crate) fn places(path: &Path, bytes: &[u8]) -> Result<Vec<(String, Place)>, FormatError> {
    let refuse = |reason: String| FormatError::Header {
        path: path.into(),
        reason,
    };
    if let Some((&length, _)) = bytes.split_first_chunk()
        && u64::from_le_bytes(length) > MAX_HEADER
    {
        let length = u64::from_le_bytes(length);
        return Err(refuse(format!(
            "a header of {length} bytes, over {MAX_HEADER}"
        )));
    }
    let (header, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|e| refuse(e.to_string()))?;
    // The `safetensors` crate has checked that both are in the file.
    let data = header + 8;
    let expected = data + metadata.data_len();
    if bytes.len() != expected {
        return Err(refuse(format!(
            "{} bytes, but its header declares {expected}",
            bytes.len()
        )));
    }
    let tensors = metadata.tensors();
    if tensors.len() > MAX_TENSORS {
        return Err(refuse(format!(
            "{} tensors, over {MAX_TENSORS}",
            tensors.len()
        )));
    }
    for (name, info) in &tensors {
        if name.len() > MAX_NAME || name.contains(char::is_control) {
            let name: String = name.chars().take(40).collect();
            return Err(refuse(format!(
                "the name {name:?}...; names are plain text of up to {MAX_NAME} bytes"
            )));
        }
        if info.shape.len() > MAX_DIMENSIONS {
            return Err(refuse(format!(
                "{name} has {} dimensions, over {MAX_DIMENSIONS}",
                info.shape.len()
            )));
        }
    }
    let place = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let place = Place {
            dtype: info.dtype,
            shape: info.shape.clone(),
            strides: None,
            bytes: data + info.data_offsets.0..data + info.data_offsets.1,
        };
        (name, place)
    };
    Ok(tensors.into_iter().map(place).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a file with this header and `data` zeros.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let length = (header.len() as u64).to_le_bytes();
        [&length, header.as_bytes(), &vec![0; data]].concat()
    }

    fn refusal(bytes: &[u8]) -> String {
        places(Path::new("a.safetensors"), bytes)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn headers_over_a_limit_are_refused_by_the_limit() {
        let tensor = |name: &str, shape: &str| {
            format!(r#"{{"{name}":{{"dtype":"U8","shape":{shape},"data_offsets":[0,1]}}}}"#)
        };
        let places = places(
            Path::new("a"),
            &file(&tensor(&"x".repeat(MAX_NAME), "[1,1,1,1,1,1,1,1]"), 1),
        );
        assert_eq!(places.unwrap().len(), 1, "at the limits");
        let long = refusal(&file(&tensor(&"x".repeat(MAX_NAME + 1), "[1]"), 1));
        assert!(long.contains("up to 512 bytes"), "{long}");
        let deep = refusal(&file(&tensor("x", "[1,1,1,1,1,1,1,1,1]"), 1));
        assert!(deep.contains("9 dimensions"), "{deep}");
        let escape = refusal(&file(&tensor("\\u001b[2J", "[1]"), 1));
        assert!(escape.contains("plain text"), "{escape}");
        let huge = refusal(&[&(MAX_HEADER + 1).to_le_bytes()[..], b"{}"].concat());
        assert!(huge.contains("33554433 bytes"), "{huge}");
        let many: Vec<String> = (0..=MAX_TENSORS)
            .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
            .collect();
        let many = refusal(&file(&format!("{{{}}}", many.join(",")), 0));
        assert!(many.contains("262145 tensors"), "{many}");
    }

    #[test]
    fn sizes_that_overflow_or_lie_are_refused() {
        for (shape, offsets) in [
            ("[4294967296,4294967296]", "[0,1]"),
            ("[18446744073709551615,2]", "[0,1]"),
            ("[2]", "[0,1]"),
            ("[1]", "[1,2]"),
            ("[1]", "[1,0]"),
            ("[1]", "[0,18446744073709551615]"),
        ] {
            let header =
                format!(r#"{{"x":{{"dtype":"U8","shape":{shape},"data_offsets":{offsets}}}}}"#);
            refusal(&file(&header, 1));
        }
        for length in [0, 7, 1 << 20, u64::MAX] {
            refusal(&[&length.to_le_bytes()[..], b"{}"].concat());
        }
    }
}
