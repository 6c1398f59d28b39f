//! Where a safetensors file keeps its tensors.

use std::path::Path;

use safetensors::SafeTensors;

use crate::FormatError;
use crate::checkpoint::Place;

/// Every tensor of the mapped file `bytes`.
///
/// Errors when the header does not parse or disagrees with the file's length.
pub(crate) fn places(path: &Path, bytes: &[u8]) -> Result<Vec<(String, Place)>, FormatError> {
    let refuse = |reason: String| FormatError::Header {
        path: path.into(),
        reason,
    };
    let (header, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|e| refuse(e.to_string()))?;
    let data = header + 8;
    let expected = data + metadata.data_len();
    if bytes.len() != expected {
        return Err(refuse(format!(
            "{} bytes, its header promises {expected}",
            bytes.len()
        )));
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
    Ok(metadata.tensors().into_iter().map(place).collect())
}
