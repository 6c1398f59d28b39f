//! AutoGPTQ's layout, versions 1 and 2, which differ in how zero points are stored.
//!
//! `qweight` i32 `[in * bits / 32, out]`: codes packed down the inputs. `qzeros` i32 `[groups, out * bits / 32]`: zero
//! points, less one in version 1, packed across the outputs. `scales` f16 `[groups, out]`. `g_idx` i32 `[in]`: each
//! input's group, in the original order of the inputs. Settings are the object of `quantize_config.json`, which
//! `config.json` has as `quantization_config`.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value};

use super::{
    Encoded, Grids, ModuleSettings, OutputFormat, PartSpec, StoredTensors, part, refuse, unpacked,
    whole_words,
};
use crate::{
    Bits, FormatError, LinearShape, PackedLinear, QuantizeConfig, Refusal, le_bytes, pack_across,
    unpack_across, write_json,
};

/// AutoGPTQ's layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutoGptq {
    /// Number subtracted from a zero point before it is stored.
    zero_offset: u8,
}

impl AutoGptq {
    /// Version 1, which stores `zero - 1`.
    pub const V1: AutoGptq = AutoGptq { zero_offset: 1 };
    /// Version 2, which stores the zero point itself.
    pub const V2: AutoGptq = AutoGptq { zero_offset: 0 };
}

const QWEIGHT: &str = "qweight";
const QZEROS: &str = "qzeros";
const SCALES: &str = "scales";
const G_IDX: &str = "g_idx";

impl OutputFormat for AutoGptq {
    fn name(&self) -> &'static str {
        match self.zero_offset {
            0 => "gptq_v2",
            _ => "gptq",
        }
    }

    fn marker(&self) -> &'static str {
        QWEIGHT
    }

    fn parts(&self, linear: &LinearShape) -> Vec<PartSpec> {
        let (n_in, n_out) = (linear.in_features, linear.out_features);
        let (bits, groups) = (linear.bits.get(), linear.groups());
        vec![
            part(QWEIGHT, Dtype::I32, &[n_in * bits / 32, n_out]),
            part(QZEROS, Dtype::I32, &[groups, n_out * bits / 32]),
            part(SCALES, Dtype::F16, &[groups, n_out]),
            part(G_IDX, Dtype::I32, &[n_in]),
        ]
    }

    fn features(
        &self,
        from: &dyn StoredTensors,
        module: &str,
        bits: Bits,
    ) -> Result<[usize; 2], FormatError> {
        let [rows, out] = from.matrix(&self.tensor_name(module, QWEIGHT))?;
        Ok([unpacked(rows, bits), out])
    }

    /// Files from before act order have no `g_idx`: groups in order.
    fn may_lack(&self, suffix: &str, settings: &QuantizeConfig) -> bool {
        suffix == G_IDX && !settings.desc_act
    }

    fn fits(&self, linear: &LinearShape, grids: Grids) -> Result<(), Refusal> {
        whole_words(linear)?;
        match !grids.sym && self.zero_offset != 0 {
            true => refuse(
                "checkpoint_format \"gptq\" cannot store a zero point of 0, which asymmetric codes may have",
                "write \"gptq_v2\", or set sym = true",
            ),
            false => Ok(()),
        }
    }

    fn encode<'a>(
        &self,
        module: &str,
        linear: &'a PackedLinear,
    ) -> Result<Vec<Encoded<'a>>, FormatError> {
        let zeros = linear.zeros.iter();
        let zeros = zeros.map(|zero| zero.checked_sub(self.zero_offset));
        let zeros: Option<Vec<u8>> = zeros.collect();
        let zeros = zeros.ok_or_else(|| FormatError::ZeroPointZero {
            name: self.tensor_name(module, QZEROS),
        })?;
        let zeros = pack_across(&zeros, linear.groups(), linear.out_features, linear.bits);
        let part = |suffix, bytes: &'a [u8]| Encoded {
            suffix,
            bytes: bytes.into(),
        };
        Ok(vec![
            part(QWEIGHT, le_bytes(&linear.codes)),
            Encoded {
                suffix: QZEROS,
                bytes: le_bytes(&zeros).to_vec().into(),
            },
            part(SCALES, le_bytes(&linear.scales)),
            part(G_IDX, le_bytes(&linear.g_idx)),
        ])
    }

    fn decode(
        &self,
        from: &dyn StoredTensors,
        module: &str,
        linear: &LinearShape,
    ) -> Result<PackedLinear, FormatError> {
        let &LinearShape {
            in_features,
            out_features,
            bits,
            group_size,
        } = linear;
        if whole_words(linear).is_err() {
            return Err(FormatError::Unpackable {
                in_features,
                out_features,
            });
        }
        let groups = linear.groups();
        let tensor = |suffix: &str| self.tensor_name(module, suffix);
        let words = |suffix: &str, shape: [usize; 2]| -> Result<Vec<u32>, FormatError> {
            let words = from.i32(&tensor(suffix), &shape)?;
            Ok(words.into_iter().map(|word| word as u32).collect())
        };
        let codes = words(QWEIGHT, [in_features * bits.get() / 32, out_features])?;
        let zeros = words(QZEROS, [groups, out_features * bits.get() / 32])?;
        let zeros = unpack_across(&zeros, groups, out_features, bits);
        let (offset, max) = (self.zero_offset, bits.max_code());
        let lacks = |settings: &QuantizeConfig| self.may_lack(G_IDX, settings);
        let optional = from.settings().is_some_and(lacks);
        Ok(PackedLinear {
            bits,
            in_features,
            out_features,
            codes,
            scales: from.f16(&tensor(SCALES), &[groups, out_features])?,
            // A file of version 1 that holds 2^b - 1 was written by a tool that let a zero of 0 wrap; every
            // reader masks it back to 0.
            zeros: (zeros.into_iter())
                .map(|stored| stored.wrapping_add(offset) & max)
                .collect(),
            g_idx: match optional && !from.contains(&tensor(G_IDX)) {
                true => {
                    let columns = group_size.columns(in_features);
                    (0..in_features).map(|i| (i / columns) as i32).collect()
                }
                false => from.i32(&tensor(G_IDX), &[in_features])?,
            },
        })
    }

    fn write_settings(
        &self,
        settings: &QuantizeConfig,
        _modules: &[ModuleSettings],
        config: &mut Map<String, Value>,
        dir: &Path,
    ) -> Result<(), FormatError> {
        let path = dir.join("quantize_config.json");
        settings
            .check_patterns()
            .map_err(|reason| FormatError::Malformed {
                path: path.clone(),
                reason,
            })?;
        let value = serde_json::to_value(settings).map_err(|source| FormatError::Json {
            path: path.clone(),
            source,
        })?;
        config.insert("quantization_config".to_owned(), value);
        write_json(&path, settings)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Checkpoint, CheckpointFormat, GroupSize, QuantizedLinear, ShardedWriter};
    use half::f16;

    const BOTH: [CheckpointFormat; 2] = [CheckpointFormat::Gptq, CheckpointFormat::GptqV2];

    fn linear(bits: Bits, zero: u8) -> QuantizedLinear {
        QuantizedLinear {
            bits,
            in_features: 64,
            out_features: 32,
            codes: (0..64 * 32)
                .map(|i| (i * 7) as u8 & bits.max_code())
                .collect(),
            scales: (0..64)
                .map(|i| f16::from_f32(0.01 + i as f32 / 64.0))
                .collect(),
            zeros: vec![zero; 64],
            g_idx: (0..64).map(|i| i % 2).collect(),
        }
    }

    fn shape(linear: &QuantizedLinear) -> LinearShape {
        LinearShape {
            in_features: linear.in_features,
            out_features: linear.out_features,
            bits: linear.bits,
            group_size: GroupSize::Columns(linear.in_features / linear.groups()),
        }
    }

    /// Writes the linear `m` as a checkpoint of its own, and reads it back.
    fn written(format: CheckpointFormat, linear: &QuantizedLinear) -> PackedLinear {
        let dir = tempfile::tempdir().unwrap();
        let shape = shape(linear);
        let name = format;
        let format = super::super::layout(name, true);
        let specs = format.tensors("m", &shape);
        let writer = ShardedWriter::create(dir.path(), &specs, None).unwrap();
        let packed = linear.pack();
        for (part, encoded) in format
            .parts(&shape)
            .iter()
            .zip(format.encode("m", &packed).unwrap())
        {
            assert_eq!(part.suffix, encoded.suffix);
            let name = format.tensor_name("m", encoded.suffix);
            writer.write(&name, &encoded.bytes).unwrap();
        }
        writer.finish().unwrap();
        let settings = serde_json::json!({
            "bits": linear.bits, "group_size": shape.group_size, "desc_act": true, "checkpoint_format": name,
        });
        let settings: QuantizeConfig = serde_json::from_value(settings).unwrap();
        let mut config = Map::new();
        format
            .write_settings(&settings, &[], &mut config, dir.path())
            .unwrap();
        assert_eq!(
            config["quantization_config"],
            serde_json::to_value(&settings).unwrap()
        );
        write_json(&dir.path().join("config.json"), &config).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.packed("m", 64, 32).unwrap().unwrap()
    }

    proptest! {
        #[test]
        fn reading_returns_what_was_written(
            bits in prop::sample::select(Bits::ALL.to_vec()),
            format in prop::sample::select(BOTH.to_vec()),
            zero in 1u8..=255,
        ) {
            let linear = linear(bits, (zero & bits.max_code()).max(1));
            prop_assert_eq!(written(format, &linear).unpack(), linear);
        }
    }

    #[test]
    fn version_1_refuses_a_zero_point_of_zero_and_version_2_takes_it() {
        let linear = linear(Bits::Four, 0);
        let packed = linear.pack();
        let error = AutoGptq::V1.encode("m", &packed).unwrap_err();
        assert!(matches!(&error, FormatError::ZeroPointZero { name } if name == "m.qzeros"));
        assert_eq!(written(CheckpointFormat::GptqV2, &linear).unpack(), linear);
    }

    #[test]
    fn what_a_version_cannot_hold_is_refused_beforehand() {
        let shape = shape(&linear(Bits::Four, 8));
        let grids = |sym| Grids {
            sym,
            scattered: true,
        };
        for format in [AutoGptq::V1, AutoGptq::V2] {
            assert_eq!(format.fits(&shape, grids(true)), Ok(()));
            let odd = LinearShape {
                out_features: 48,
                ..shape
            };
            let refusal = format.fits(&odd, grids(true)).unwrap_err();
            assert_eq!(
                refusal.to_string(),
                "packing needs multiples of 32; skip it with an override"
            );
        }
        assert_eq!(AutoGptq::V2.fits(&shape, grids(false)), Ok(()));
        assert!(AutoGptq::V1.fits(&shape, grids(false)).is_err());
    }

    #[test]
    fn stored_bits_are_codes_zeros_scales_and_indices() {
        let linear = |bits, group_size| LinearShape {
            in_features: 4096,
            out_features: 11008,
            bits,
            group_size,
        };
        let weights = 4096 * 11008;
        let four = linear(Bits::Four, GroupSize::Columns(128));
        let row = linear(Bits::Three, GroupSize::Row);
        for format in [AutoGptq::V1, AutoGptq::V2] {
            assert_eq!(
                format.stored_bits(&four),
                4 * weights + 32 * 11008 * (16 + 4) + 4096 * 32
            );
            assert_eq!(
                format.stored_bits(&row),
                3 * weights + 11008 * (16 + 3) + 4096 * 32
            );
        }
    }
}
