//! `pack-quantized` of compressed-tensors, as its version 0.20 packs: densely at every width.
//!
//! `weight_packed` i32 `[out, in * bits / 32]`: codes packed along the inputs, which are AutoGPTQ's `qweight`,
//! transposed. `weight_scale` f16 `[out, groups]`. `weight_shape` i64 `[2]`: outputs and inputs. Where codes are
//! asymmetric, `weight_zero_point` i32 `[out * bits / 32, groups]`: true zero points packed down the outputs. The
//! library's codes are signed, and so are its zero points; it adds `2^(bits - 1)` to both before it packs them, which
//! makes the stored ones those of AutoGPTQ. There is no `g_idx`: columns of a group are neighbours.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{
    Encoded, Grids, ModuleSettings, OutputFormat, PartSpec, StoredTensors, contiguous, in_order,
    in_order_groups, laid_out, must_fit, part, refuse, transposed, unpacked, whole_words,
};
use crate::{
    Bits, FormatError, GroupSize, LinearShape, PackedLinear, QuantizeConfig, Refusal, pack_down,
    unpack_down,
};

const PACKED: &str = "weight_packed";
const SCALE: &str = "weight_scale";
const SHAPE: &str = "weight_shape";
const ZERO_POINT: &str = "weight_zero_point";

/// The format `pack-quantized` of compressed-tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedTensors {
    /// True if all zero points are in the middle of the code range, and not stored.
    pub sym: bool,
}

impl OutputFormat for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn marker(&self) -> &'static str {
        PACKED
    }

    fn features(
        &self,
        from: &dyn StoredTensors,
        module: &str,
        bits: Bits,
    ) -> Result<[usize; 2], FormatError> {
        let [out, words] = from.matrix(&self.tensor_name(module, PACKED))?;
        Ok([unpacked(words, bits), out])
    }

    fn parts(&self, linear: &LinearShape) -> Vec<PartSpec> {
        let (n_in, n_out) = (linear.in_features, linear.out_features);
        let (bits, groups) = (linear.bits.get(), linear.groups());
        let mut parts = vec![
            part(PACKED, Dtype::I32, &[n_out, n_in * bits / 32]),
            part(SCALE, Dtype::F16, &[n_out, groups]),
            part(SHAPE, Dtype::I64, &[2]),
        ];
        if !self.sym {
            parts.push(part(ZERO_POINT, Dtype::I32, &[n_out * bits / 32, groups]));
        }
        parts
    }

    fn fits(&self, linear: &LinearShape, grids: Grids) -> Result<(), Refusal> {
        whole_words(linear)?;
        contiguous(self.name(), linear, grids)?;
        match self.sym && !grids.sym {
            true => refuse(
                "its zero points are not in the middle of the codes, although its settings say sym = true",
                "set sym = false where they are",
            ),
            false => Ok(()),
        }
    }

    fn encode<'a>(
        &self,
        module: &str,
        linear: &'a PackedLinear,
    ) -> Result<Vec<Encoded<'a>>, FormatError> {
        in_order(self, module, linear)?;
        let (n_in, n_out, groups) = (linear.in_features, linear.out_features, linear.groups());
        let rows = n_in * linear.bits.get() / 32;
        let mut parts = vec![
            laid_out(PACKED, &transposed(&linear.codes, rows, n_out)),
            laid_out(SCALE, &transposed(&linear.scales, groups, n_out)),
            laid_out(SHAPE, &[n_out as i64, n_in as i64]),
        ];
        if !self.sym {
            let zeros = transposed(&linear.zeros, groups, n_out);
            let zeros = pack_down(&zeros, n_out, groups, linear.bits);
            parts.push(laid_out(ZERO_POINT, &zeros));
        }
        Ok(parts)
    }

    fn decode(
        &self,
        from: &dyn StoredTensors,
        module: &str,
        linear: &LinearShape,
    ) -> Result<PackedLinear, FormatError> {
        let grids = Grids {
            sym: self.sym,
            scattered: false,
        };
        must_fit(self, module, linear, grids)?;
        let &LinearShape {
            in_features,
            out_features,
            bits,
            group_size,
        } = linear;
        let groups = linear.groups();
        let tensor = |suffix: &str| self.tensor_name(module, suffix);
        let words = |suffix: &str, shape: [usize; 2]| -> Result<Vec<u32>, FormatError> {
            let words = from.i32(&tensor(suffix), &shape)?;
            Ok(words.into_iter().map(|word| word as u32).collect())
        };
        let shape = from.i64(&tensor(SHAPE), &[2])?;
        if shape != [out_features as i64, in_features as i64] {
            return Err(FormatError::DeclaredShape {
                name: tensor(SHAPE),
                found: shape,
                expected: [out_features, in_features],
            });
        }
        let rows = in_features * bits.get() / 32;
        let codes = words(PACKED, [out_features, rows])?;
        let scales = from.f16(&tensor(SCALE), &[out_features, groups])?;
        let zeros = match self.sym {
            true => vec![bits.symmetric_zero(); groups * out_features],
            false => {
                let zeros = words(ZERO_POINT, [out_features * bits.get() / 32, groups])?;
                let zeros = unpack_down(&zeros, out_features, groups, bits);
                transposed(&zeros, out_features, groups)
            }
        };
        Ok(PackedLinear {
            bits,
            in_features,
            out_features,
            codes: transposed(&codes, out_features, rows),
            scales: transposed(&scales, out_features, groups),
            zeros,
            g_idx: in_order_groups(in_features, group_size.columns(in_features)),
        })
    }

    fn write_settings(
        &self,
        settings: &QuantizeConfig,
        _modules: &[ModuleSettings],
        config: &mut Map<String, Value>,
        dir: &Path,
    ) -> Result<(), FormatError> {
        (settings.check_patterns()).map_err(|reason| FormatError::Malformed {
            path: dir.join("config.json"),
            reason,
        })?;
        let settings = written(settings);
        config.insert("quantization_config".to_owned(), settings);
        Ok(())
    }
}

/// The settings as `config.json` has them. `dynamic` must name each module once, as its order is lost.
fn written(settings: &QuantizeConfig) -> Value {
    let weights = |bits: Bits, group_size: GroupSize| {
        let (strategy, columns) = match group_size {
            GroupSize::Row => ("channel", None),
            GroupSize::Columns(columns) => ("group", Some(columns)),
        };
        json!({
            "num_bits": bits, "type": "int", "symmetric": settings.sym, "strategy": strategy,
            "group_size": columns, "dynamic": false, "actorder": null, "block_structure": null,
        })
    };
    let group = |targets: &[String], bits, group_size| {
        json!({
            "targets": targets, "weights": weights(bits, group_size), "input_activations": null,
            "output_activations": null, "format": "pack-quantized",
        })
    };
    let mut ignore = vec!["lm_head".to_owned()];
    let mut groups = vec![(
        (settings.bits, settings.group_size),
        vec!["Linear".to_owned()],
    )];
    for (pattern, own) in settings.dynamic.iter().flat_map(|rules| rules.iter()) {
        let target = |pattern: &str| format!("re:{pattern}");
        if let Some(skipped) = pattern.strip_prefix("-:") {
            ignore.push(target(skipped));
            continue;
        }
        let choice = (
            own.bits.unwrap_or(settings.bits),
            own.group_size.unwrap_or(settings.group_size),
        );
        let target = target(pattern.strip_prefix("+:").unwrap_or(pattern));
        match groups.iter_mut().find(|(other, _)| *other == choice) {
            Some((_, targets)) => targets.push(target),
            None => groups.push((choice, vec![target])),
        }
    }
    let groups = groups
        .iter()
        .enumerate()
        .map(|(i, ((bits, size), targets))| (format!("group_{i}"), group(targets, *bits, *size)));
    let groups: Map<String, Value> = groups.collect();
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ignore, "kv_cache_scheme": null, "global_compression_ratio": null,
    })
}

#[cfg(test)]
mod tests;
