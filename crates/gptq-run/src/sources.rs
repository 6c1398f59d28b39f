//! Digests of the model's tensors that finished blocks were made from.
//!
//! An interrupted run can be resumed even if model files were written again, for example to repair
//! a later block, as long as the tensors of its finished blocks are the same.

use gptq_format::{Checkpoint, FormatError, sha256};
use gptq_spec::{ModelConfig, ModelTensor, Role};
use rayon::prelude::*;

/// Returns the SHA-256 over the tensors of block `layer`.
pub(crate) fn block(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    layer: usize,
) -> Result<String, FormatError> {
    digest(checkpoint, &config.block_tensors(layer))
}

/// Returns the SHA-256 over the weights before the first block.
pub(crate) fn embedding(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
) -> Result<String, FormatError> {
    let mut tensors = config.tensors();
    tensors.retain(|tensor| tensor.role == Role::Embedding);
    let found = digest(checkpoint, &tensors);
    tensors.iter().for_each(|it| checkpoint.give_back(&it.name));
    found
}

/// Hashes names, dtypes, shapes and elements; tensors are read in parallel.
fn digest(checkpoint: &Checkpoint, tensors: &[ModelTensor]) -> Result<String, FormatError> {
    let one = |tensor: &ModelTensor| {
        let view = checkpoint.view(&tensor.name)?;
        let (dtype, shape) = (view.dtype, view.shape);
        let bytes = sha256(&view.bytes());
        Ok(format!("{} {dtype:?} {shape:?} {bytes}\n", tensor.name))
    };
    let all: Result<Vec<String>, FormatError> = tensors.par_iter().map(one).collect();
    Ok(sha256(all?.concat().as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_block_is_known_by_its_own_tensors_alone() {
        let dir = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/models/medi-tiny"
        ));
        let config = ModelConfig::read(&dir.join("config.json")).unwrap();
        let copy = tempfile::tempdir().unwrap();
        let path = copy.path().join("model.safetensors");
        let mut bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let of = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let checkpoint = Checkpoint::open(copy.path()).unwrap();
            let mut all: Vec<String> = (0..config.layers)
                .map(|layer| block(&checkpoint, &config, layer).unwrap())
                .collect();
            all.push(embedding(&checkpoint, &config).unwrap());
            all
        };
        let before = of(&bytes);
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
        let end = json["model.layers.1.mlp.up_proj.weight"]["data_offsets"][1].as_u64();
        bytes[header + end.unwrap() as usize - 1] ^= 1;
        let after = of(&bytes);
        let changed: Vec<bool> = before.iter().zip(&after).map(|(a, b)| a != b).collect();
        assert_eq!(changed, [false, true, false, false]);
    }
}
