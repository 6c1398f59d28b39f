//! Names of a block's intermediate tensors.

/// A tensor `[tokens, features]` while a block runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Register(pub(crate) usize);

impl Register {
    /// The residual stream.
    pub const RESIDUAL: Register = Register(0);
}
