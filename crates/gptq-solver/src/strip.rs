//! Strips of rows.

/// Rows that are taken together; fixed, so that results depend neither on the number of threads nor on which of the
/// strips are taken: a solve of some strips gives the rows of a solve of all.
pub const STRIP: usize = 64;
