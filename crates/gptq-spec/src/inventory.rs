//! A tensor of a model; [`ModelConfig::tensors`](crate::ModelConfig::tensors) is the single list used for
//! reading, writing and verifying a checkpoint.

use safetensors::Dtype;

/// A tensor of the dense model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Shape, row-major; the weights of a linear layer are `[out, in]`.
    pub shape: Vec<usize>,
    /// Role of the tensor.
    pub role: Role,
}

/// Role of a tensor, as far as its treatment depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The input embedding, which may also be the output projection.
    Embedding,
    /// The output projection.
    Head,
    /// Weights of a linear layer that may be quantized.
    Linear,
    /// A norm's weights, a bias.
    Vector,
    /// Weights that stay in 16 bits: a router, the gate of a shared expert.
    Matrix,
    /// Numbers that stay in f32: the correction of a router's scores.
    Wide,
    /// A tensor of a part that is not run, with its dtype; a branch keeps it as it is.
    Carried(Dtype),
}

impl Role {
    /// Returns the dtype of such a tensor in files that have `half` where nothing else is asked for.
    pub fn dtype(self, half: Dtype) -> Dtype {
        match self {
            Role::Carried(dtype) => dtype,
            Role::Wide => Dtype::F32,
            _ => half,
        }
    }
}

impl ModelTensor {
    pub(crate) fn new(name: String, shape: &[usize], role: Role) -> Self {
        ModelTensor {
            name,
            shape: shape.into(),
            role,
        }
    }

    /// Returns the module that it belongs to.
    pub fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or("", |(module, _)| module)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ModelConfig;

    #[test]
    fn a_models_tensors_hold_all_of_its_parameters() {
        for (model_type, tied) in [("llama", false), ("llama", true), ("qwen2", false)] {
            let config = ModelConfig::from_json(json!({
                "model_type": model_type, "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 100, "tie_word_embeddings": tied,
            }))
            .unwrap();
            let all = config.tensors();
            let sizes = all.iter().map(|it| it.shape.iter().product::<usize>());
            assert_eq!(sizes.sum::<usize>(), config.parameters(), "{model_type}");
            let biases = all.iter().filter(|it| it.name.ends_with(".bias")).count();
            assert_eq!(biases, if model_type == "qwen2" { 9 } else { 0 });
            assert_eq!(all.last().unwrap().role == Role::Head, !tied);
        }
    }
}
