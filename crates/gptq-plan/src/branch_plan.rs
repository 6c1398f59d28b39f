//! Validated settings of one branch and of its linear layers.

use std::collections::BTreeMap;
use std::fmt;

use gptq_format::{Bits, GroupSize, LinearShape};
use gptq_solver::Settings;
use gptq_spec::{LinearSpec, ModelConfig};
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::pattern::matches;
use crate::recipe::{Branch, Override};
use crate::{Allocation, Budget, Choice, Method, Preset, Recipe, RecipeError};

/// Maximum length of a branch name, which becomes a directory and a Hub revision.
const MAX_NAME: usize = 96;

/// Solving order of a branch's columns, and whether its groups follow the original column order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnOrder {
    /// Act order: columns by descending energy of their inputs.
    pub desc_act: bool,
    /// Group parameters from the original weights, of contiguous columns.
    pub static_groups: bool,
}

impl ColumnOrder {
    /// Default if a recipe sets neither key: act order for its accuracy, and groups that every
    /// client loads.
    pub const DEFAULT: ColumnOrder = ColumnOrder {
        desc_act: true,
        static_groups: true,
    };

    /// Resolves the two keys of a recipe. If only one is set, the other defaults as in AutoGPTQ:
    /// static groups off, act order on.
    fn of(desc_act: Option<bool>, static_groups: Option<bool>) -> Self {
        match (desc_act, static_groups) {
            (None, None) => ColumnOrder::DEFAULT,
            _ => ColumnOrder {
                desc_act: desc_act.unwrap_or(true),
                static_groups: static_groups.unwrap_or(false),
            },
        }
    }
}

/// Group sizes that are tried if a recipe sets none, the most common first.
const DEFAULT_GROUPS: [usize; 3] = [128, 64, 32];

/// One branch with all settings resolved.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BranchPlan {
    /// Directory name, and later the Hub revision.
    pub name: String,
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
    /// What a budget gave single linears, by module.
    #[serde(skip)]
    pub picked: BTreeMap<String, Choice>,
    /// Reason for smaller groups than the default.
    #[serde(skip)]
    pub group_note: Option<String>,
    /// Settings of single linears, as the recipe has them.
    pub overrides: Vec<ModuleOverride>,
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

impl fmt::Display for ColumnOrder {
    /// Formats the order within a one-line summary of settings.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.desc_act, self.static_groups) {
            (true, false) => "act order",
            (true, true) => "act order with static groups",
            (false, true) => "no act order, static groups",
            (false, false) => "no act order",
        })
    }
}

impl ColumnOrder {
    /// Formats the order for a column headed "act order".
    pub fn cell(self) -> &'static str {
        match (self.desc_act, self.static_groups) {
            (true, false) => "yes",
            (true, true) => "static",
            (false, _) => "no",
        }
    }
}

impl BranchPlan {
    /// Returns the solving order of its columns and the kind of groups.
    pub fn order(&self) -> ColumnOrder {
        ColumnOrder {
            desc_act: self.desc_act,
            static_groups: self.static_groups,
        }
    }

    /// Resolves `branch` over the recipe's defaults and checks it against the model's shapes.
    pub(crate) fn new(
        recipe: &Recipe,
        branch: &Spanned<Branch>,
        config: &ModelConfig,
    ) -> Result<BranchPlan, RecipeError> {
        let place = branch;
        let branch = branch.get_ref();
        let defaults = &recipe.file.defaults;
        check_name(branch.name.get_ref()).map_err(|why| recipe.refuse(&branch.name, why))?;

        let budget = Budget::of(recipe, branch)?;
        let bits = branch.bits.as_ref().or(defaults.bits.as_ref());
        let bits = match (bits, &budget) {
            (Some(bits), _) => *bits.get_ref(),
            (None, Some((budget, _))) => budget.width(),
            (None, None) => {
                let reason = "bits is set neither here nor in [defaults]; valid are 2, 3, 4, 8";
                return Err(recipe.refuse(place, reason));
            }
        };
        let named = branch.group_size.as_ref().or(defaults.group_size.as_ref());
        let default_group = Spanned::new(place.span(), GroupSize::Columns(DEFAULT_GROUPS[0]));
        let group_size = named.unwrap_or(&default_group);
        let damp = branch
            .damp_percent
            .as_ref()
            .or(defaults.damp_percent.as_ref());
        let damp_percent = match damp {
            None => 0.1,
            Some(damp) if (0.0..=1.0).contains(damp.get_ref()) => *damp.get_ref(),
            Some(damp) => {
                let reason = format!("damp_percent = {} is not between 0 and 1", damp.get_ref());
                return Err(recipe.refuse(damp, reason));
            }
        };
        let preset = branch.preset.or(defaults.preset).unwrap_or_default();
        let order = ColumnOrder::of(
            branch.desc_act.or(defaults.desc_act),
            branch.static_groups.or(defaults.static_groups),
        );
        let mut plan = BranchPlan {
            name: branch.name.get_ref().clone(),
            bits,
            group_size: *group_size.get_ref(),
            desc_act: order.desc_act,
            static_groups: order.static_groups,
            sym: branch.sym.or(defaults.sym).unwrap_or(true),
            damp_percent,
            true_sequential: branch
                .true_sequential
                .or(defaults.true_sequential)
                .unwrap_or(true),
            preset,
            // With a budget, some linear layers may have few bits.
            method: method(
                recipe,
                branch,
                preset.method(match budget {
                    Some(_) => Bits::Three,
                    None => bits,
                }),
            )?,
            budget: budget.as_ref().map(|(budget, _)| budget.clone()),
            allocation: None,
            picked: BTreeMap::new(),
            group_note: None,
            overrides: Vec::new(),
        };
        if named.is_none() && budget.is_none() {
            plan.choose_groups(branch, config);
        }
        for own in &branch.overrides {
            plan.add_override(recipe, own, config)?;
        }
        let linears = plan.planned_linears(config);
        for linear in &linears {
            let (module, (n_in, n_out)) = (&linear.module, linear.shape);
            if n_in % 32 != 0 || n_out % 32 != 0 {
                let reason = format!(
                    "{module} is {n_in} x {n_out}: packing needs multiples of 32; skip it with an override"
                );
                return Err(recipe.refuse(place, reason));
            }
            // An override's own group size was checked when it was added.
            let size = linear.settings.group_size;
            if budget.is_none() && !size.divides(n_in) {
                return Err(recipe.refuse(group_size, group_reason(size, module, n_in)));
            }
        }
        if linears.is_empty() {
            return Err(recipe.refuse(
                place,
                "its overrides skip every linear layer; nothing is left to quantize",
            ));
        }
        if let Some((budget, at)) = &budget {
            plan.check_budget(recipe, (budget, at), config)?;
        }
        plan.quantize_config("", config)
            .check_patterns()
            .map_err(|why| {
                let remedy = "use the same settings for more linear layers, or fewer overrides";
                recipe.refuse(place, format!("its overrides: {why}; {remedy}"))
            })?;
        Ok(plan)
    }

    /// Chooses the largest default group size that divides the inputs of every linear layer that
    /// uses it. If none does, the codes cannot be packed either.
    fn choose_groups(&mut self, branch: &Branch, config: &ModelConfig) {
        let takes = |module: &str| {
            let mut own = branch.overrides.iter();
            let own = own.find(|own| matches(own.pattern.get_ref(), module));
            own.is_none_or(|own| !own.skip && own.group_size.is_none())
        };
        let inputs: Vec<(String, usize)> = linears(config)
            .map(|(layer, _, linear)| (linear.module(layer), linear.in_features))
            .filter(|(module, _)| takes(module))
            .collect();
        let mut wider = None;
        for size in DEFAULT_GROUPS {
            self.group_size = GroupSize::Columns(size);
            self.group_note = wider.map(|(wider, (module, n_in)): (usize, &(String, usize))| {
                format!(
                    "groups of {size}, as {wider} does not divide the {n_in} inputs of {module}"
                )
            });
            match inputs.iter().find(|(_, n_in)| !n_in.is_multiple_of(size)) {
                Some(odd) => wider = Some((size, odd)),
                None => return,
            }
        }
    }

    fn add_override(
        &mut self,
        recipe: &Recipe,
        own: &Override,
        config: &ModelConfig,
    ) -> Result<(), RecipeError> {
        let pattern = own.pattern.get_ref();
        let matched: Vec<(String, usize)> = linears(config)
            .map(|(layer, _, linear)| (linear.module(layer), linear.in_features))
            .filter(|(module, _)| matches(pattern, module))
            .collect();
        if matched.is_empty() {
            let last = config.block(0).linears().last();
            let reason = format!(
                "match = {pattern:?} matches no linear layer; names are like {:?}, and * stands for anything",
                last.map(|linear| linear.module(0)).unwrap_or_default()
            );
            return Err(recipe.refuse(&own.pattern, reason));
        }
        // Written configs store settings by pattern, so a second one would replace the first.
        if self.overrides.iter().any(|o| o.pattern == *pattern) {
            let reason = format!(
                "match = {pattern:?} is used twice, and only the first matching override counts; merge \
                 them"
            );
            return Err(recipe.refuse(&own.pattern, reason));
        }
        if own.skip && (own.bits.is_some() || own.group_size.is_some()) {
            return Err(recipe.refuse(
                &own.pattern,
                "skip = true cannot be combined with bits or group_size; keep one",
            ));
        }
        let group_size = own
            .group_size
            .as_ref()
            .map_or(self.group_size, |g| *g.get_ref());
        if !own.skip {
            for (module, n_in) in &matched {
                if !group_size.divides(*n_in) {
                    let reason = group_reason(group_size, module, *n_in);
                    return Err(match &own.group_size {
                        Some(at) => recipe.refuse(at, reason),
                        None => recipe.refuse(&own.pattern, reason),
                    });
                }
            }
        }
        let bits = own.bits.as_ref().map_or(self.bits, |b| *b.get_ref());
        self.overrides.push(ModuleOverride {
            pattern: pattern.clone(),
            settings: (!own.skip).then_some((bits, group_size)),
        });
        Ok(())
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

/// Maximum number of refinement passes in a recipe.
const MAX_PASSES: usize = 100;

/// Applies single options of the branch, or else of the defaults, to `preset`.
fn method(recipe: &Recipe, branch: &Branch, preset: Method) -> Result<Method, RecipeError> {
    let defaults = &recipe.file.defaults;
    let mut method = preset;
    if let Some(search) = branch.scale_search.or(defaults.scale_search) {
        method.scale_search = search;
    }
    if let Some(passes) = branch.refine.as_ref().or(defaults.refine.as_ref()) {
        method.refine = *passes.get_ref();
        if method.refine > MAX_PASSES {
            let reason = format!(
                "refine = {} is more than {MAX_PASSES} passes",
                method.refine
            );
            return Err(recipe.refuse(passes, reason));
        }
    }
    let own = one_spelling(recipe, &branch.mismatch_correction, &branch.asymmetric)?;
    let default = one_spelling(recipe, &defaults.mismatch_correction, &defaults.asymmetric)?;
    if let Some((key, strength)) = own.or(default) {
        let value = *strength.get_ref();
        if !(0.0..=1.0).contains(&value) {
            let reason = format!("{key} = {value} is not between 0 and 1");
            return Err(recipe.refuse(strength, reason));
        }
        method.mismatch_correction = value;
    }
    Ok(method)
}

/// The key `mismatch_correction` with its value, in either spelling.
fn one_spelling<'a>(
    recipe: &Recipe,
    new: &'a Option<Spanned<f64>>,
    old: &'a Option<Spanned<f64>>,
) -> Result<Option<(&'static str, &'a Spanned<f64>)>, RecipeError> {
    match (new, old) {
        (Some(_), Some(old)) => {
            let reason = "asymmetric is the old name of mismatch_correction; remove one of them";
            Err(recipe.refuse(old, reason))
        }
        (Some(new), None) => Ok(Some(("mismatch_correction", new))),
        (None, Some(old)) => Ok(Some(("asymmetric", old))),
        (None, None) => Ok(None),
    }
}

fn group_reason(group_size: GroupSize, module: &str, n_in: usize) -> String {
    let valid: Vec<String> = [32, 64, 128, 256, 512, 1024]
        .into_iter()
        .filter(|g| n_in.is_multiple_of(*g))
        .map(|g| g.to_string())
        .collect();
    format!(
        "group_size = {group_size} does not divide the {n_in} inputs of {module}; valid are -1, {}",
        valid.join(", ")
    )
}

/// Iterates over the model's linear layers in order, with the indices of block and layer.
fn linears(config: &ModelConfig) -> impl Iterator<Item = (usize, usize, &LinearSpec)> {
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
