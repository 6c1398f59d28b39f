//! Versions of AutoGPTQ's layout.

use serde::{Deserialize, Serialize};

/// Storage of zero points.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckpointFormat {
    /// Version 1: `zero - 1`.
    #[default]
    #[serde(rename = "gptq")]
    Gptq,
    /// Version 2: the zero itself.
    #[serde(rename = "gptq_v2")]
    GptqV2,
}

impl CheckpointFormat {
    /// Returns the number subtracted from a zero point before it is stored.
    pub(crate) fn zero_offset(self) -> u8 {
        match self {
            CheckpointFormat::Gptq => 1,
            CheckpointFormat::GptqV2 => 0,
        }
    }
}
