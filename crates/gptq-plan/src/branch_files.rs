//! What a branch's files hold, and who reads them: from its plan and the model's shapes alone.

use std::collections::BTreeMap;

use gptq_format::{
    CheckpointFormat, Contents, Dynamic, GroupSize, Half, LinearShape, QuantizeConfig, Support,
    TensorSpec, client_support,
};
use gptq_solver::Settings;
use gptq_spec::{Division, ModelConfig, Role};

use crate::{BranchPlan, Choice, PlannedLinear};

/// Blocks that one expression names: readers limit its length.
const LAYERS: usize = 128;

/// Least and most damping that readers are told of: GPTQModel 7.7 loads no file that says 0 or 1, though
/// nobody has a use for it once the codes are found. `report.json` has what was asked for.
const TOLD_DAMPING: (f64, f64) = (1e-6, 1.0 - 1e-6);

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

    /// Whether readers have to be told of act order: with static groups it is over once the codes are found,
    /// as every group's columns lie together.
    pub fn needs_desc_act(&self) -> bool {
        self.desc_act && !self.static_groups
    }

    /// What linears have other than the branch's own settings, as regular expressions over names, no two of
    /// which match the same one: readers try them in an order that JSON does not keep. Each names
    /// blocks and linears, and what readers that run these as one call them, and is true of what begins
    /// so: no such name begins with another.
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

    /// Every tensor of the branch's files, in model order; what stays unquantized is in `half`.
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

    /// Every quantized linear; of an open branch, with the settings that it begins with.
    pub(crate) fn linears(&self, config: &ModelConfig) -> Vec<LinearShape> {
        let linears = self.planned_linears(config);
        linears.iter().map(PlannedLinear::stored).collect()
    }

    /// Who can load the branch; while it is open, whatever is picked.
    pub fn clients(&self, config: &ModelConfig) -> Vec<Support> {
        let linears = self.possible(config);
        client_support(&self.contents(linears.iter().map(PlannedLinear::stored).collect()))
    }

    /// What files of these linears say.
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

    /// Every quantized linear; of an open branch, with each setting that it may get.
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

    /// Whether the branch can be split over `ranks` devices by heads and by the width of the feed-forward, as
    /// readers split, and who loads it so; the error is a sentence.
    ///
    /// `q`, `k`, `v`, `gate` and `up` are split by outputs, `o` and `down` by inputs: a rank has whole heads
    /// (of keys and values, or each a copy of one), and its inputs are whole groups.
    pub fn split(&self, config: &ModelConfig, ranks: usize) -> Result<Vec<Support>, String> {
        let kv_fits =
            config.kv_heads.is_multiple_of(ranks) || ranks.is_multiple_of(config.kv_heads);
        if !config.heads.is_multiple_of(ranks) || !kv_fits {
            return Err(format!(
                "{} query heads and {} of keys and values cannot be shared out",
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
