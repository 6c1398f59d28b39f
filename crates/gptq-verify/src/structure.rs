//! Every tensor's name, dtype, shape and plain sense, against the configs beside it and the digests
//! its maker recorded.

use std::collections::BTreeSet;
use std::path::Path;

use gptq_format::{
    Checkpoint, GroupSize, LinearDigests, LinearShape, PackedLinear, QuantizeConfig,
    client_support, read_json,
};
use gptq_model::ModelConfig;
use rayon::prelude::*;
use serde_json::Value;

use crate::recorded::Recorded;
use crate::{Check, VerifyError};

/// Checks the checkpoint in `dir`: each check with what it found, the tensors themselves first. Where
/// they do not hold there is nothing further to check.
pub(crate) fn check(
    dir: &Path,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    recorded: &Recorded,
) -> Vec<Check> {
    let mut linears = Linears::default();
    let tensors = tensors(dir, checkpoint, config, recorded, &mut linears);
    let held = tensors.is_ok();
    let said = |result: Result<String, VerifyError>| match result {
        Ok(detail) => (true, detail),
        Err(error) => (false, error.to_string()),
    };
    let mut checks = vec![
        ("configs", said(configs_agree(dir))),
        ("tensors", said(tensors)),
    ];
    if let Some(quantize_config) = checkpoint.quantize_config().filter(|_| held) {
        let wrong = |found: Option<String>, right: &str| match found {
            Some(wrong) => (false, wrong),
            None => (true, right.to_owned()),
        };
        let order = linears.order(quantize_config);
        checks.push(("g_idx", wrong(order, "as desc_act says")));
        checks.push(("zero points", wrong(linears.zeros, "as sym says")));
        let digests = match &recorded.digests {
            None => (true, "not recorded".to_owned()),
            Some(_) => wrong(
                linears.digests,
                "codes, zeros, scales and g_idx as recorded",
            ),
        };
        checks.push(("digests", digests));
        checks.push(("clients", clients(&linears.shapes, quantize_config)));
    }
    let check = |(name, (pass, detail)): (&str, (bool, String))| Check {
        name: name.into(),
        pass,
        detail,
    };
    checks.into_iter().map(check).collect()
}

fn tensors(
    dir: &Path,
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    recorded: &Recorded,
    linears: &mut Linears,
) -> Result<String, VerifyError> {
    let mut expected = BTreeSet::new();
    let mut dense = |name: String, shape: &[usize]| {
        checkpoint.check_halves(checkpoint.half(), &name, shape)?;
        expected.insert(name);
        Ok::<_, VerifyError>(())
    };
    let hidden = config.hidden_size;
    dense(
        "model.embed_tokens.weight".into(),
        &[config.vocabulary, hidden],
    )?;
    dense("model.norm.weight".into(), &[hidden])?;
    if !config.tied_embeddings {
        dense("lm_head.weight".into(), &[config.vocabulary, hidden])?;
    }
    let blocks: Vec<Result<Block, VerifyError>> = (0..config.layers)
        .into_par_iter()
        .map(|layer| Block::check(layer, checkpoint, config, recorded))
        .collect();
    for block in blocks {
        let block = block?;
        expected.extend(block.expected);
        linears.extend(block.linears);
    }
    // Old checkpoints store the rotary frequencies, which follow from the config.
    let derived = |name: &str| name.ends_with("rotary_emb.inv_freq");
    if let Some(name) = checkpoint
        .names()
        .find(|name| !expected.contains(*name) && !derived(name))
    {
        return Err(VerifyError::UnexpectedTensor {
            dir: dir.into(),
            name: name.into(),
        });
    }
    Ok(format!(
        "{} tensors as their configs say, {} quantised linears",
        checkpoint.names().count(),
        linears.shapes.len()
    ))
}

/// What one decoder block has.
#[derive(Default)]
struct Block {
    /// Names of its tensors.
    expected: Vec<String>,
    linears: Linears,
}

impl Block {
    fn check(
        layer: usize,
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        recorded: &Recorded,
    ) -> Result<Self, VerifyError> {
        let mut block = Block::default();
        let dense = |name: String, shape: &[usize], expected: &mut Vec<String>| {
            checkpoint.check_halves(checkpoint.half(), &name, shape)?;
            expected.push(name);
            Ok::<_, VerifyError>(())
        };
        let spec = config.block(layer);
        for vector in spec.vectors() {
            let name = format!("{}.weight", vector.module(layer));
            dense(name, &[vector.len], &mut block.expected)?;
        }
        for linear in spec.linears() {
            let module = linear.module(layer);
            let (n_in, n_out) = linear.shape();
            match checkpoint.packed(&module, n_in, n_out)? {
                Some(packed) => {
                    scales_are_not_zero(&module, &packed)?;
                    block.linears.add(&module, &packed, checkpoint, recorded)?;
                    let tensors = ["qweight", "qzeros", "scales", "g_idx"];
                    let names = tensors.map(|suffix| format!("{module}.{suffix}"));
                    block.expected.extend(names);
                }
                None => {
                    let name = format!("{module}.weight");
                    dense(name, &[n_out, n_in], &mut block.expected)?;
                }
            }
            // Some tools write zero biases for models that have none.
            let bias = format!("{module}.bias");
            if linear.bias || checkpoint.contains(&bias) {
                dense(bias, &[n_out], &mut block.expected)?;
            }
        }
        Ok(block)
    }
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

/// What the quantised linears show beyond their shapes; of each kind of fault the first.
#[derive(Default)]
struct Linears {
    shapes: Vec<LinearShape>,
    /// A linear whose groups are not of one size.
    sizes: Option<String>,
    /// A linear whose groups are out of order, and one whose several groups are in order.
    out_of_order: Option<String>,
    in_order: Option<String>,
    zeros: Option<String>,
    digests: Option<String>,
}

impl Linears {
    /// Adds those of a later block.
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
            // Within the groups: that was checked when the linear was read.
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
            let mut zeros = packed.zeros().into_iter().enumerate();
            self.zeros = zeros.find(|&(_, zero)| zero != middle).map(|(at, zero)| {
                format!(
                    "{module}: zero point [{}, {}] is {zero}, symmetric codes have {middle}",
                    at / packed.out_features,
                    at % packed.out_features,
                )
            });
        }
        if let (None, Some(digests)) = (&self.digests, &recorded.digests) {
            self.digests = different(module, packed, digests.get(module));
        }
        Ok(())
    }

    /// What is wrong with `g_idx`, under these settings.
    fn order(&self, config: &QuantizeConfig) -> Option<String> {
        match config.desc_act && !config.static_groups {
            false => (self.out_of_order.clone())
                .map(|found| format!("{found}, but without act order groups lie in order")),
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

/// The first of a linear's tensors that is not what was recorded.
fn different(
    module: &str,
    packed: &PackedLinear,
    recorded: Option<&LinearDigests>,
) -> Option<String> {
    let Some(recorded) = recorded else {
        return Some(format!("{module}: nothing recorded for it"));
    };
    let found = LinearDigests::of(packed);
    [
        ("qweight", &found.qweight, &recorded.qweight),
        ("qzeros", &found.qzeros, &recorded.qzeros),
        ("scales", &found.scales, &recorded.scales),
        ("g_idx", &found.g_idx, &recorded.g_idx),
    ]
    .into_iter()
    .find(|(_, found, recorded)| found != recorded)
    .map(|(name, ..)| format!("{module}.{name} is not what was written"))
}

/// Who loads it; a branch that nobody loads fails.
fn clients(linears: &[LinearShape], config: &QuantizeConfig) -> (bool, String) {
    let support = client_support(linears, config.sym, config.dynamic.is_some());
    let loads = support.iter().filter(|s| s.verdict.is_ok());
    let names: Vec<&str> = loads.map(|s| s.client.name()).collect();
    match names.is_empty() {
        false => (true, format!("loads in {}", names.join(", "))),
        true => (false, "no client loads it".into()),
    }
}

/// Where both places hold settings, they must be the same settings.
fn configs_agree(dir: &Path) -> Result<String, VerifyError> {
    let own = dir.join("quantize_config.json");
    let config: Value = read_json(&dir.join("config.json"))?;
    let Some(inside) = config.get("quantization_config") else {
        return Ok(match own.exists() {
            true => "quantize_config.json alone: Transformers and vLLM read config.json".into(),
            false => "config.json of a dense model".into(),
        });
    };
    if !own.exists() {
        return Ok("config.json alone".into());
    }
    let own: QuantizeConfig = read_json(&own)?;
    // Tools add keys of their own to one or the other: only what a reader acts on is compared.
    match serde_json::from_value::<QuantizeConfig>(inside.clone()) {
        Ok(inside)
            if (inside.bits, inside.group_size, inside.sym, inside.desc_act)
                == (own.bits, own.group_size, own.sym, own.desc_act)
                && inside.checkpoint_format == own.checkpoint_format
                && inside.dynamic == own.dynamic =>
        {
            Ok("quantize_config.json and config.json agree".into())
        }
        _ => Err(VerifyError::ConfigsDisagree { dir: dir.into() }),
    }
}
