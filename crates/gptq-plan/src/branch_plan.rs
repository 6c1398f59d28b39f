//! Validated settings of one branch and of its linear layers.

use std::collections::BTreeMap;

use gptq_format::{
    Bits, CheckpointFormat, FormatName, Grids, GroupSize, LinearShape, OutputFormat, layout,
};
use gptq_solver::Settings;
use gptq_spec::{LinearSpec, ModelConfig};
use serde::Serialize;

use crate::pattern::matches;
use crate::{Allocation, Budget, Choice, ColumnOrder, Method, Preset};

/// Maximum length of a branch name, which becomes a directory and a Hub revision.
const MAX_NAME: usize = 96;

/// One branch with all settings resolved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BranchPlan {
    /// Directory name, and later the Hub revision.
    pub name: String,
    /// Format of its files; omitted from fingerprints where it is the default.
    #[serde(skip_serializing_if = "is_default")]
    pub format: FormatName,
    /// Code width.
    pub bits: Bits,
    /// Columns per group.
    pub group_size: GroupSize,
    /// Act order.
    pub desc_act: bool,
    /// Groups fixed from the original weights.
    pub static_groups: bool,
    /// True for symmetric codes.
    pub sym: bool,
    /// Damping as a fraction of the mean diagonal.
    pub damp_percent: f64,
    /// Later linear layers of a block see the error of earlier ones.
    pub true_sequential: bool,
    /// Preset of the method.
    pub preset: Preset,
    /// Options for finding codes and scales.
    pub method: Method,
    /// Limit on the bits per weight, and the choices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// Mixed-precision allocation of the budget. Like the settings it gives to single linear
    /// layers, it is a result and therefore not part of a fingerprint.
    #[serde(skip)]
    pub allocation: Option<Allocation>,
    /// Choices that the budget's allocation made for single linears, by module.
    #[serde(skip)]
    pub picked: BTreeMap<String, Choice>,
    /// Reason for smaller groups than the default.
    #[serde(skip)]
    pub group_note: Option<String>,
    /// Settings of single linears, as the recipe has them.
    pub overrides: Vec<ModuleOverride>,
}

fn is_default(format: &FormatName) -> bool {
    *format == FormatName::default()
}

/// A linear layer that a branch quantizes.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedLinear {
    /// Block index.
    pub layer: usize,
    /// Index within the block.
    pub linear: usize,
    /// Module name in the checkpoint.
    pub module: String,
    /// `(in_features, out_features)`.
    pub shape: (usize, usize),
    /// Quantization settings; with an open budget, the initial ones.
    pub settings: Settings,
}

impl PlannedLinear {
    /// Returns its shape as stored.
    pub fn stored(&self) -> LinearShape {
        LinearShape {
            in_features: self.shape.0,
            out_features: self.shape.1,
            bits: self.settings.bits,
            group_size: self.settings.group_size,
        }
    }
}

/// Settings of the linears that a pattern matches.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModuleOverride {
    /// Pattern of module names.
    pub pattern: String,
    /// `None` leaves the layer in full precision.
    pub settings: Option<(Bits, GroupSize)>,
}

impl BranchPlan {
    /// Returns the solving order of its columns and the kind of groups.
    pub fn order(&self) -> ColumnOrder {
        ColumnOrder {
            desc_act: self.desc_act,
            static_groups: self.static_groups,
        }
    }

    /// Returns true if the settings of some linear layers are still to be determined.
    pub fn is_open(&self) -> bool {
        self.budget.is_some() && self.allocation.is_none()
    }

    /// Returns the layout of its quantized linear layers.
    pub fn layout(&self) -> Box<dyn OutputFormat> {
        layout(self.checkpoint_format(), self.sym)
    }

    /// Returns the name of its GGUF file, if it has one.
    pub fn gguf_file(&self) -> Option<String> {
        (self.format == FormatName::Gguf).then(|| format!("{}.gguf", self.name))
    }

    /// Returns the format that its files declare.
    pub fn checkpoint_format(&self) -> CheckpointFormat {
        self.format.checkpoint_format(self.sym)
    }

    /// Returns the kind of grids that a linear layer gets.
    pub(crate) fn grids(&self, linear: &LinearShape) -> Grids {
        Grids {
            sym: self.sym,
            scattered: self.needs_desc_act() && linear.group_size != GroupSize::Row,
        }
    }

    /// Returns true if act order must be declared to clients. With static groups it has no effect
    /// on loading, as the columns of every group are contiguous.
    pub fn needs_desc_act(&self) -> bool {
        self.desc_act && !self.static_groups
    }

    /// Returns the override that matches a module.
    pub(crate) fn overriding(&self, module: &str) -> Option<&ModuleOverride> {
        self.overrides.iter().find(|o| matches(&o.pattern, module))
    }

    /// Returns the solver settings of a module, or `None` if it stays in full precision.
    pub fn module(&self, module: &str) -> Option<Settings> {
        let (bits, group_size) = match (self.overriding(module), self.picked.get(module)) {
            (Some(own), _) => own.settings?,
            (None, Some(picked)) => (picked.bits, picked.group_size),
            (None, None) => (self.bits, self.group_size),
        };
        Some(Settings {
            bits,
            group_size,
            sym: self.sym,
            static_groups: self.static_groups,
            scale_search: self.method.scale_search,
            f16_scales: true,
            refine: self.method.refine,
        })
    }

    /// Returns every quantized linear layer, in model order.
    pub fn planned_linears(&self, config: &ModelConfig) -> Vec<PlannedLinear> {
        linears(config)
            .filter_map(|(layer, at, linear)| self.planned(layer, at, linear))
            .collect()
    }

    /// Returns linear layer `at` of block `layer`, if it is quantized.
    pub fn planned(&self, layer: usize, at: usize, linear: &LinearSpec) -> Option<PlannedLinear> {
        let module = linear.module(layer);
        Some(PlannedLinear {
            settings: self.module(&module)?,
            layer,
            linear: at,
            module,
            shape: linear.shape(),
        })
    }
}

/// Iterates over the model's linear layers in order, with the indices of block and layer.
pub(crate) fn linears(config: &ModelConfig) -> impl Iterator<Item = (usize, usize, &LinearSpec)> {
    let blocks = config.blocks().iter().enumerate();
    blocks.flat_map(|(layer, block)| {
        let linears = block.linears().iter().enumerate();
        linears.map(move |(at, linear)| (layer, at, linear))
    })
}

/// Checks that a name can be a directory and a revision; the error is a sentence.
pub fn check_name(name: &str) -> Result<(), String> {
    let valid = "use letters, digits, '.', '_' and '-', starting with a letter or digit, without \
                 \"..\" and not ending in '.', .lock, .partial or .old";
    let fits = name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
        && !name.contains("..")
        && ![".", ".lock", ".partial", ".old"]
            .iter()
            .any(|end| name.ends_with(end));
    match fits {
        true => Ok(()),
        false => Err(format!(
            "branch name {name:?} is not safe as a directory and revision; {valid}"
        )),
    }
}
