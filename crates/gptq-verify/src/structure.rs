//! Every tensor's name, dtype, shape and plain sense, against the configs beside it.

use std::collections::BTreeSet;
use std::path::Path;

use gptq_format::{Checkpoint, QuantizeConfig, read_json};
use gptq_model::{ModelConfig, Projection};
use serde_json::Value;

use crate::VerifyError;

/// What a directory turned out to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Structure {
    /// Tensors, all of them accounted for.
    pub tensors: usize,
    /// Linears stored as GPTQ codes.
    pub quantised_linears: usize,
}

/// Checks the checkpoint in `dir`. Errors at the first tensor that is missing, unexpected, of a
/// wrong shape or dtype, or holds what no reader can use.
pub(crate) fn check(
    dir: &Path,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
) -> Result<Structure, VerifyError> {
    configs_agree(dir)?;
    let mut expected = BTreeSet::new();
    let mut dense = |name: String, shape: &[usize]| {
        checkpoint.f16(&name, shape)?;
        expected.insert(name);
        Ok::<_, VerifyError>(())
    };
    let hidden = config.hidden_size;
    dense(
        "model.embed_tokens.weight".into(),
        &[config.vocabulary, hidden],
    )?;
    dense("model.norm.weight".into(), &[hidden])?;
    if !config.tied_embeddings {
        dense("lm_head.weight".into(), &[config.vocabulary, hidden])?;
    }
    let mut packed_modules = Vec::new();
    for layer in 0..config.layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            dense(format!("model.layers.{layer}.{norm}.weight"), &[hidden])?;
        }
        for projection in Projection::ALL {
            let module = projection.module(layer);
            let (n_in, n_out) = projection.shape(config);
            match checkpoint.packed(&module, n_in, n_out)? {
                Some(packed) => {
                    let bad = packed.scales.iter().position(|s| s.to_f32() <= 0.0);
                    if let Some(at) = bad {
                        return Err(VerifyError::Scale {
                            module,
                            group: at / n_out,
                            output: at % n_out,
                            value: packed.scales[at].to_f32(),
                        });
                    }
                    packed_modules.push(module.clone());
                }
                None => dense(format!("{module}.weight"), &[n_out, n_in])?,
            }
            // Some tools write zero biases for models that have none.
            let bias = format!("{module}.bias");
            if projection.has_bias(config) || checkpoint.contains(&bias) {
                dense(bias, &[n_out])?;
            }
        }
    }
    for module in &packed_modules {
        for suffix in ["qweight", "qzeros", "scales", "g_idx"] {
            expected.insert(format!("{module}.{suffix}"));
        }
    }
    // Old checkpoints store the rotary frequencies, which follow from the config.
    let derived = |name: &str| name.ends_with("rotary_emb.inv_freq");
    if let Some(name) = checkpoint
        .names()
        .find(|name| !expected.contains(*name) && !derived(name))
    {
        return Err(VerifyError::UnexpectedTensor {
            dir: dir.into(),
            name: name.into(),
        });
    }
    Ok(Structure {
        tensors: checkpoint.names().count(),
        quantised_linears: packed_modules.len(),
    })
}

/// Where both places hold settings, they must be the same settings.
fn configs_agree(dir: &Path) -> Result<(), VerifyError> {
    let own = dir.join("quantize_config.json");
    let config: Value = read_json(&dir.join("config.json"))?;
    let Some(inside) = config.get("quantization_config").filter(|_| own.exists()) else {
        return Ok(());
    };
    let own: QuantizeConfig = read_json(&own)?;
    // Tools add keys of their own to one or the other: only what a reader acts on is compared.
    match serde_json::from_value::<QuantizeConfig>(inside.clone()) {
        Ok(inside)
            if (inside.bits, inside.group_size, inside.sym, inside.desc_act)
                == (own.bits, own.group_size, own.sym, own.desc_act)
                && inside.checkpoint_format == own.checkpoint_format
                && inside.dynamic == own.dynamic =>
        {
            Ok(())
        }
        _ => Err(VerifyError::ConfigsDisagree { dir: dir.into() }),
    }
}
