//! The format that a branch's files declare, by name.

use serde::{Deserialize, Serialize};

/// Layout of the quantized linear layers in a branch's files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckpointFormat {
    /// Version 1 of AutoGPTQ's layout, which stores `zero - 1`.
    #[default]
    #[serde(rename = "gptq")]
    Gptq,
    /// Version 2 of it, which stores the zero point itself.
    #[serde(rename = "gptq_v2")]
    GptqV2,
    /// `pack-quantized` of compressed-tensors.
    #[serde(rename = "compressed-tensors")]
    CompressedTensors,
    /// MLX's affine quantization.
    #[serde(rename = "mlx")]
    Mlx,
}

impl CheckpointFormat {
    /// Returns true for AutoGPTQ's layout, whose settings are those of `quantize_config.json`.
    pub fn is_autogptq(self) -> bool {
        matches!(self, CheckpointFormat::Gptq | CheckpointFormat::GptqV2)
    }

    /// Returns the method that settings declare.
    pub fn quant_method(self) -> &'static str {
        match self {
            CheckpointFormat::Gptq | CheckpointFormat::GptqV2 => "gptq",
            CheckpointFormat::CompressedTensors => "compressed-tensors",
            CheckpointFormat::Mlx => "mlx",
        }
    }

    /// Returns the name in settings and tables.
    pub fn name(self) -> &'static str {
        match self {
            CheckpointFormat::Gptq => "gptq",
            CheckpointFormat::GptqV2 => "gptq_v2",
            CheckpointFormat::CompressedTensors => "compressed-tensors",
            CheckpointFormat::Mlx => "mlx",
        }
    }
}
