//! A quantized checkpoint to export, and whether a format can hold it.

use std::path::{Path, PathBuf};

use gptq_format::{Checkpoint, FormatName, LinearShape, OutputFormat, QuantizeConfig, layout};
use gptq_plan::{Choice, dynamic};
use gptq_spec::{Census, ModelConfig, ModelTensor, Role};

use crate::ExportError;

/// A quantized checkpoint.
pub struct ExportSource {
    pub(crate) dir: PathBuf,
    pub(crate) config: ModelConfig,
    pub(crate) checkpoint: Checkpoint,
    /// Its settings.
    pub(crate) settings: QuantizeConfig,
    warnings: Vec<String>,
}

impl ExportSource {
    /// Opens the checkpoint in `dir` and compares its tensors with its config.
    ///
    /// # Errors
    /// A checkpoint that cannot be run, or is not quantized.
    pub fn open(dir: &Path) -> Result<ExportSource, ExportError> {
        let census = Census::take(dir)?;
        let warnings = census.warnings.clone();
        let (config, checkpoint) = census.sound()?;
        let settings = checkpoint.quantize_config().cloned();
        let settings = settings.ok_or_else(|| ExportError::Dense { dir: dir.into() })?;
        Ok(ExportSource {
            dir: dir.into(),
            config,
            checkpoint,
            settings,
            warnings,
        })
    }

    /// Returns notes on unexpected tensors and files, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the quantized linear layers in model order.
    pub(crate) fn linears(&self) -> Result<Vec<(ModelTensor, LinearShape)>, ExportError> {
        let mut linears = Vec::new();
        for tensor in self.config.tensors() {
            if let Some(linear) = self.linear(&tensor)? {
                linears.push((tensor, linear));
            }
        }
        Ok(linears)
    }

    /// Returns the shape of `tensor` if it is the weights of a quantized linear layer.
    pub(crate) fn linear(&self, tensor: &ModelTensor) -> Result<Option<LinearShape>, ExportError> {
        let (Role::Linear, &[out_features, in_features]) = (tensor.role, tensor.shape.as_slice())
        else {
            return Ok(None);
        };
        let settings = self.settings.module(tensor.module())?;
        Ok(settings.map(|(bits, group_size)| LinearShape {
            in_features,
            out_features,
            bits,
            group_size,
        }))
    }

    /// Returns the settings to declare in `format`.
    pub(crate) fn settings_in(&self, format: FormatName) -> Result<QuantizeConfig, ExportError> {
        let target = format.checkpoint_format(self.settings.sym);
        let own = Choice {
            bits: self.settings.bits,
            group_size: self.settings.group_size,
        };
        let linears = self.linears()?;
        let choice = |module: &str| {
            let (_, linear) = linears
                .iter()
                .find(|(tensor, _)| tensor.module() == module)?;
            Some(Choice {
                bits: linear.bits,
                group_size: linear.group_size,
            })
        };
        Ok(QuantizeConfig {
            quant_method: target.quant_method().to_owned(),
            checkpoint_format: target,
            dynamic: dynamic(&self.config, target, own, choice),
            modules_in_block_to_quantize: None,
            model_file_base_name: Some("model".to_owned()),
            // Formats that are exported to have columns in order.
            desc_act: self.settings.desc_act && target.is_autogptq(),
            ..self.settings.clone()
        })
    }

    /// Returns the layout of quantized linear layers in `format`.
    pub(crate) fn layout(&self, format: FormatName) -> Box<dyn OutputFormat> {
        layout(
            format.checkpoint_format(self.settings.sym),
            self.settings.sym,
        )
    }
}
