//! The base model's `config.json` as written into a branch: readable in both of Transformers'
//! spellings, without private parts and keys that clients would interpret differently.

use gptq_format::{Half, make_public};
use gptq_spec::spell_out_rotary;
use serde_json::{Map, Value};

/// Returns `config` for a branch in `half`, without `quantization_config`, and notes on what was
/// changed.
///
/// # Errors
/// Unsupported rotary settings, which [`ModelConfig`](gptq_spec::ModelConfig) refuses too; a
/// sentence.
pub fn written_config(
    mut config: Map<String, Value>,
    half: Half,
) -> Result<(Map<String, Value>, Vec<String>), String> {
    spell_out_rotary(&mut config)?;
    // The dtype of the branch, whatever the base model's is.
    for key in ["dtype", "torch_dtype"] {
        config.insert(key.to_owned(), half.torch_name().into());
    }
    let mut notes = Vec::new();
    // Old versions of Transformers slice each linear layer's weights by it, which packed ones do
    // not have; the sum over slices is the same function.
    if let Some(slices) = config
        .get_mut("pretraining_tp")
        .filter(|it| !it.is_null() && **it != 1)
    {
        notes.push(format!(
            "config.json has pretraining_tp = {slices}; branches have 1, which is the same model without slicing its linear layers"
        ));
        *slices = 1.into();
    }
    let mut config = Value::Object(config);
    if make_public(&mut config).auto_map {
        let note = "config.json has an auto_map; branches have neither it nor the Python files it names: what runs \
                    is the architecture of that model_type";
        notes.push(note.to_owned());
    }
    match config {
        Value::Object(config) => Ok((config, notes)),
        _ => Err("not an object".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_config_goes_out_in_both_spellings_and_without_what_stays_here() {
        let base = json!({
            "model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            "dtype": "bfloat16", "pretraining_tp": 2, "auto_map": {"AutoConfig": "configuration_x.X"},
            "_name_or_path": "/home/me/model", "initializer_range": {"__float__": "NaN"}
        });
        let (config, notes) = written_config(base.as_object().unwrap().clone(), Half::F16).unwrap();
        let expected = json!({
            "model_type": "llama", "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            "dtype": "float16", "torch_dtype": "float16", "pretraining_tp": 1,
            "initializer_range": {"__float__": "NaN"}
        });
        assert_eq!(Value::Object(config.clone()), expected);
        assert!(
            notes[0].contains("pretraining_tp = 2") && notes[1].contains("auto_map"),
            "{notes:?}"
        );
        let (again, notes) = written_config(config.clone(), Half::F16).unwrap();
        assert_eq!((again, notes.len()), (config, 0));
    }
}
