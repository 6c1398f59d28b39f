//! Location of a tensor in a file.

use std::ops::Range;

use safetensors::Dtype;

/// Location of a tensor in a file; checked against the file's length.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Place {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Stride of each dimension in elements; `None` for row-major without gaps.
    pub(crate) strides: Option<Vec<usize>>,
    /// Byte range from the first element to the end of the last.
    pub(crate) bytes: Range<usize>,
}
