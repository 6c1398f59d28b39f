//! A checkpoint of a known model's shape with random weights, to measure on: deterministic, sharded,
//! written as fast as the disk takes it.
//!
//! Weights are normal with deviation 0.02, norms are 1. Each tensor has a seed of its own, from its
//! name, so that tensors can be made at the same time and in any order.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, bail};
use gptq_format::{ShardedWriter, TensorSpec, le_bytes, write_json};
use gptq_spec::{ModelConfig, ModelTensor};
use half::f16;
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::json;

/// Bytes per file, as the Hub's checkpoints of this size have them.
const SHARD: u64 = 5_000_000_000;
/// Elements made by one task.
const RUN: usize = 1 << 20;
/// Tensors made before they are written: what bounds the memory.
const BATCH: usize = 8;
const DEVIATION: f32 = 0.02;

/// Shapes to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Llama-2-7B: 6.7 billion parameters.
    Llama2Seven,
    /// Two blocks of 128 features, for tests.
    Tiny,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "llama2-7b" => Ok(Shape::Llama2Seven),
            "tiny" => Ok(Shape::Tiny),
            _ => Err(format!(
                "{text:?} is no shape; valid are llama2-7b and tiny"
            )),
        }
    }
}

/// Hidden width, feed-forward width, heads, blocks and vocabulary.
struct Sizes {
    hidden: usize,
    wide: usize,
    heads: usize,
    layers: usize,
    vocabulary: usize,
}

impl Shape {
    fn sizes(self) -> Sizes {
        match self {
            Shape::Llama2Seven => Sizes {
                hidden: 4096,
                wide: 11_008,
                heads: 32,
                layers: 32,
                vocabulary: 32_000,
            },
            Shape::Tiny => Sizes {
                hidden: 128,
                wide: 256,
                heads: 2,
                layers: 2,
                vocabulary: 32_000,
            },
        }
    }
}

/// Writes the checkpoint, its config and, from `tokenizer`, the tokenizer's files into `dir`.
/// `layers` shortens the model.
pub(crate) fn run(
    dir: &Path,
    shape: Shape,
    layers: Option<usize>,
    tokenizer: Option<&Path>,
) -> anyhow::Result<()> {
    if dir.join("config.json").exists() {
        bail!("{} already holds a model", dir.display());
    }
    let mut sizes = shape.sizes();
    sizes.layers = layers.unwrap_or(sizes.layers);
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    if let Some(tokenizer) = tokenizer {
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            let from = tokenizer.join(file);
            std::fs::copy(&from, dir.join(file)).with_context(|| from.display().to_string())?;
        }
    }
    let specs = tensors(&sizes)?;
    let mut writer = ShardedWriter::create(dir, &specs, Some(SHARD))?;
    for batch in specs.chunks(BATCH) {
        let made: Vec<Vec<f16>> = batch.par_iter().map(values).collect();
        for (spec, values) in batch.iter().zip(made) {
            writer.write(&spec.name, le_bytes(&values))?;
        }
        // So that little is left to wait for at the end.
        writer.sync()?;
    }
    let bytes = writer.finish()?;
    // Last: a directory without it holds no model yet.
    write_json(&dir.join("config.json"), &config(&sizes))?;
    println!("{}: {:.2} GB", dir.display(), bytes as f64 / 1e9);
    Ok(())
}

fn config(sizes: &Sizes) -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.wide,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    })
}

fn tensors(sizes: &Sizes) -> anyhow::Result<Vec<TensorSpec>> {
    let config = ModelConfig::from_json(config(sizes)).map_err(|why| anyhow::anyhow!(why))?;
    let spec = |tensor: ModelTensor| TensorSpec {
        name: tensor.name,
        dtype: Dtype::F16,
        shape: tensor.shape,
    };
    Ok(config.tensors().into_iter().map(spec).collect())
}

/// A tensor's values, the same on every machine and number of threads.
fn values(spec: &TensorSpec) -> Vec<f16> {
    let count = spec.shape.iter().product();
    if spec.shape.len() == 1 {
        return vec![f16::ONE; count];
    }
    // FNV-1a of the name.
    let seed = spec
        .name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let mut values = vec![f16::ZERO; count];
    values
        .par_chunks_mut(RUN)
        .enumerate()
        .for_each(|(run, values)| {
            let first = (run * RUN) as u64;
            for (value, at) in values.iter_mut().zip(first..) {
                *value = f16::from_f32(DEVIATION * normal(mix(seed.wrapping_add(at))));
            }
        });
    values
}

/// The output function of SplitMix64.
fn mix(at: u64) -> u64 {
    let mut z = at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Nearly standard normal from uniform bits: four 16-bit numbers, summed and scaled to deviation 1
/// (Irwin-Hall). Cheap, and its tails end at 3.5 deviations, so that nothing is an outlier.
fn normal(bits: u64) -> f32 {
    let sum: u32 = (0..4).map(|i| (bits >> (16 * i)) as u32 & 0xffff).sum();
    // Each has variance 2^32 / 12 about 2^15.
    (sum as f32 - 131_070.0) * (3.0_f32.sqrt() / 65_536.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synthetic_checkpoint_opens_and_is_the_same_every_time() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let dir = dir.path().join(name);
            run(&dir, Shape::Tiny, Some(1), None).unwrap();
            std::fs::read(dir.join("model.safetensors")).unwrap()
        };
        assert!(write("a") == write("b"));
        let config = ModelConfig::read(&dir.path().join("a/config.json")).unwrap();
        assert_eq!((config.layers, config.hidden_size), (1, 128));
        assert!(run(&dir.path().join("a"), Shape::Tiny, None, None).is_err());
    }

    #[test]
    fn synthetic_weights_have_the_deviation_asked_for() {
        let specs = tensors(&Shape::Tiny.sizes()).unwrap();
        let is_q = |it: &&TensorSpec| it.name.ends_with("0.self_attn.q_proj.weight");
        let spec = specs.iter().find(is_q).unwrap();
        let values = values(spec);
        let square: f64 = values.iter().map(|v| v.to_f64().powi(2)).sum();
        let deviation = (square / values.len() as f64).sqrt();
        // 16384 values: the deviation's own deviation is 1 / sqrt(2 n), 0.6 %.
        assert!((deviation / 0.02 - 1.0).abs() < 0.03, "{deviation}");
    }
}
