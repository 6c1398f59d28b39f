//! Contents of a branch's files, and clients that load them, from its plan and the model's shapes.

use std::collections::BTreeMap;

use gptq_format::{
    CheckpointFormat, Contents, Dynamic, GroupSize, Half, LinearShape, QuantizeConfig, Support,
    TensorSpec, client_support,
};
use gptq_solver::Settings;
use gptq_spec::{Division, ModelConfig, Role};

use crate::{BranchPlan, Choice, PlannedLinear};

/// Maximum number of blocks in one expression: clients limit its length.
const LAYERS: usize = 128;

/// Range of the damping that is declared to clients: GPTQModel 7.7 refuses files with 0 or 1,
/// although loading does not use it. `report.json` has the requested value.
const TOLD_DAMPING: (f64, f64) = (1e-6, 1.0 - 1e-6);

impl BranchPlan {
    /// Returns the storage of zero points: asymmetric branches may have a zero point of 0, which v1
    /// cannot hold.
    pub fn format(&self) -> CheckpointFormat {
        match self.sym {
            true => CheckpointFormat::Gptq,
            false => CheckpointFormat::GptqV2,
        }
    }

    /// Returns the settings declared to clients for a model of `config`.
    pub fn quantize_config(&self, model_name: &str, config: &ModelConfig) -> QuantizeConfig {
        let dynamic = self.dynamic(config);
        QuantizeConfig {
            bits: self.bits,
            group_size: self.group_size,
            damp_percent: Some(self.damp_percent.clamp(TOLD_DAMPING.0, TOLD_DAMPING.1)),
            desc_act: self.needs_desc_act(),
            static_groups: self.static_groups,
            sym: self.sym,
            true_sequential: self.true_sequential,
            model_name_or_path: Some(model_name.to_owned()),
            model_file_base_name: Some("model".to_owned()),
            quant_method: "gptq".to_owned(),
            checkpoint_format: self.format(),
            dynamic: (!dynamic.is_empty()).then(|| dynamic.into_iter().collect()),
            modules_in_block_to_quantize: None,
        }
    }

    /// Returns true if act order must be declared to clients. With static groups it has no effect
    /// on loading, as the columns of every group are contiguous.
    pub fn needs_desc_act(&self) -> bool {
        self.desc_act && !self.static_groups
    }

    /// Returns the settings of linear layers that differ from the branch's, as regular expressions
    /// on names. No two match the same name, as clients try them in an order that JSON does not
    /// preserve. Each names blocks and linear layers, including the names of fused ones, and holds
    /// for all names with that beginning: no name begins with another.
    fn dynamic(&self, config: &ModelConfig) -> BTreeMap<String, Dynamic> {
        let own = Some(Choice {
            bits: self.bits,
            group_size: self.group_size,
        });
        let mut same: BTreeMap<(Vec<&str>, Option<Choice>), Vec<usize>> = BTreeMap::new();
        for (layer, block) in config.blocks().iter().enumerate() {
            for tap in block.taps() {
                let mut settings: BTreeMap<Option<Choice>, Vec<usize>> = BTreeMap::new();
                for linear in block.linears_of(tap) {
                    let module = block.linears()[linear].module(layer);
                    let choice = self.module(&module).map(|it| Choice {
                        bits: it.bits,
                        group_size: it.group_size,
                    });
                    settings.entry(choice).or_default().push(linear);
                }
                for (choice, linears) in settings.into_iter().filter(|(it, _)| *it != own) {
                    let names = linears.iter().map(|&it| &*block.linears()[it].name);
                    let names = names.chain(block.fused(&linears)).collect();
                    same.entry((names, choice)).or_default().push(layer);
                }
            }
        }
        let mut dynamic = BTreeMap::new();
        for ((names, choice), layers) in same {
            let names: Vec<String> = names.iter().map(|name| name.replace('.', "\\.")).collect();
            let names = names.join("|");
            for some in layers.chunks(LAYERS) {
                let numbers: Vec<String> = some.iter().map(usize::to_string).collect();
                let layers = match layers.len() == config.layers {
                    true => "\\d+".to_owned(),
                    false => format!("({})", numbers.join("|")),
                };
                let sign = if choice.is_some() { '+' } else { '-' };
                let expression = format!("{sign}:model\\.layers\\.{layers}\\.({names})");
                let settings = Dynamic {
                    bits: choice.map(|it| it.bits),
                    group_size: choice.map(|it| it.group_size),
                };
                dynamic.insert(expression, settings);
            }
        }
        dynamic
    }

    /// Returns every tensor of the branch's files, in model order; unquantized ones are stored in
    /// `half`.
    pub fn tensors(&self, config: &ModelConfig, half: Half) -> Vec<TensorSpec> {
        let tensors = config.tensors().into_iter();
        let specs = tensors.flat_map(|tensor| {
            let settings = match tensor.role {
                Role::Linear => self.module(tensor.module()),
                _ => None,
            };
            match (settings, tensor.shape.as_slice()) {
                (Some(settings), &[n_out, n_in]) => {
                    let shape = LinearShape {
                        in_features: n_in,
                        out_features: n_out,
                        bits: settings.bits,
                        group_size: settings.group_size,
                    };
                    shape.tensors(tensor.module()).to_vec()
                }
                _ => vec![TensorSpec {
                    name: tensor.name,
                    dtype: half.dtype(),
                    shape: tensor.shape,
                }],
            }
        });
        specs.collect()
    }

    /// Returns the size of all tensors in bytes, equal for both half types; with a budget, the
    /// maximum. Headers are not included.
    pub fn bytes(&self, config: &ModelConfig) -> u64 {
        let tensors = self.tensors(config, Half::F16);
        let bytes = tensors.iter().map(TensorSpec::bytes).sum::<usize>() as u64;
        match &self.budget {
            Some(budget) if self.is_open() => {
                let packed: u64 = self
                    .linears(config)
                    .iter()
                    .map(LinearShape::stored_bits)
                    .sum();
                bytes - packed / 8 + self.budget_total(budget, config) / 8
            }
            _ => bytes,
        }
    }

    /// Returns every quantized linear layer; in a branch with an open budget, with its initial
    /// settings.
    pub(crate) fn linears(&self, config: &ModelConfig) -> Vec<LinearShape> {
        let linears = self.planned_linears(config);
        linears.iter().map(PlannedLinear::stored).collect()
    }

    /// Returns which clients can load the branch; with an open budget, for any allocation.
    pub fn clients(&self, config: &ModelConfig) -> Vec<Support> {
        let linears = self.possible(config);
        client_support(&self.contents(linears.iter().map(PlannedLinear::stored).collect()))
    }

    /// Returns the properties of files with these linear layers.
    fn contents(&self, linears: Vec<LinearShape>) -> Contents {
        let own = Choice {
            bits: self.bits,
            group_size: self.group_size,
        };
        let overridden = self.overrides.iter().any(|it| it.settings.is_some());
        let picked = self.picked.values().any(|it| *it != own);
        let groups = linears.iter().any(|l| l.group_size != GroupSize::Row);
        Contents {
            linears,
            sym: self.sym,
            format: self.format(),
            desc_act: self.needs_desc_act(),
            static_groups: self.static_groups,
            scattered: self.needs_desc_act() && groups,
            mixed: overridden || picked || self.is_open(),
            skips: self.overrides.iter().any(|it| it.settings.is_none()),
            listed: false,
            stray: false,
            damp_percent: Some(self.damp_percent.clamp(TOLD_DAMPING.0, TOLD_DAMPING.1)),
        }
    }

    /// Returns every quantized linear layer; with an open budget, with each setting that it may
    /// get.
    fn possible(&self, config: &ModelConfig) -> Vec<PlannedLinear> {
        let budget = self.budget.as_ref().filter(|_| self.is_open());
        let all = |linear: PlannedLinear| {
            let Some(budget) = budget.filter(|_| self.overriding(&linear.module).is_none()) else {
                return vec![linear];
            };
            let with = |choice: &Choice| PlannedLinear {
                settings: Settings {
                    bits: choice.bits,
                    group_size: choice.group_size,
                    ..linear.settings
                },
                ..linear.clone()
            };
            budget.choices.iter().map(with).collect()
        };
        let linears = self.planned_linears(config).into_iter();
        linears.flat_map(all).collect()
    }

    /// Checks that the branch can be split over `ranks` devices by heads and by the width of the
    /// feed-forward, as clients do, and returns the clients that load it so; the error is a
    /// sentence.
    ///
    /// `q`, `k`, `v`, `gate` and `up` are split by outputs, `o` and `down` by inputs: a rank has
    /// whole heads (key-value heads may be copied), and its inputs are whole groups.
    pub fn split(&self, config: &ModelConfig, ranks: usize) -> Result<Vec<Support>, String> {
        let kv_fits =
            config.kv_heads.is_multiple_of(ranks) || ranks.is_multiple_of(config.kv_heads);
        if !config.heads.is_multiple_of(ranks) || !kv_fits {
            return Err(format!(
                "{} query heads and {} key-value heads cannot be divided",
                config.heads, config.kv_heads
            ));
        }
        let mut shares = Vec::new();
        for linear in self.possible(config) {
            let (module, whole) = (&linear.module, linear.stored());
            let division = config.block(linear.layer).division(linear.linear);
            let by_inputs = division == Division::Inputs;
            let mut share = whole;
            let (side, features) = match by_inputs {
                true => ("inputs", &mut share.in_features),
                false => ("outputs", &mut share.out_features),
            };
            let parts = match division {
                Division::KvHeads => ranks.min(config.kv_heads),
                _ => ranks,
            };
            let all = *features;
            *features = all / parts;
            if !all.is_multiple_of(parts) || !features.is_multiple_of(32) {
                return Err(format!(
                    "{module}: {all} {side} are not multiples of 32 for every rank"
                ));
            }
            if by_inputs && self.contents(vec![whole]).scattered {
                return Err(format!(
                    "{module}: act order scatters its groups over all ranks; static_groups = true keeps them together"
                ));
            }
            let one_group = whole.group_size == GroupSize::Row;
            if by_inputs && !one_group && !share.group_size.divides(share.in_features) {
                return Err(format!(
                    "{module}: {} of {all} inputs for each rank are not whole groups of {}",
                    share.in_features, share.group_size
                ));
            }
            shares.push(share);
        }
        let support = client_support(&self.contents(shares)).into_iter();
        Ok(support.filter(|it| it.client.splits()).collect())
    }
}
