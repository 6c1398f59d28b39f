//! Branches that are written are read back to the bit, by this crate and by a reader written from MLX's description of affine
//! quantization; settings by name.

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::super::random_linear::{random_linear, shape};
use super::*;
use crate::{Checkpoint, GroupSize, QuantizedLinear, ShardedWriter, write_json};

/// Writes the linear `m` as a checkpoint of its own.
fn write(dir: &Path, linear: &QuantizedLinear, shape: &LinearShape) {
    let specs = Mlx.tensors("m", shape);
    let writer = ShardedWriter::create(dir, &specs, None).unwrap();
    let packed = linear.pack();
    for part in Mlx.encode("m", &packed).unwrap() {
        writer
            .write(&Mlx.tensor_name("m", part.suffix), &part.bytes)
            .unwrap();
    }
    writer.finish().unwrap();
    let settings =
        json!({"bits": shape.bits, "group_size": shape.group_size, "checkpoint_format": "mlx"});
    let settings: QuantizeConfig = serde_json::from_value(settings).unwrap();
    let mut config = Map::new();
    let modules = [("m".to_owned(), Some((shape.bits, shape.group_size)))];
    Mlx.write_settings(&settings, &modules, &mut config, dir)
        .unwrap();
    write_json(&dir.join("config.json"), &config).unwrap();
}

/// Weights `[out, in]` as MLX documents them: `scale * code + bias`, codes low bits first along the inputs.
fn described(dir: &Path, width: usize) -> Vec<f32> {
    let file = std::fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let halves = |name: &str| -> Vec<f32> {
        let data = tensors.tensor(name).unwrap().data();
        data.as_chunks::<2>()
            .0
            .iter()
            .map(|it| f16::from_le_bytes(*it).to_f32())
            .collect()
    };
    let weight = tensors.tensor("m.weight").unwrap();
    assert_eq!(weight.dtype(), Dtype::U32);
    let [n_out, words] = weight.shape()[..] else {
        panic!()
    };
    let (scales, biases) = (halves("m.scales"), halves("m.biases"));
    let (n_in, groups) = (words * 32 / width, scales.len() / n_out);
    let bit = |at: usize| u32::from(weight.data()[at / 8] >> (at % 8) & 1);
    let mut all = Vec::new();
    for o in 0..n_out {
        for i in 0..n_in {
            let at = o * words * 32 + i * width;
            let code: u32 = (0..width).map(|b| bit(at + b) << b).sum();
            let g = o * groups + i / (n_in / groups);
            all.push(scales[g] * code as f32 + biases[g]);
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn reading_returns_what_was_written_to_the_bit(
        width in prop::sample::select(Bits::ALL.to_vec()),
        columns in prop::sample::select(GROUPS.to_vec()),
        groups in 1usize..4,
        seed in any::<u64>(),
    ) {
        let shape = shape(width, columns, groups, false);
        let linear = random_linear(&shape, true, seed);
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &linear, &shape);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let read = checkpoint.packed("m", shape.in_features, shape.out_features).unwrap().unwrap();
        prop_assert_eq!(read.unpack(), linear.clone());
        prop_assert_eq!(described(dir.path(), width.get()), linear.dequantize());
    }
}

#[test]
fn what_it_cannot_hold_is_refused() {
    let fits = |columns, sym, scattered| {
        let refused = Mlx.fits(
            &shape(Bits::Four, columns, 2, false),
            Grids { sym, scattered },
        );
        refused.map_err(|refusal| refusal.to_string())
    };
    assert_eq!(fits(64, true, false), Ok(()));
    assert!(
        fits(256, true, false)
            .unwrap_err()
            .contains("32, 64 and 128 only")
    );
    assert!(
        fits(64, false, false)
            .unwrap_err()
            .contains("asymmetric codes")
    );
    assert!(fits(64, true, true).unwrap_err().contains("act order"));
    assert!(
        Mlx.fits(
            &shape(Bits::Four, 96, 2, true),
            Grids {
                sym: true,
                scattered: false
            }
        )
        .is_err()
    );
}

#[test]
fn biases_of_other_codes_are_refused_in_one_line() {
    let shape = shape(Bits::Four, 32, 2, false);
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &random_linear(&shape, true, 3), &shape);
    let path = dir.path().join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let codes = 64 * 64 * 4 / 8;
    file[header + codes] ^= 1;
    std::fs::write(&path, file).unwrap();
    let line = Checkpoint::open(dir.path())
        .unwrap()
        .packed("m", 64, 64)
        .unwrap_err()
        .to_string();
    assert!(
        line.starts_with("m: its biases are not") && !line.contains('\n'),
        "{line}"
    );
}

#[test]
fn settings_of_single_modules_are_read_by_name() {
    let modules: Vec<ModuleSettings> = (0..3000)
        .map(|i| {
            let choice = match i % 3 {
                0 => Some((Bits::Four, GroupSize::Columns(64))),
                1 => Some((Bits::Eight, GroupSize::Columns(32))),
                _ => None,
            };
            (format!("model.layers.{i}.mlp.up_proj"), choice)
        })
        .collect();
    let settings = json!({"bits": 4, "group_size": 64, "checkpoint_format": "mlx"});
    let settings: QuantizeConfig = serde_json::from_value(settings).unwrap();
    let (dir, mut config) = (tempfile::tempdir().unwrap(), Map::new());
    Mlx.write_settings(&settings, &modules, &mut config, dir.path())
        .unwrap();
    assert_eq!(config["quantization"], config["quantization_config"]);
    assert_eq!(config["quantization"]["model.layers.2.mlp.up_proj"], false);
    write_json(&dir.path().join("config.json"), &config).unwrap();
    let read = QuantizeConfig::read(dir.path()).unwrap().unwrap();
    for (module, choice) in &modules {
        assert_eq!(read.module(module).unwrap(), *choice, "{module}");
    }
    config["quantization"]["mode"] = "mxfp4".into();
    write_json(&dir.path().join("config.json"), &config).unwrap();
    let line = QuantizeConfig::read(dir.path()).unwrap_err().to_string();
    assert!(line.contains("mlx with mode \"mxfp4\""), "{line}");
}
