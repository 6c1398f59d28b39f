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
}

impl FormatName {
    /// Every format that can be asked for.
    pub const ALL: [FormatName; 3] = [
        FormatName::Gptq,
        FormatName::CompressedTensors,
        FormatName::Mlx,
    ];

    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            FormatName::Gptq => "gptq",
            FormatName::CompressedTensors => "compressed-tensors",
            FormatName::Mlx => "mlx",
        }
    }

    /// Returns the layout that files of this format have: version 1 of AutoGPTQ's cannot hold a zero point of 0, which
    /// asymmetric codes may have.
    pub fn checkpoint_format(self, sym: bool) -> CheckpointFormat {
        match (self, sym) {
            (FormatName::Gptq, true) => CheckpointFormat::Gptq,
            (FormatName::Gptq, false) => CheckpointFormat::GptqV2,
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
            if name == "gguf" {
                return "format \"gguf\" is written from finished branches only; leave it out, then run \
                        gptq export --to gguf"
                    .to_owned();
            }
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
