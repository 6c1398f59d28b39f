//! The quantized linear layers of a checkpoint.
//!
//! In AutoGPTQ's layout a linear layer with a `qweight` is quantized, its bits are `32 * columns of qzeros / out`, its
//! groups the rows of `scales`, whatever the configs say. Other formats need their settings for that.

use serde::Serialize;

use crate::{
    Bits, Checkpoint, CheckpointFormat, FormatError, GroupSize, LinearShape, QuantizeConfig,
    layout, unpack_across,
};

/// One quantized linear layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct LinearInfo {
    pub name: String,
    pub in_features: usize,
    pub out_features: usize,
    pub bits: Bits,
    pub group_size: GroupSize,
    pub act_order: bool,
    pub g_idx: bool,
    pub sym: bool,
}

impl LinearInfo {
    /// Returns its shape and settings.
    pub(super) fn shape(&self) -> LinearShape {
        LinearShape {
            in_features: self.in_features,
            out_features: self.out_features,
            bits: self.bits,
            group_size: self.group_size,
        }
    }
}

/// Describes the quantized linear layers.
pub(super) fn quantized_linears(checkpoint: &Checkpoint) -> Result<Vec<LinearInfo>, FormatError> {
    let others = checkpoint.quantize_config();
    if let Some(config) = others.filter(|it| !it.checkpoint_format.is_autogptq()) {
        return configured(checkpoint, config);
    }
    let modules = checkpoint
        .names()
        .filter_map(|name| name.strip_suffix(".qweight"));
    modules.map(|module| linear(checkpoint, module)).collect()
}

fn linear(checkpoint: &Checkpoint, module: &str) -> Result<LinearInfo, FormatError> {
    let shape = |suffix: &str| {
        let name = format!("{module}.{suffix}");
        let view = checkpoint.view(&name)?;
        <[usize; 2]>::try_from(view.shape).map_err(|_| FormatError::Shape {
            name: name.clone(),
            found: view.shape.into(),
            expected: vec![0, 0],
        })
    };
    let ([rows, out], [groups, zero_words]) = (shape("qweight")?, shape("qzeros")?);
    let scales = shape("scales")?;
    let refuse = || FormatError::PackedShapes {
        module: module.into(),
        qweight: [rows, out],
        qzeros: [groups, zero_words],
        scales,
    };
    let words = |n: usize| n.checked_mul(32).ok_or_else(refuse);
    let width = words(zero_words)?.checked_div(out).ok_or_else(refuse)?;
    let bits = Bits::ALL
        .into_iter()
        .find(|b| b.get() == width)
        .ok_or_else(refuse)?;
    let n_in = words(rows)? / width;
    if scales != [groups, out] || groups == 0 || groups > n_in || out * width != zero_words * 32 {
        return Err(refuse());
    }
    let configured = match checkpoint.quantize_config() {
        Some(config) => config.module(module)?.map(|(_, size)| size),
        None => None,
    };
    let group_size = match configured.filter(|size| size.groups(n_in) == groups) {
        Some(size) => size,
        None if groups == 1 => GroupSize::Row,
        None => GroupSize::Columns(n_in.div_ceil(groups)),
    };
    let columns = group_size.columns(n_in);
    let g_idx = format!("{module}.g_idx");
    let stored = checkpoint.contains(&g_idx);
    let act_order = stored && {
        let order = checkpoint.i32(&g_idx, &[n_in])?;
        let mut rows = order.iter().enumerate();
        rows.any(|(i, &g)| usize::try_from(g) != Ok(i / columns))
    };
    Ok(LinearInfo {
        name: module.into(),
        in_features: n_in,
        out_features: out,
        bits,
        group_size,
        act_order,
        g_idx: stored,
        sym: stored_zero(checkpoint, module, groups, out, bits)?.is_some_and(|zero| {
            let middle = bits.symmetric_zero();
            zero == middle || zero == middle - 1
        }),
    })
}

/// Returns the zero point if all stored ones are equal, otherwise `None`.
fn stored_zero(
    checkpoint: &Checkpoint,
    module: &str,
    groups: usize,
    out: usize,
    bits: Bits,
) -> Result<Option<u8>, FormatError> {
    let shape = [groups, out * bits.get() / 32];
    let words = checkpoint.i32(&format!("{module}.qzeros"), &shape)?;
    let words: Vec<u32> = words.into_iter().map(|w| w as u32).collect();
    let zeros = unpack_across(&words, groups, out, bits);
    Ok(zeros
        .first()
        .copied()
        .filter(|z| zeros.iter().all(|x| x == z)))
}

/// Describes linear layers of a format whose tensors do not show their settings.
fn configured(
    checkpoint: &Checkpoint,
    config: &QuantizeConfig,
) -> Result<Vec<LinearInfo>, FormatError> {
    let format = layout(config.checkpoint_format, config.sym);
    let end = format!(".{}", format.marker());
    let mut linears = Vec::new();
    for module in checkpoint
        .names()
        .filter_map(|name| name.strip_suffix(&end))
    {
        let Some((bits, group_size)) = config.module(module)? else {
            return Err(FormatError::Undeclared {
                module: module.into(),
            });
        };
        let [in_features, out_features] = format.features(checkpoint, module, bits)?;
        linears.push(LinearInfo {
            name: module.into(),
            in_features,
            out_features,
            bits,
            group_size,
            act_order: false,
            g_idx: false,
            sym: config.sym,
        });
    }
    Ok(linears)
}

/// Returns the format in the config, or else the one that symmetric zero points indicate: version 1
/// stores one less.
pub(super) fn stored_format(
    checkpoint: &Checkpoint,
    linears: &[LinearInfo],
) -> Result<CheckpointFormat, FormatError> {
    if let Some(config) = checkpoint.quantize_config() {
        return Ok(config.checkpoint_format);
    }
    for l in linears {
        let groups = l.group_size.groups(l.in_features);
        let zero = stored_zero(checkpoint, &l.name, groups, l.out_features, l.bits)?;
        if zero == Some(l.bits.symmetric_zero()) {
            return Ok(CheckpointFormat::GptqV2);
        }
    }
    Ok(CheckpointFormat::Gptq)
}
