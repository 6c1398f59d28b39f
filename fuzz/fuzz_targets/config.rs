//! Any bytes as `config.json`: the model's shapes, and the settings of a quantized checkpoint.
#![no_main]

use gptq_format::QuantizeConfig;
use gptq_spec::ModelConfig;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|bytes: &[u8]| {
    let Ok(value) = serde_json::from_slice::<Value>(bytes) else {
        return;
    };
    if let Ok(settings) = serde_json::from_value::<QuantizeConfig>(
        value
            .get("quantization_config")
            .cloned()
            .unwrap_or_default(),
    ) {
        let _ = settings.module("model.layers.0.mlp.down_proj");
    }
    if let Ok(config) = ModelConfig::from_json(value) {
        // Calculations with accepted shapes must not overflow.
        let _ = config.parameters();
        for block in config.blocks() {
            assert!(block.taps().all(|tap| block.in_features(tap) > 0));
        }
    }
});
