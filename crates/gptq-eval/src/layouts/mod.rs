//! One file for each layout.

pub(crate) mod medmcqa;
pub(crate) mod medqa;
pub(crate) mod mmlu;
pub(crate) mod plain;
pub(crate) mod pubmedqa;
pub(crate) mod rows;
