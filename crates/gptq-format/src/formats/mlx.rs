//! MLX's affine quantization, as mlx-lm loads it.
//!
//! `weight` u32 `[out, in * bits / 32]`: codes packed along the inputs, which are AutoGPTQ's `qweight`, transposed.
//! `scales` and `biases` f16 `[out, groups]`: a weight is `scale * code + bias`. So the bias is `-scale * zero`, exactly
//! where the zero point is a power of two, as in the middle of the codes; other zero points need more bits than f16 has.
//! Settings are `quantization` of `config.json`: those of most modules, and by name those of the others, `false` for one
//! in full precision. mlx-lm writes the same as `quantization_config`.

use std::path::Path;

use half::f16;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::{
    Encoded, Grids, ModuleSettings, OutputFormat, PartSpec, StoredTensors, contiguous, in_order,
    in_order_groups, laid_out, must_fit, part, refuse, transposed, unpacked, whole_words,
};
use crate::{Bits, FormatError, LinearShape, PackedLinear, QuantizeConfig, Refusal};

const WEIGHT: &str = "weight";
const SCALES: &str = "scales";
const BIASES: &str = "biases";

/// Group sizes that MLX has kernels for.
const GROUPS: [usize; 3] = [32, 64, 128];

/// MLX's affine quantization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mlx;

impl OutputFormat for Mlx {
    fn name(&self) -> &'static str {
        "mlx"
    }

    fn marker(&self) -> &'static str {
        SCALES
    }

    fn features(
        &self,
        from: &dyn StoredTensors,
        module: &str,
        bits: Bits,
    ) -> Result<[usize; 2], FormatError> {
        let [out, words] = from.matrix(&self.tensor_name(module, WEIGHT))?;
        Ok([unpacked(words, bits), out])
    }

    fn parts(&self, linear: &LinearShape) -> Vec<PartSpec> {
        let (n_in, n_out, groups) = (linear.in_features, linear.out_features, linear.groups());
        vec![
            part(WEIGHT, Dtype::U32, &[n_out, n_in * linear.bits.get() / 32]),
            part(SCALES, Dtype::F16, &[n_out, groups]),
            part(BIASES, Dtype::F16, &[n_out, groups]),
        ]
    }

    fn fits(&self, linear: &LinearShape, grids: Grids) -> Result<(), Refusal> {
        whole_words(linear)?;
        contiguous(self.name(), linear, grids)?;
        if !grids.sym {
            return refuse(
                "mlx cannot hold asymmetric codes without loss",
                "quantize with sym = true",
            );
        }
        let columns = linear.group_size.columns(linear.in_features);
        match GROUPS.contains(&columns) {
            true => Ok(()),
            false => refuse(
                "mlx has groups of 32, 64 and 128 only",
                "quantize with one of these as group_size",
            ),
        }
    }

    fn encode<'a>(
        &self,
        module: &str,
        linear: &'a PackedLinear,
    ) -> Result<Vec<Encoded<'a>>, FormatError> {
        in_order(self, module, linear)?;
        let (n_out, groups) = (linear.out_features, linear.groups());
        let rows = linear.in_features * linear.bits.get() / 32;
        let scales = transposed(&linear.scales, groups, n_out);
        let biases: Vec<f16> = scales.iter().map(|it| bias(*it, linear.bits)).collect();
        if biases.iter().any(|bias| !bias.is_finite()) {
            return Err(FormatError::Scale {
                name: self.tensor_name(module, BIASES),
            });
        }
        Ok(vec![
            laid_out(WEIGHT, &transposed(&linear.codes, rows, n_out)),
            laid_out(SCALES, &scales),
            laid_out(BIASES, &biases),
        ])
    }

    fn decode(
        &self,
        from: &dyn StoredTensors,
        module: &str,
        linear: &LinearShape,
    ) -> Result<PackedLinear, FormatError> {
        let does_not_fit = |refusal| FormatError::DoesNotFit {
            module: module.into(),
            refusal,
        };
        let grids = Grids {
            sym: true,
            scattered: false,
        };
        must_fit(self, module, linear, grids)?;
        let &LinearShape {
            in_features,
            out_features,
            bits,
            group_size,
        } = linear;
        let (groups, rows) = (linear.groups(), in_features * bits.get() / 32);
        let tensor = |suffix: &str| self.tensor_name(module, suffix);
        let codes = from.u32(&tensor(WEIGHT), &[out_features, rows])?;
        let scales = from.f16(&tensor(SCALES), &[out_features, groups])?;
        let biases = from.f16(&tensor(BIASES), &[out_features, groups])?;
        if scales
            .iter()
            .zip(&biases)
            .any(|(scale, found)| bias(*scale, bits) != *found)
        {
            let asymmetric = refuse(
                "its biases are not those of symmetric codes, which alone are read from mlx",
                "use the full-precision model it was quantized from",
            );
            asymmetric.map_err(does_not_fit)?;
        }
        Ok(PackedLinear {
            bits,
            in_features,
            out_features,
            codes: transposed(&codes, out_features, rows),
            scales: transposed(&scales, out_features, groups),
            zeros: vec![bits.symmetric_zero(); groups * out_features],
            g_idx: in_order_groups(in_features, group_size.columns(in_features)),
        })
    }

    fn write_settings(
        &self,
        settings: &QuantizeConfig,
        modules: &[ModuleSettings],
        config: &mut Map<String, Value>,
        _dir: &Path,
    ) -> Result<(), FormatError> {
        let own = (settings.bits, settings.group_size);
        let mut all = Map::new();
        all.insert("bits".to_owned(), json!(settings.bits));
        all.insert("group_size".to_owned(), json!(settings.group_size));
        all.insert("mode".to_owned(), json!("affine"));
        for (module, choice) in modules.iter().filter(|(_, choice)| *choice != Some(own)) {
            let value = match choice {
                Some((bits, group_size)) => json!({"bits": bits, "group_size": group_size}),
                None => json!(false),
            };
            all.insert(module.clone(), value);
        }
        for key in ["quantization", "quantization_config"] {
            config.insert(key.to_owned(), Value::Object(all.clone()));
        }
        Ok(())
    }
}

/// `-scale * zero`.
fn bias(scale: f16, bits: Bits) -> f16 {
    f16::from_f32(-scale.to_f32() * f32::from(bits.symmetric_zero()))
}

#[cfg(test)]
mod tests;
