//! A quick hash that distinguishes checkpoints.

use sha2::{Digest, Sha256};

use crate::digests::hexadecimal;
use crate::{Checkpoint, FormatError};

/// Bytes hashed per tensor: a page from its middle.
const SAMPLE: usize = 4096;

/// Computes the SHA-256 of every tensor's name, dtype, shape and 4 KiB from its middle, in
/// hexadecimal. Reads some hundred pages of a checkpoint of any size. Two checkpoints that
/// differ only in a few values may have the same hash.
pub fn sample_digest(checkpoint: &Checkpoint) -> Result<String, FormatError> {
    let mut hash = Sha256::new();
    for name in checkpoint.names() {
        let view = checkpoint.view(name)?;
        hash.update(format!("{name} {:?} {:?}\n", view.dtype, view.shape));
        let middle = view.storage.len().saturating_sub(SAMPLE) / 2;
        let sample = view.storage.iter().skip(middle).take(SAMPLE);
        hash.update(sample.copied().collect::<Vec<u8>>());
        // Includes what the kernel maps around a page: small tensors completely.
        checkpoint.give_back(name);
    }
    Ok(hexadecimal(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView as View;

    use super::*;

    #[test]
    fn names_shapes_and_values_count() {
        let digest = |name: &str, shape: Vec<usize>, value: u8| {
            let dir = tempfile::tempdir().unwrap();
            let bytes = vec![value; 1 << 16];
            let view = View::new(Dtype::F16, shape, &bytes).unwrap();
            let file = safetensors::serialize([(name, view)], None).unwrap();
            std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
            sample_digest(&Checkpoint::open(dir.path()).unwrap()).unwrap()
        };
        let all = [
            digest("a", vec![256, 128], 1),
            digest("b", vec![256, 128], 1),
            digest("a", vec![128, 256], 1),
            digest("a", vec![256, 128], 2),
        ];
        assert_eq!(all[0], digest("a", vec![256, 128], 1));
        for (i, one) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|other| other != one));
        }
    }
}
