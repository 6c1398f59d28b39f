//! What a branch's files hold, and who reads them: from its plan and the model's shapes alone.

use std::collections::BTreeMap;

use gptq_format::{
    CheckpointFormat, Dynamic, Half, LinearShape, QuantizeConfig, Support, TensorSpec,
    client_support,
};
use gptq_model::{ModelConfig, Role};
use gptq_solver::Settings;

use crate::{BranchPlan, Choice, PlannedLinear};

/// Blocks that one expression names: readers limit its length.
const LAYERS: usize = 128;

impl BranchPlan {
    /// How zero points are stored: asymmetric branches may have a zero of 0, which v1 cannot hold.
    pub fn format(&self) -> CheckpointFormat {
        match self.sym {
            true => CheckpointFormat::Gptq,
            false => CheckpointFormat::GptqV2,
        }
    }

    /// What readers of a model of `config` are told.
    pub fn quantize_config(&self, model_name: &str, config: &ModelConfig) -> QuantizeConfig {
        let dynamic = self.dynamic(config);
        QuantizeConfig {
            bits: self.bits,
            group_size: self.group_size,
            damp_percent: self.damp_percent,
            desc_act: self.desc_act,
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

    /// What linears have other than the branch's own settings, as regular expressions over names, no two of
    /// which match the same one: readers try them in an order that JSON does not keep. Each names
    /// blocks and linears, and what readers that run these as one call them.
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
                let expression = format!("{sign}:model\\.layers\\.{layers}\\.({names})$");
                let settings = Dynamic {
                    bits: choice.map(|it| it.bits),
                    group_size: choice.map(|it| it.group_size),
                };
                dynamic.insert(expression, settings);
            }
        }
        dynamic
    }

    /// Every tensor of the branch's files, in model order; what stays unquantised is in `half`.
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

    /// Bytes of all tensors, the same in either half, and with a budget the most that they can be; the
    /// files' headers come on top.
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

    /// Every quantised linear; of an open branch, with the settings that it begins with.
    pub(crate) fn linears(&self, config: &ModelConfig) -> Vec<LinearShape> {
        let linears = self.planned_linears(config);
        linears.iter().map(PlannedLinear::stored).collect()
    }

    /// Who can load the branch; while it is open, whatever is picked.
    pub fn clients(&self, config: &ModelConfig) -> Vec<Support> {
        let mut linears = self.linears(config);
        let own = Choice {
            bits: self.bits,
            group_size: self.group_size,
        };
        let mut mixed = !self.overrides.is_empty() || self.picked.values().any(|it| *it != own);
        if let Some(budget) = self.budget.as_ref().filter(|_| self.is_open()) {
            mixed = true;
            let planned = self.planned_linears(config).into_iter();
            linears = planned
                .flat_map(|linear| {
                    let choices = match self.overriding(&linear.module) {
                        Some(_) => vec![linear.settings],
                        None => (budget.choices.iter())
                            .map(|choice| Settings {
                                bits: choice.bits,
                                group_size: choice.group_size,
                                ..linear.settings
                            })
                            .collect(),
                    };
                    let stored = move |settings| {
                        PlannedLinear {
                            settings,
                            ..linear.clone()
                        }
                        .stored()
                    };
                    choices.into_iter().map(stored)
                })
                .collect();
        }
        client_support(&linears, self.sym, mixed)
    }
}
