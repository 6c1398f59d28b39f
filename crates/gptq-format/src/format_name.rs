//! Output formats as recipes and the command line name them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::CheckpointFormat;

/// Format of a branch's files, as a user asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "&'static str")]
pub enum FormatName {
    /// AutoGPTQ's layout.
    #[default]
    Gptq,
    /// `pack-quantized` of compressed-tensors.
    CompressedTensors,
    /// MLX's affine quantization.
    Mlx,
    /// A GGUF file for llama.cpp, beside the tensors in AutoGPTQ's layout that it was made from.
    Gguf,
}

impl FormatName {
    /// Every format that can be asked for.
    pub const ALL: [FormatName; 4] = [
        FormatName::Gptq,
        FormatName::CompressedTensors,
        FormatName::Mlx,
        FormatName::Gguf,
    ];

    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            FormatName::Gptq => "gptq",
            FormatName::CompressedTensors => "compressed-tensors",
            FormatName::Mlx => "mlx",
            FormatName::Gguf => "gguf",
        }
    }

    /// Returns the layout of the safetensors files of this format: version 1 of AutoGPTQ's cannot hold a zero point of 0, which
    /// asymmetric codes may have.
    pub fn checkpoint_format(self, sym: bool) -> CheckpointFormat {
        match (self, sym) {
            (FormatName::Gptq | FormatName::Gguf, true) => CheckpointFormat::Gptq,
            (FormatName::Gptq | FormatName::Gguf, false) => CheckpointFormat::GptqV2,
            (FormatName::CompressedTensors, _) => CheckpointFormat::CompressedTensors,
            (FormatName::Mlx, _) => CheckpointFormat::Mlx,
        }
    }
}

impl fmt::Display for FormatName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for FormatName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = FormatName::ALL.into_iter().find(|it| it.name() == name);
        known.ok_or_else(|| {
            let names = FormatName::ALL.map(FormatName::name);
            format!("format {name:?} is not one of {}", names.join(", "))
        })
    }
}

impl TryFrom<String> for FormatName {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<FormatName> for &'static str {
    fn from(name: FormatName) -> &'static str {
        name.name()
    }
}
