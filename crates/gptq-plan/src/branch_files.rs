//! Contents of a branch's files, and clients that load them, from its plan and the model's shapes.

use std::collections::HashMap;

use gptq_format::{
    Contents, DynamicRules, GgufType, GroupSize, Half, LinearShape, ModuleNames, ModuleSettings,
    QuantizeConfig, Support, TensorSpec, client_support, parts_experts,
};
use gptq_solver::Settings;
use gptq_spec::{Division, GgufLayout, GgufModel, ModelConfig, ModelTensor, Role, TableType};

use crate::{BranchPlan, Choice, PlannedLinear, budget, dynamic};

/// Range of the damping that is declared to clients: GPTQModel 7.7 refuses files with 0 or 1,
/// although loading does not use it. `report.json` has the requested value.
const TOLD_DAMPING: (f64, f64) = (1e-6, 1.0 - 1e-6);

/// The files of a branch of a model.
#[derive(Clone, Copy, Debug)]
pub struct BranchFiles<'a> {
    branch: &'a BranchPlan,
    config: &'a ModelConfig,
}

impl<'a> BranchFiles<'a> {
    /// Describes the files of `branch` for a model of `config`.
    pub fn of(branch: &'a BranchPlan, config: &'a ModelConfig) -> Self {
        BranchFiles { branch, config }
    }

    /// Returns the settings declared to clients for the model called `model_name`.
    pub fn quantize_config(&self, model_name: &str) -> QuantizeConfig {
        let format = self.branch.checkpoint_format();
        QuantizeConfig {
            bits: self.branch.bits,
            group_size: self.branch.group_size,
            damp_percent: Some(
                self.branch
                    .damp_percent
                    .clamp(TOLD_DAMPING.0, TOLD_DAMPING.1),
            ),
            desc_act: self.branch.needs_desc_act(),
            static_groups: self.branch.static_groups,
            sym: self.branch.sym,
            true_sequential: self.branch.true_sequential,
            model_name_or_path: Some(model_name.to_owned()),
            model_file_base_name: Some("model".to_owned()),
            quant_method: format.quant_method().to_owned(),
            checkpoint_format: format,
            dynamic: self.dynamic(),
            modules_in_block_to_quantize: None,
        }
    }

    /// Returns the settings of linear layers that differ from the branch's.
    fn dynamic(&self) -> Option<DynamicRules> {
        let choice = |module: &str| {
            let settings = self.branch.module(module)?;
            Some(Choice {
                bits: settings.bits,
                group_size: settings.group_size,
            })
        };
        let format = self.branch.checkpoint_format();
        dynamic(self.config, format, self.own(), choice)
    }

    /// Returns all linear layers of the blocks with their settings.
    pub fn modules(&self) -> Vec<ModuleSettings> {
        let tensors = self.config.tensors().into_iter();
        let linears = tensors.filter(|tensor| tensor.role == Role::Linear);
        let settings = |module: &str| {
            let settings = self.branch.module(module)?;
            Some((settings.bits, settings.group_size))
        };
        linears
            .map(|tensor| (tensor.module().to_owned(), settings(tensor.module())))
            .collect()
    }

    /// Returns the settings of linear layers without settings of their own.
    fn own(&self) -> Choice {
        Choice {
            bits: self.branch.bits,
            group_size: self.branch.group_size,
        }
    }

    /// Returns every tensor of the branch's files, in model order; unquantized ones are stored in
    /// `half`, and what is not run
    /// as it was.
    pub fn tensors(&self, half: Half) -> Vec<TensorSpec> {
        let format = self.branch.layout();
        let tensors = self.config.tensors().into_iter();
        let specs = tensors.flat_map(|tensor| {
            let settings = match tensor.role {
                Role::Linear => self.branch.module(tensor.module()),
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
                    format.tensors(tensor.module(), &shape)
                }
                _ => vec![TensorSpec {
                    dtype: tensor.role.dtype(half.dtype()),
                    name: tensor.name,
                    shape: tensor.shape,
                }],
            }
        });
        specs.collect()
    }

    /// Lays out the branch's GGUF file, whose unquantized tables are in `half`.
    ///
    /// # Errors
    /// A model or settings that the file cannot hold; half a sentence.
    pub fn gguf(&self, half: Half) -> Result<GgufLayout, String> {
        let model = GgufModel::of(self.config)?;
        let linears = self.branch.planned_linears(self.config).into_iter();
        let kinds = linears.map(|linear| {
            let stored = linear.stored();
            let grids = self.branch.grids(&stored);
            let kind = GgufType::of_linear(&stored, grids.sym, grids.scattered);
            let (n_in, n_out) = linear.shape;
            let named = |refusal| format!("{} is {n_in} x {n_out}: {refusal}", linear.module);
            Ok((format!("{}.weight", linear.module), kind.map_err(named)?))
        });
        let kinds: HashMap<String, GgufType> = kinds.collect::<Result<_, String>>()?;
        let kind = |tensor: &ModelTensor| kinds.get(&tensor.name).copied();
        GgufLayout::of(&model, half, TableType::default(), kind)
    }

    /// Returns the size of all tensors in bytes, equal for both half types; with a budget, the
    /// maximum; with those of a GGUF file. Headers are not included.
    pub fn bytes(&self) -> u64 {
        let gguf = self.branch.gguf_file();
        let gguf = gguf.and_then(|_| self.gguf(Half::F16).ok());
        self.safetensors_bytes() + gguf.map_or(0, |layout| layout.bytes())
    }

    fn safetensors_bytes(&self) -> u64 {
        let tensors = self.tensors(Half::F16);
        let bytes = tensors.iter().map(TensorSpec::bytes).sum::<usize>() as u64;
        match &self.branch.budget {
            Some(budget) if self.branch.is_open() => {
                let (linears, format) = (
                    self.branch.planned_linears(self.config),
                    self.branch.layout(),
                );
                let packed: u64 = linears
                    .iter()
                    .map(|it| format.stored_bits(&it.stored()))
                    .sum();
                bytes - packed / 8 + budget::total(self.branch, budget, self.config) / 8
            }
            _ => bytes,
        }
    }

    /// Returns which clients can load the branch; with an open budget, for any allocation.
    pub fn clients(&self) -> Vec<Support> {
        let linears = self.possible();
        client_support(&self.contents(linears.iter().map(PlannedLinear::stored).collect()))
    }

    /// Returns the properties of files with these linear layers.
    fn contents(&self, linears: Vec<LinearShape>) -> Contents {
        let own = self.own();
        let overridden = self.branch.overrides.iter().any(|it| it.settings.is_some());
        let picked = self.branch.picked.values().any(|it| *it != own);
        let scattered = linears.iter().any(|l| self.branch.grids(l).scattered);
        Contents {
            linears,
            sym: self.branch.sym,
            format: self.branch.checkpoint_format(),
            gguf: self.branch.gguf_file().is_some(),
            desc_act: self.branch.needs_desc_act(),
            static_groups: self.branch.static_groups,
            scattered,
            mixed: overridden || picked || self.branch.is_open(),
            skips: self.branch.overrides.iter().any(|it| it.settings.is_none()),
            parted: (self.dynamic().iter()).any(|rules| {
                let mut patterns = rules.iter();
                patterns.any(|(pattern, _)| parts_experts(pattern))
            }),
            listed: false,
            stray: false,
            names: ModuleNames::of(self.possible().iter().map(|linear| &linear.module)),
            damp_percent: Some(
                self.branch
                    .damp_percent
                    .clamp(TOLD_DAMPING.0, TOLD_DAMPING.1),
            ),
        }
    }

    /// Returns every quantized linear layer; with an open budget, with each setting that it may
    /// get.
    fn possible(&self) -> Vec<PlannedLinear> {
        let budget = self
            .branch
            .budget
            .as_ref()
            .filter(|_| self.branch.is_open());
        let all = |linear: PlannedLinear| {
            let Some(budget) = budget.filter(|_| self.branch.overriding(&linear.module).is_none())
            else {
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
        let linears = self.branch.planned_linears(self.config).into_iter();
        linears.flat_map(all).collect()
    }

    /// Checks that the branch can be split over `ranks` devices by heads and by the width of the
    /// feed-forward, as clients do, and returns the clients that load it so; the error is a
    /// sentence.
    ///
    /// `q`, `k`, `v`, `gate` and `up` are split by outputs, `o` and `down` by inputs: a rank has
    /// whole heads (key-value heads may be copied), and its inputs are whole groups.
    pub fn split(&self, ranks: usize) -> Result<Vec<Support>, String> {
        let kv_fits = self.config.kv_heads.is_multiple_of(ranks)
            || ranks.is_multiple_of(self.config.kv_heads);
        if !self.config.heads.is_multiple_of(ranks) || !kv_fits {
            return Err(format!(
                "{} query heads and {} key-value heads cannot be divided",
                self.config.heads, self.config.kv_heads
            ));
        }
        let mut shares = Vec::new();
        for linear in self.possible() {
            let (module, whole) = (&linear.module, linear.stored());
            let division = self.config.block(linear.layer).division(linear.linear);
            let by_inputs = division == Division::Inputs;
            let mut share = whole;
            let (side, features) = match by_inputs {
                true => ("inputs", &mut share.in_features),
                false => ("outputs", &mut share.out_features),
            };
            let parts = match division {
                Division::KvHeads => ranks.min(self.config.kv_heads),
                _ => ranks,
            };
            let all = *features;
            *features = all / parts;
            if !all.is_multiple_of(parts) || !features.is_multiple_of(32) {
                return Err(format!(
                    "{module}: {all} {side} are not multiples of 32 for every rank"
                ));
            }
            if by_inputs && self.branch.grids(&whole).scattered {
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
