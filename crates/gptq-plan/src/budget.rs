//! A size budget: a limit on a branch's bits per weight, kept by mixed-precision allocation.
//!
//! Bits per weight count the files: the four tensors of every quantized linear layer, `qweight`,
//! `qzeros`, `scales` and `g_idx`, over the weights they represent. Unquantized layers do not
//! count. Layers that an override names have its settings, and count.
//!
//! Layers that share an input share a setting: clients fuse `q`, `k` and `v`, and `gate` and `up`. So do all experts of
//! a block.

use std::collections::BTreeMap;
use std::ops::Range;

use gptq_format::{Bits, GroupSize, OutputFormat};
use gptq_spec::{LinearSpec, ModelConfig};
use toml::Spanned;

use crate::allocate::{Cost, allocate};
use crate::recipe_file::BranchTable;
use crate::{AllocatedGroup, Allocation, BranchPlan, Budget, Choice, Recipe, RecipeError};

/// Default group sizes to choose from, each with every code width.
const GROUP_SIZES: [usize; 3] = [32, 64, 128];

/// Linear layers that get the same setting.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenGroup {
    /// Block index.
    pub layer: usize,
    /// The taps whose inputs its linears take: one, or those of a block's experts.
    pub taps: Range<usize>,
    /// Linears that get one choice together.
    pub linears: Vec<LinearSpec>,
}

/// Returns the budget of `branch` or else of the defaults, and its place in the recipe.
pub(crate) fn read<'a>(
    recipe: &'a Recipe,
    branch: &'a BranchTable,
) -> Result<Option<(Budget, &'a Spanned<f64>)>, RecipeError> {
    let defaults = &recipe.file.defaults;
    let named = (branch.budget_choices.as_ref()).or(defaults.budget_choices.as_ref());
    let Some(at) = branch
        .budget_bits
        .as_ref()
        .or(defaults.budget_bits.as_ref())
    else {
        return match &branch.budget_choices {
            Some(at) => Err(recipe.refuse(at, "budget_choices requires budget_bits")),
            None => Ok(None),
        };
    };
    let choices = match named {
        Some(named) => {
            let mut choices = named.get_ref().clone();
            choices.sort();
            choices.dedup();
            if choices.len() < 2 {
                return Err(recipe.refuse(named, "budget_choices needs two settings or more"));
            }
            choices
        }
        None => (Bits::ALL.into_iter())
            .flat_map(|bits| {
                GROUP_SIZES.map(|size| Choice {
                    bits,
                    group_size: GroupSize::Columns(size),
                })
            })
            .collect(),
    };
    let bits = *at.get_ref();
    Ok(Some((Budget { bits, choices }, at)))
}

/// Returns the groups of linear layers that the budget decides on, in model order.
pub fn open_groups(branch: &BranchPlan, config: &ModelConfig) -> Vec<OpenGroup> {
    let mut open = Vec::new();
    for (layer, block) in config.blocks().iter().enumerate() {
        for taps in block.settings_groups() {
            let linears = taps
                .clone()
                .flat_map(|tap| &block.linears()[block.linears_of(tap)]);
            let free = |linear: &&LinearSpec| branch.overriding(&linear.module(layer)).is_none();
            let linears: Vec<LinearSpec> = linears.filter(free).cloned().collect();
            if !linears.is_empty() {
                open.push(OpenGroup {
                    layer,
                    taps,
                    linears,
                });
            }
        }
    }
    open
}

/// Refuses a budget outside the range of its choices, or one that leaves nothing to choose.
pub(crate) fn check(
    branch: &BranchPlan,
    recipe: &Recipe,
    (budget, at): (&Budget, &Spanned<f64>),
    config: &ModelConfig,
) -> Result<(), RecipeError> {
    let (groups, format) = (open_groups(branch, config), branch.layout());
    if groups.is_empty() {
        return Err(recipe.refuse(
            at,
            "its overrides match every linear layer; nothing is left to choose",
        ));
    }
    let mut range = [fixed_bits(branch, config); 2];
    for group in &groups {
        let sizes = || {
            let sizes = group.sizes(&budget.choices, &*format);
            sizes.into_iter().flatten()
        };
        let (Some(least), Some(most)) = (sizes().min(), sizes().max()) else {
            let first = &group.linears[0];
            let (n_in, module) = (first.in_features, first.module(group.layer));
            let reason = format!(
                "none of the group sizes divides the {n_in} inputs of {module}; name others \
                 with budget_choices, or cover that linear layer with an override"
            );
            return Err(recipe.refuse(at, reason));
        };
        range = [range[0] + least, range[1] + most];
    }
    let asked = total(branch, budget, config);
    if !(range[0]..=range[1]).contains(&asked) {
        let weights = weights(branch, config) as f64;
        let [least, most] = range.map(|bits| bits as f64 / weights);
        let reason = format!(
            "budget_bits = {} is not between {:.3} and {:.3}, the range of this branch's choices per \
             weight with their scales, zero points and g_idx",
            budget.bits,
            // Rounded inwards, so that the printed limits are valid.
            (least * 1e3).ceil() / 1e3,
            (most * 1e3).floor() / 1e3
        );
        return Err(recipe.refuse(at, reason));
    }
    Ok(())
}

/// Returns the number of weights of all quantized linear layers.
fn weights(branch: &BranchPlan, config: &ModelConfig) -> u64 {
    let linears = branch.planned_linears(config).into_iter();
    linears.map(|it| it.stored().weights()).sum()
}

/// Returns the bits of linear layers whose settings come from an override.
fn fixed_bits(branch: &BranchPlan, config: &ModelConfig) -> u64 {
    let linears = branch.planned_linears(config).into_iter();
    let fixed = linears.filter(|linear| branch.overriding(&linear.module).is_some());
    let format = branch.layout();
    fixed
        .map(|linear| format.stored_bits(&linear.stored()))
        .sum()
}

/// Returns the limit on the bits of all quantized linear layers.
pub(crate) fn total(branch: &BranchPlan, budget: &Budget, config: &ModelConfig) -> u64 {
    (budget.bits * weights(branch, config) as f64).floor() as u64
}

/// Allocates the budget, given the `losses` of each of [`open_groups`] by choice.
pub fn spend_budget(
    branch: &BranchPlan,
    budget: &Budget,
    losses: &[Vec<f64>],
    config: &ModelConfig,
) -> Allocation {
    let (groups, format) = (open_groups(branch, config), branch.layout());
    let costs: Vec<Vec<Option<Cost>>> = (groups.iter().zip(losses))
        .map(|(group, losses)| {
            let sizes = group.sizes(&budget.choices, &*format).into_iter();
            let costs = sizes.zip(losses);
            costs
                .map(|(size, &loss)| size.map(|size| Cost { size, loss }))
                .collect()
        })
        .collect();
    let fixed = fixed_bits(branch, config);
    let left = total(branch, budget, config).saturating_sub(fixed);
    let picked = allocate(&costs, left).expect("the plan checked that the least fits");
    let chosen = costs.iter().zip(&picked);
    let size: u64 = chosen
        .filter_map(|(costs, &at)| Some(costs[at]?.size))
        .sum();
    let groups = groups.into_iter().zip(costs).zip(picked);
    Allocation {
        budget_bits: budget.bits,
        mean_bits: (fixed + size) as f64 / weights(branch, config) as f64,
        choices: budget.choices.clone(),
        groups: groups
            .map(|((group, costs), choice)| AllocatedGroup {
                layer: group.layer,
                linears: group.linears.into_iter().map(|it| it.name).collect(),
                losses: costs
                    .iter()
                    .map(|cost| cost.map(|cost| cost.loss))
                    .collect(),
                choice,
            })
            .collect(),
    }
}

/// Returns the branch with its allocation applied. Its own settings become the most common ones
/// of its narrowest layers: a branch with any layer of 2 or 3 bits must not look to vLLM as if
/// its 4-bit kernels sufficed.
///
/// `None` if `allocation` does not belong to this branch.
pub fn apply_allocation(
    branch: &BranchPlan,
    allocation: &Allocation,
    config: &ModelConfig,
) -> Option<BranchPlan> {
    let budget = branch.budget.as_ref()?;
    let open = open_groups(branch, config);
    if allocation.choices != budget.choices || allocation.groups.len() != open.len() {
        return None;
    }
    let mut settled = branch.clone();
    let mut counts: BTreeMap<Choice, usize> = BTreeMap::new();
    for (group, found) in open.iter().zip(&allocation.groups) {
        let choice = *budget.choices.get(found.choice)?;
        let names = group.linears.iter().map(|it| it.name.as_str());
        if found.layer != group.layer || !names.eq(found.linears.iter()) {
            return None;
        }
        *counts.entry(choice).or_default() += group.linears.len();
        let modules = group.linears.iter().map(|it| it.module(group.layer));
        settled
            .picked
            .extend(modules.map(|module| (module, choice)));
    }
    let narrowest = counts.keys().next()?.bits;
    let narrow = counts
        .into_iter()
        .filter(|(choice, _)| choice.bits == narrowest);
    let (base, _) = narrow.max_by_key(|&(choice, count)| (count, choice))?;
    (settled.bits, settled.group_size) = (base.bits, base.group_size);
    settled.allocation = Some(allocation.clone());
    Some(settled)
}

impl OpenGroup {
    /// Returns the bits with each choice; `None` if its groups do not divide the inputs.
    pub(crate) fn sizes(&self, choices: &[Choice], format: &dyn OutputFormat) -> Vec<Option<u64>> {
        let size = |choice: &Choice| {
            let linears = || self.linears.iter();
            let fits = linears().all(|linear| choice.group_size.divides(linear.in_features));
            let bits = linears().map(|linear| choice.stored_bits(linear, format));
            fits.then(|| bits.sum())
        };
        choices.iter().map(size).collect()
    }
}
