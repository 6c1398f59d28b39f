//! Properties of a branch's files that clients' rules depend on.

use crate::expert_patterns::{names_gates, parts_experts};
use crate::{CheckpointFormat, GroupSize, LinearShape, QuantizeConfig};

/// Properties of a model's linear layers that their names tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModuleNames {
    /// True if programs hold one under another name than the files do: the text model beside a vision tower, fused gate
    /// and up, which GPTQModel takes apart, and Mixtral's experts. Transformers maps names as it reads.
    pub renamed: bool,
    /// True if some are experts'.
    pub experts: bool,
}

impl ModuleNames {
    /// Reads the names of a model's linear layers, quantized or not.
    pub fn of<S: AsRef<str>>(modules: impl IntoIterator<Item = S>) -> ModuleNames {
        let mut names = ModuleNames::default();
        for module in modules {
            let module = module.as_ref();
            names.renamed |= module.starts_with("language_model.")
                || module.ends_with(".gate_up_proj")
                || module.contains(".block_sparse_moe.experts.");
            names.experts |= module.contains(".experts.");
        }
        names
    }
}

/// Properties of a branch's files that clients depend on.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// Shapes of the quantized linear layers.
    pub linears: Vec<LinearShape>,
    /// True for symmetric codes.
    pub sym: bool,
    /// Format of the files.
    pub format: CheckpointFormat,
    /// True if a GGUF file lies beside them.
    pub gguf: bool,
    /// `desc_act`, as declared to clients.
    pub desc_act: bool,
    /// `static_groups`, as declared to clients.
    pub static_groups: bool,
    /// True if any `g_idx` is out of order, so that groups are not contiguous.
    pub scattered: bool,
    /// True if some linear layers have settings other than the branch's.
    pub mixed: bool,
    /// True if some linear layer of a block is not quantized.
    pub skips: bool,
    /// True if experts of one block have different settings.
    pub parted: bool,
    /// True if a list names the quantized linear layers (`modules_in_block_to_quantize`).
    pub listed: bool,
    /// True if settings and tensors disagree on which linear layers are quantized.
    pub stray: bool,
    /// Properties that the names of linear layers tell.
    pub names: ModuleNames,
    /// `damp_percent`, if declared to clients.
    pub damp_percent: Option<f64>,
}

impl Contents {
    /// Collects the properties of a branch with these settings and linear layers.
    pub fn of(config: &QuantizeConfig, linears: Vec<LinearShape>) -> Self {
        let rules = || config.dynamic.iter().flat_map(|rules| rules.iter());
        let skips = |(pattern, _): (&str, _)| pattern.starts_with("-:") && !names_gates(pattern);
        let groups = linears.iter().any(|l| l.group_size != GroupSize::Row);
        Contents {
            linears,
            sym: config.sym,
            format: config.checkpoint_format,
            gguf: false,
            desc_act: config.desc_act,
            static_groups: config.static_groups,
            scattered: config.desc_act && !config.static_groups && groups,
            mixed: rules().any(|(pattern, _)| !pattern.starts_with("-:")),
            skips: rules().any(skips),
            parted: rules().any(|(pattern, _)| parts_experts(pattern)),
            listed: !config.listed().is_empty(),
            stray: false,
            names: ModuleNames::default(),
            damp_percent: config.damp_percent,
        }
    }

    pub(super) fn all(
        &self,
        rule: impl Fn(&LinearShape) -> bool,
        why: &'static str,
    ) -> Result<(), &'static str> {
        need(self.linears.iter().all(rule), why)
    }

    /// Returns true if all linear layers have codes of one width.
    pub(super) fn one_width(&self) -> bool {
        let mut widths = self.linears.iter().map(|linear| linear.bits);
        let first = widths.next();
        widths.all(|bits| Some(bits) == first)
    }
}

/// Returns the rule `why` if it fails.
pub(super) fn need(ok: bool, why: &'static str) -> Result<(), &'static str> {
    if ok { Ok(()) } else { Err(why) }
}
