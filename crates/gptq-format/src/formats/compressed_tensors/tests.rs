//! Branches that are written are read back to the bit, by this crate and by a reader written from the description of the format
//! alone.

use std::path::Path;

use half::f16;
use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::json;

use super::super::random_linear::{random_linear, shape};
use super::*;
use crate::{Bits, Checkpoint, GroupSize, QuantizedLinear, ShardedWriter, write_json};

fn settings(linear: &LinearShape, sym: bool) -> QuantizeConfig {
    serde_json::from_value(json!({
        "bits": linear.bits, "group_size": linear.group_size, "sym": sym, "quant_method": "compressed-tensors",
        "checkpoint_format": "compressed-tensors",
    }))
    .unwrap()
}

/// Writes the linear `m` as a checkpoint of its own.
fn write(dir: &Path, linear: &QuantizedLinear, shape: &LinearShape, sym: bool) {
    let format = CompressedTensors { sym };
    let specs = format.tensors("m", shape);
    let writer = ShardedWriter::create(dir, &specs, None).unwrap();
    let packed = linear.pack();
    for part in format.encode("m", &packed).unwrap() {
        let name = format.tensor_name("m", part.suffix);
        writer.write(&name, &part.bytes).unwrap();
    }
    writer.finish().unwrap();
    let mut config = Map::new();
    let settings = settings(shape, sym);
    format
        .write_settings(&settings, &[], &mut config, dir)
        .unwrap();
    write_json(&dir.join("config.json"), &config).unwrap();
}

/// Bits `[at, at + width)` of words of 32, counted from the lowest of the first.
fn bits(words: &[u32], at: usize, width: usize) -> u32 {
    (0..width)
        .map(|bit| (words[(at + bit) / 32] >> ((at + bit) % 32) & 1) << bit)
        .sum()
}

/// Dequantizes the linear `m` as the library's documentation describes: unpack along the inputs, subtract half of the
/// range, subtract the zero point (less half of the range) if there is one, multiply by the group's scale.
fn described(dir: &Path) -> Vec<f32> {
    let file = std::fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let config: Value =
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let config = &config["quantization_config"];
    assert_eq!(config["quant_method"], "compressed-tensors");
    assert_eq!(config["format"], "pack-quantized");
    let group = &config["config_groups"]["group_0"];
    assert_eq!(group["targets"], json!(["Linear"]));
    let weights = &group["weights"];
    let width = weights["num_bits"].as_u64().unwrap() as usize;
    let words = |name: &str| -> Vec<u32> {
        let data = tensors.tensor(name).unwrap().data();
        data.as_chunks::<4>()
            .0
            .iter()
            .map(|word| u32::from_le_bytes(*word))
            .collect()
    };
    let declared = tensors.tensor("m.weight_shape").unwrap();
    let declared: Vec<usize> = (declared.data().as_chunks::<8>().0.iter())
        .map(|n| i64::from_le_bytes(*n) as usize)
        .collect();
    let [n_out, n_in] = declared[..] else {
        panic!()
    };
    let scale = tensors.tensor("m.weight_scale").unwrap();
    let groups = scale.shape()[1];
    let scales: Vec<f32> = (scale.data().as_chunks::<2>().0.iter())
        .map(|bytes| f16::from_le_bytes(*bytes).to_f32())
        .collect();
    match weights["strategy"].as_str().unwrap() {
        "channel" => assert_eq!((groups, &weights["group_size"]), (1, &Value::Null)),
        _ => assert_eq!(weights["group_size"], json!(n_in / groups)),
    }
    let packed = words("m.weight_packed");
    let half = 1 << (width - 1);
    let zeros = (weights["symmetric"] == false).then(|| words("m.weight_zero_point"));
    let mut all = Vec::new();
    for o in 0..n_out {
        let row = &packed[o * packed.len() / n_out..][..packed.len() / n_out];
        for i in 0..n_in {
            let g = i / (n_in / groups);
            let signed = bits(row, i * width, width) as i32 - half;
            let zero = zeros.as_ref().map_or(0, |zeros| {
                let column: Vec<u32> = zeros.iter().skip(g).step_by(groups).copied().collect();
                bits(&column, o * width, width) as i32 - half
            });
            all.push(scales[o * groups + g] * (signed - zero) as f32);
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn reading_returns_what_was_written_to_the_bit(
        width in prop::sample::select(Bits::ALL.to_vec()),
        columns in prop::sample::select(vec![32usize, 64, 96, 128]),
        groups in 1usize..4,
        row in any::<bool>(),
        sym in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let shape = shape(width, columns, groups, row);
        let linear = random_linear(&shape, sym, seed);
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &linear, &shape, sym);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let read = checkpoint.packed("m", shape.in_features, shape.out_features).unwrap().unwrap();
        prop_assert_eq!(read.unpack(), linear.clone());
        let bits = |weights: Vec<f32>| weights.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        prop_assert_eq!(bits(described(dir.path())), bits(linear.dequantize()));
    }
}

#[test]
fn what_it_cannot_hold_is_refused_beforehand_and_when_it_is_encoded() {
    let shape = shape(Bits::Four, 32, 2, false);
    let format = CompressedTensors { sym: true };
    let fits = |scattered| {
        format.fits(
            &shape,
            Grids {
                sym: true,
                scattered,
            },
        )
    };
    assert_eq!(fits(false), Ok(()));
    let line = fits(true).unwrap_err().to_string();
    assert_eq!(
        line,
        "compressed-tensors cannot hold act order with scattered groups; \
         quantize with static_groups = true or desc_act = false"
    );
    let mut linear = random_linear(&shape, true, 1);
    linear.g_idx.swap(0, 40);
    let line = format.encode("m", &linear.pack()).unwrap_err().to_string();
    assert!(
        line.starts_with("m: compressed-tensors cannot hold act order"),
        "{line}"
    );
    let linear = random_linear(&shape, false, 1);
    let line = format.encode("m", &linear.pack()).unwrap_err().to_string();
    assert!(line.contains("zero points are not in the middle"), "{line}");
    let uneven = LinearShape {
        in_features: 96,
        group_size: GroupSize::Columns(64),
        ..shape
    };
    let grids = Grids {
        sym: true,
        scattered: false,
    };
    assert!(
        format
            .fits(&uneven, grids)
            .unwrap_err()
            .to_string()
            .contains("whole groups")
    );
}

#[test]
fn a_shape_that_disagrees_with_the_model_is_refused() {
    let shape = shape(Bits::Four, 32, 2, false);
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &random_linear(&shape, true, 1), &shape, true);
    let path = dir.path().join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    // The widest elements come first.
    file[start] = 63;
    std::fs::write(&path, file).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let line = checkpoint.packed("m", 64, 64).unwrap_err().to_string();
    assert!(line.contains("m.weight_shape says [63, 64]"), "{line}");
}

#[test]
fn written_settings_are_read_back() {
    let settings: QuantizeConfig = serde_json::from_value(json!({
        "bits": 4, "group_size": 128, "quant_method": "compressed-tensors", "checkpoint_format": "compressed-tensors",
        "sym": false, "dynamic": {
            "+:model\\.layers\\.\\d+\\.(mlp\\.down_proj)": {"bits": 8, "group_size": -1},
            "-:model\\.layers\\.(0)\\.(self_attn\\.k_proj)": {},
        },
    }))
    .unwrap();
    let value = written(&settings);
    assert_eq!(
        value["config_groups"]["group_1"]["weights"]["strategy"],
        "channel"
    );
    assert_eq!(
        value["ignore"],
        json!(["lm_head", "re:model\\.layers\\.(0)\\.(self_attn\\.k_proj)"])
    );
    let dir = tempfile::tempdir().unwrap();
    write_json(
        &dir.path().join("config.json"),
        &json!({"quantization_config": value}),
    )
    .unwrap();
    let read = QuantizeConfig::read(dir.path()).unwrap().unwrap();
    assert!(!read.sym);
    for (name, expected) in [
        (
            "model.layers.3.mlp.down_proj",
            Some((Bits::Eight, GroupSize::Row)),
        ),
        ("model.layers.0.self_attn.k_proj", None),
        (
            "model.layers.1.self_attn.k_proj",
            Some((Bits::Four, GroupSize::Columns(128))),
        ),
    ] {
        assert_eq!(read.module(name).unwrap(), expected, "{name}");
        assert_eq!(settings.module(name).unwrap(), expected, "{name}");
    }
}
