//! Checks every tensor's name, dtype, shape and plausibility against the configs and the recorded
//! digests.

use std::path::Path;

use gptq_format::{
    Checkpoint, Contents, GroupSize, LinearShape, ModuleNames, PackedLinear, QuantizeConfig,
    TensorDigests, client_support, layout,
};
use gptq_plan::Check;
use gptq_spec::{Census, Role};
use rayon::prelude::*;

use crate::VerifyError;
use crate::gguf;
use crate::recorded::Recorded;

/// Checks the checkpoint in `dir`: each check with its result, the tensors first. If they fail, the
/// other checks are skipped.
pub(crate) fn check(dir: &Path, census: &Census, recorded: &Recorded) -> Vec<Check> {
    let checkpoint = &census.checkpoint;
    let mut linears = Linears::default();
    let tensors = match &census.fault {
        None => tensors(census, recorded, &mut linears).map_err(|error| error.to_string()),
        Some(fault) => Err(fault.to_string()),
    };
    let held = tensors.is_ok();
    let said = |result: Result<String, VerifyError>| match result {
        Ok(detail) => (true, detail),
        Err(error) => (false, error.to_string()),
    };
    let mut checks = vec![
        ("configs", said(configs_agree(dir))),
        (
            "tensors",
            tensors.map_or_else(|why| (false, why), |it| (true, it)),
        ),
    ];
    if let Some(quantize_config) = checkpoint.quantize_config().filter(|_| held) {
        let wrong = |found: Option<String>, right: &str| match found {
            Some(wrong) => (false, wrong),
            None => (true, right.to_owned()),
        };
        if quantize_config.checkpoint_format.is_autogptq() {
            let order = linears.order(quantize_config);
            checks.push(("g_idx", wrong(order, "consistent with desc_act")));
        }
        checks.push(("zero points", wrong(linears.zeros, "consistent with sym")));
        let digests = match &recorded.digests {
            None => (true, "not recorded".to_owned()),
            Some(_) => {
                let parts = linears.shapes.first().map(|it| {
                    layout(quantize_config.checkpoint_format, quantize_config.sym).parts(it)
                });
                let parts = parts.unwrap_or_default().into_iter().map(|it| it.suffix);
                let parts: Vec<&str> = parts.collect();
                let right = format!("{} match the recorded digests", listed(&parts));
                wrong(linears.digests, &right)
            }
        };
        checks.push(("digests", digests));
        let gguf = gguf::beside(dir, &census.config, checkpoint);
        let gguf = gguf.unwrap_or_else(|error| Some((false, error.to_string())));
        let has_gguf = gguf.is_some();
        checks.extend(gguf.map(|found| ("gguf", found)));
        let scattered = linears.out_of_order.is_some();
        let tensors = census.config.tensors();
        let contents = Contents {
            scattered,
            gguf: has_gguf,
            names: ModuleNames::of(tensors.iter().map(|it| it.module())),
            ..Contents::of(quantize_config, linears.shapes)
        };
        checks.push(("clients", clients(&contents)));
    }
    let check = |(name, (pass, detail)): (&str, (bool, String))| Check {
        name: name.into(),
        pass,
        detail,
    };
    checks.into_iter().map(check).collect()
}

fn tensors(
    census: &Census,
    recorded: &Recorded,
    linears: &mut Linears,
) -> Result<String, VerifyError> {
    let Census {
        config, checkpoint, ..
    } = census;
    let all = config.tensors();
    let looked: Vec<Result<Linears, VerifyError>> = (all.par_iter())
        .map(|tensor| {
            let mut found = Linears::default();
            match tensor.role {
                Role::Carried(_) => return Ok(found),
                Role::Wide => {
                    checkpoint.view(&tensor.name)?.f32()?;
                    return Ok(found);
                }
                _ => {}
            }
            let packed = match (tensor.role, tensor.shape.as_slice()) {
                (Role::Linear, &[n_out, n_in]) => {
                    checkpoint.packed(tensor.module(), n_in, n_out)?
                }
                _ => None,
            };
            match packed {
                Some(packed) => {
                    scales_are_not_zero(tensor.module(), &packed)?;
                    found.add(tensor.module(), &packed, checkpoint, recorded)?;
                }
                None => {
                    checkpoint.check_halves(checkpoint.half(), &tensor.name, &tensor.shape)?;
                    checkpoint.give_back(&tensor.name);
                }
            }
            Ok(found)
        })
        .collect();
    for found in looked {
        linears.extend(found?);
    }
    let count = checkpoint.names().count();
    let mut said = vec![format!(
        "{count} tensors match the configs, {} quantized linear layers",
        linears.shapes.len()
    )];
    said.extend(census.warnings.iter().cloned());
    Ok(said.join("; "))
}

fn scales_are_not_zero(module: &str, packed: &PackedLinear) -> Result<(), VerifyError> {
    let mut scales = packed.scales.iter().map(|s| s.to_f32()).enumerate();
    match scales.find(|(_, scale)| *scale == 0.0) {
        None => Ok(()),
        Some((at, _)) => Err(VerifyError::Scale {
            module: module.into(),
            group: at / packed.out_features,
            output: at % packed.out_features,
        }),
    }
}

/// Faults of the quantized linear layers beyond their shapes; the first of each kind.
#[derive(Default)]
struct Linears {
    shapes: Vec<LinearShape>,
    /// A linear layer whose groups differ in size.
    sizes: Option<String>,
    /// A linear layer whose groups are out of order, and one whose several groups are in order.
    out_of_order: Option<String>,
    in_order: Option<String>,
    zeros: Option<String>,
    digests: Option<String>,
}

impl Linears {
    /// Adds the faults of a later block.
    fn extend(&mut self, later: Linears) {
        self.shapes.extend(later.shapes);
        for (first, later) in [
            (&mut self.sizes, later.sizes),
            (&mut self.out_of_order, later.out_of_order),
            (&mut self.in_order, later.in_order),
            (&mut self.zeros, later.zeros),
            (&mut self.digests, later.digests),
        ] {
            *first = first.take().or(later);
        }
    }

    fn add(
        &mut self,
        module: &str,
        packed: &PackedLinear,
        checkpoint: &Checkpoint,
        recorded: &Recorded,
    ) -> Result<(), VerifyError> {
        let config = checkpoint.quantize_config();
        let (group_size, sym) = match config {
            Some(c) => (c.module(module)?.map_or(c.group_size, |(_, g)| g), c.sym),
            None => (GroupSize::Row, true),
        };
        self.shapes.push(LinearShape {
            in_features: packed.in_features,
            out_features: packed.out_features,
            bits: packed.bits,
            group_size,
        });
        let columns = group_size.columns(packed.in_features);
        let groups = group_size.groups(packed.in_features);
        let mut rows = packed.g_idx.iter().enumerate();
        let misplaced = rows.find(|&(i, &g)| g as usize != i / columns);
        match misplaced {
            Some((row, g)) => {
                let found = || format!("{module}: g_idx[{row}] = {g}, out of order");
                self.out_of_order.get_or_insert_with(found);
            }
            None if groups > 1 => {
                self.in_order.get_or_insert_with(|| module.to_owned());
            }
            None => {}
        }
        let mut sizes = vec![0; groups];
        for &g in &packed.g_idx {
            // Group indices are in range: that was checked when the linear layer was read.
            if let Some(size) = sizes.get_mut(g as usize) {
                *size += 1;
            }
        }
        let size = |g: usize| columns.min(packed.in_features - g * columns);
        let mut sizes = sizes.into_iter().enumerate();
        if let Some((g, n)) = sizes.find(|&(g, n)| n != size(g)) {
            let found = || {
                let expected = size(g);
                format!("{module}: group {g} has {n} inputs in g_idx, expected {expected}")
            };
            self.sizes.get_or_insert_with(found);
        }
        if sym && self.zeros.is_none() {
            let middle = packed.bits.symmetric_zero();
            let mut zeros = packed.zeros.iter().enumerate();
            self.zeros = zeros.find(|&(_, zero)| *zero != middle).map(|(at, zero)| {
                format!(
                    "{module}: zero point [{}, {}] is {zero}, symmetric codes have {middle}",
                    at / packed.out_features,
                    at % packed.out_features,
                )
            });
        }
        if let (None, Some(digests)) = (&self.digests, &recorded.digests) {
            let found = checkpoint.digests(module, packed.in_features, packed.out_features)?;
            let mut found = found.unwrap_or_default();
            let recorded = digests.get(module);
            let differs = recorded.and_then(|recorded| recorded.difference(&found));
            let lacks = differs.is_some_and(|suffix| found.get(suffix).is_none());
            if let (true, Some(config), Some(shape)) = (lacks, config, self.shapes.last()) {
                // Of a tensor that the file may lack, what readers take instead is compared.
                let format = layout(config.checkpoint_format, config.sym);
                let implied = TensorDigests::of(&format.encode(module, packed)?);
                let digest = |suffix| found.get(suffix).or(implied.get(suffix));
                let parts = format.parts(shape).into_iter().map(|part| part.suffix);
                let whole =
                    parts.filter_map(|suffix| Some((suffix.into(), digest(suffix)?.into())));
                found = whole.collect();
            }
            self.digests = match recorded {
                None => Some(format!("{module}: nothing recorded for it")),
                Some(recorded) => found
                    .difference(recorded)
                    .map(|suffix| format!("{module}.{suffix} differs from its recorded digest")),
            };
        }
        Ok(())
    }

    /// Describes what is wrong with `g_idx` under these settings.
    fn order(&self, config: &QuantizeConfig) -> Option<String> {
        match config.desc_act && !config.static_groups {
            false => (self.out_of_order.clone())
                .map(|found| format!("{found}; without act order, groups must be in order")),
            true => self.sizes.clone().or_else(|| {
                let all = self
                    .out_of_order
                    .is_none()
                    .then_some(self.in_order.as_ref())?;
                all.map(|_| "desc_act is true, but every g_idx is in order".to_owned())
            }),
        }
    }
}

/// Formats `a, b and c`.
fn listed(names: &[&str]) -> String {
    match names.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    }
}

/// Lists the clients that load it; the check fails if there is none.
fn clients(contents: &Contents) -> (bool, String) {
    let support = client_support(contents);
    let loads = support.iter().filter(|s| s.verdict.is_ok());
    let names: Vec<&str> = loads.map(|s| s.client.name()).collect();
    match names.is_empty() {
        false => (true, format!("loads in {}", names.join(", "))),
        true => (false, "no client loads it".into()),
    }
}

/// Checks that the settings agree if both files have them.
fn configs_agree(dir: &Path) -> Result<String, VerifyError> {
    let (own, inside) = (QuantizeConfig::own(dir)?, QuantizeConfig::inside(dir)?);
    match (own, inside) {
        (Some(_), None) => {
            Ok("only quantize_config.json: Transformers and vLLM read config.json".into())
        }
        (None, None) => Ok("config.json of a dense model".into()),
        (None, Some(_)) => Ok("config.json alone".into()),
        // Other tools add keys of their own to either file, so only the keys that clients use are
        // compared.
        (Some(own), Some(inside))
            if (inside.bits, inside.group_size, inside.sym, inside.desc_act)
                == (own.bits, own.group_size, own.sym, own.desc_act)
                && inside.checkpoint_format == own.checkpoint_format
                && inside.dynamic == own.dynamic
                && inside.listed() == own.listed() =>
        {
            Ok("quantize_config.json and config.json agree".into())
        }
        _ => Err(VerifyError::ConfigsDisagree { dir: dir.into() }),
    }
}
