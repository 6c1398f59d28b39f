//! What a branch's files hold, and who reads them: from its plan and the model's shapes alone.

use std::collections::BTreeMap;

use gptq_format::{
    CheckpointFormat, Dynamic, Half, LinearShape, QuantizeConfig, Support, TensorSpec,
    client_support,
};
use gptq_model::{ModelConfig, Projection, Stage};
use gptq_solver::Settings;

use crate::{BranchPlan, Choice};

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
            dynamic: (!dynamic.is_empty()).then_some(dynamic),
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
        let mut same: BTreeMap<(Stage, Option<Choice>, Vec<Projection>), Vec<usize>> =
            BTreeMap::new();
        for layer in 0..config.layers {
            for stage in Stage::ALL {
                let mut settings: BTreeMap<Option<Choice>, Vec<Projection>> = BTreeMap::new();
                for &projection in stage.projections() {
                    let choice = self.module(&projection.module(layer)).map(|it| Choice {
                        bits: it.bits,
                        group_size: it.group_size,
                    });
                    settings.entry(choice).or_default().push(projection);
                }
                for (choice, linears) in settings.into_iter().filter(|(it, _)| *it != own) {
                    let layers = same.entry((stage, choice, linears)).or_default();
                    layers.push(layer);
                }
            }
        }
        let mut dynamic = BTreeMap::new();
        for ((stage, choice, linears), layers) in same {
            let whole = linears == stage.projections();
            let names = linears.iter().map(|projection| projection.name());
            let names = names.chain(stage.fused().filter(|_| whole));
            let names: Vec<String> = names.map(|name| name.replace('.', "\\.")).collect();
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
        let mut specs = Vec::new();
        let dense = |name: String, shape: &[usize]| TensorSpec {
            name,
            dtype: half.dtype(),
            shape: shape.into(),
        };
        let hidden = config.hidden_size;
        let table = [config.vocabulary, hidden];
        specs.push(dense("model.embed_tokens.weight".into(), &table));
        for layer in 0..config.layers {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                let name = format!("model.layers.{layer}.{norm}.weight");
                specs.push(dense(name, &[hidden]));
            }
            for projection in Projection::ALL {
                let module = projection.module(layer);
                let (n_in, n_out) = projection.shape(config);
                match self.module(&module) {
                    Some(settings) => {
                        let shape = linear_shape((n_in, n_out), &settings);
                        specs.extend(shape.tensors(&module));
                    }
                    None => specs.push(dense(format!("{module}.weight"), &[n_out, n_in])),
                }
                if projection.has_bias(config) {
                    specs.push(dense(format!("{module}.bias"), &[n_out]));
                }
            }
        }
        specs.push(dense("model.norm.weight".into(), &[hidden]));
        if !config.tied_embeddings {
            specs.push(dense("lm_head.weight".into(), &table));
        }
        specs
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
        let modules = self.quantised_modules(config).into_iter();
        let shape = |(_, shape, settings): (String, _, Settings)| linear_shape(shape, &settings);
        modules.map(shape).collect()
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
            let modules = self.quantised_modules(config).into_iter();
            linears = modules
                .flat_map(|(module, shape, settings)| {
                    let may_become = |choice: &Choice| Settings {
                        bits: choice.bits,
                        group_size: choice.group_size,
                        ..settings
                    };
                    let all: Vec<Settings> = match self.overriding(&module) {
                        Some(_) => vec![settings],
                        None => budget.choices.iter().map(may_become).collect(),
                    };
                    all.into_iter().map(move |it| linear_shape(shape, &it))
                })
                .collect();
        }
        client_support(&linears, self.sym, mixed)
    }
}

fn linear_shape((in_features, out_features): (usize, usize), settings: &Settings) -> LinearShape {
    LinearShape {
        in_features,
        out_features,
        bits: settings.bits,
        group_size: settings.group_size,
    }
}
