//! A size budget: a limit on a branch's bits per weight, kept by mixed-precision allocation.
//!
//! Bits per weight count the files: the four tensors of every quantized linear layer, `qweight`,
//! `qzeros`, `scales` and `g_idx`, over the weights they represent. Unquantized layers do not
//! count. Layers that an override names have its settings, and count.
//!
//! Layers that share an input share a setting: clients fuse `q`, `k` and `v`, and `gate` and `up`.

use std::collections::BTreeMap;

use gptq_format::{Bits, GroupSize, LinearShape};
use gptq_spec::{LinearSpec, ModelConfig};
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::allocate::{Cost, allocate};
use crate::recipe::Branch;
use crate::{BranchPlan, Recipe, RecipeError};

/// Default group sizes to choose from, each with every code width.
const GROUP_SIZES: [usize; 3] = [32, 64, 128];

/// A setting to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Code width.
    pub bits: Bits,
    /// Columns per group.
    pub group_size: GroupSize,
}

/// Budget of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Budget {
    /// Limit on the bits per weight.
    pub bits: f64,
    /// Distinct settings to choose from.
    pub choices: Vec<Choice>,
}

/// Mixed-precision allocation of a budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Allocation {
    /// Limit on the bits per weight.
    pub budget_bits: f64,
    /// Bits per weight of all quantized linear layers.
    pub mean_bits: f64,
    /// Settings to choose from.
    pub choices: Vec<Choice>,
    /// Linear layers with a common setting.
    pub groups: Vec<AllocatedGroup>,
}

/// Linear layers of one block that share their input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocatedGroup {
    /// Block index.
    pub layer: usize,
    /// Names within the block.
    pub linears: Vec<String>,
    /// Effect of each choice on the block's output, averaged over tokens, if only these layers have
    /// it: `‖ŷ - y‖² / ‖y‖²` on the dense model's states. `None` if it does not fit their shape.
    pub losses: Vec<Option<f64>>,
    /// Index of the chosen setting.
    pub choice: usize,
}

/// Linear layers that get the same setting.
#[derive(Clone, Debug, PartialEq)]
pub struct OpenGroup {
    /// Block index.
    pub layer: usize,
    /// The tap whose input its linears share.
    pub tap: usize,
    /// Linears that get one choice together.
    pub linears: Vec<LinearSpec>,
}

impl Allocation {
    /// Returns the number of linear layers per choice, in the choices' order, without unused
    /// choices.
    pub fn counts(&self) -> Vec<(Choice, usize)> {
        let given = |at: usize| {
            let groups = self.groups.iter().filter(move |group| group.choice == at);
            groups.map(|group| group.linears.len()).sum()
        };
        let choices = self.choices.iter().enumerate();
        let counts = choices.map(|(at, choice)| (*choice, given(at)));
        counts.filter(|(_, linears)| *linears > 0).collect()
    }
}

impl Budget {
    /// Returns the budget of `branch` or else of the defaults, and its place in the recipe.
    pub(crate) fn of<'a>(
        recipe: &'a Recipe,
        branch: &'a Branch,
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

    /// Returns the default width of overrides: the widest codes within the budget.
    pub(crate) fn width(&self) -> Bits {
        let within = Bits::ALL.into_iter().rev();
        let mut within = within.filter(|bits| bits.get() as f64 <= self.bits);
        within.next().unwrap_or(Bits::Two)
    }
}

impl BranchPlan {
    /// Returns true if the settings of some linear layers are still to be determined.
    pub fn is_open(&self) -> bool {
        self.budget.is_some() && self.allocation.is_none()
    }

    /// Returns the groups of linear layers that the budget decides on, in model order.
    pub fn open_groups(&self, config: &ModelConfig) -> Vec<OpenGroup> {
        let mut open = Vec::new();
        for (layer, block) in config.blocks().iter().enumerate() {
            for tap in block.taps() {
                let linears = block.linears()[block.linears_of(tap)].iter();
                let free = |linear: &&LinearSpec| self.overriding(&linear.module(layer)).is_none();
                let linears: Vec<LinearSpec> = linears.filter(free).cloned().collect();
                if !linears.is_empty() {
                    open.push(OpenGroup {
                        layer,
                        tap,
                        linears,
                    });
                }
            }
        }
        open
    }

    /// Refuses a budget outside the range of its choices, or one that leaves nothing to choose.
    pub(crate) fn check_budget(
        &self,
        recipe: &Recipe,
        (budget, at): (&Budget, &Spanned<f64>),
        config: &ModelConfig,
    ) -> Result<(), RecipeError> {
        let groups = self.open_groups(config);
        if groups.is_empty() {
            return Err(recipe.refuse(
                at,
                "its overrides match every linear layer; nothing is left to choose",
            ));
        }
        let mut range = [self.fixed_bits(config); 2];
        for group in &groups {
            let sizes = || group.sizes(&budget.choices).into_iter().flatten();
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
        let asked = self.budget_total(budget, config);
        if !(range[0]..=range[1]).contains(&asked) {
            let weights = self.weights(config) as f64;
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
    pub(crate) fn weights(&self, config: &ModelConfig) -> u64 {
        let linears = self.linears(config);
        linears.iter().map(LinearShape::weights).sum()
    }

    /// Returns the bits of linear layers whose settings come from an override.
    pub(crate) fn fixed_bits(&self, config: &ModelConfig) -> u64 {
        let linears = self.planned_linears(config).into_iter();
        let fixed = linears.filter(|linear| self.overriding(&linear.module).is_some());
        fixed.map(|linear| linear.stored().stored_bits()).sum()
    }

    /// Returns the limit on the bits of all quantized linear layers.
    pub(crate) fn budget_total(&self, budget: &Budget, config: &ModelConfig) -> u64 {
        (budget.bits * self.weights(config) as f64).floor() as u64
    }

    /// Allocates the budget, given the `losses` of each of [`BranchPlan::open_groups`] by choice.
    pub fn spend(&self, budget: &Budget, losses: &[Vec<f64>], config: &ModelConfig) -> Allocation {
        let groups = self.open_groups(config);
        let costs: Vec<Vec<Option<Cost>>> = (groups.iter().zip(losses))
            .map(|(group, losses)| {
                let sizes = group.sizes(&budget.choices).into_iter();
                let costs = sizes.zip(losses);
                costs
                    .map(|(size, &loss)| size.map(|size| Cost { size, loss }))
                    .collect()
            })
            .collect();
        let fixed = self.fixed_bits(config);
        let left = self.budget_total(budget, config).saturating_sub(fixed);
        let picked = allocate(&costs, left).expect("the plan checked that the least fits");
        let chosen = costs.iter().zip(&picked);
        let size: u64 = chosen
            .filter_map(|(costs, &at)| Some(costs[at]?.size))
            .sum();
        let groups = groups.into_iter().zip(costs).zip(picked);
        Allocation {
            budget_bits: budget.bits,
            mean_bits: (fixed + size) as f64 / self.weights(config) as f64,
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
    pub fn settled(&self, allocation: &Allocation, config: &ModelConfig) -> Option<BranchPlan> {
        let budget = self.budget.as_ref()?;
        let open = self.open_groups(config);
        if allocation.choices != budget.choices || allocation.groups.len() != open.len() {
            return None;
        }
        let mut branch = self.clone();
        let mut counts: BTreeMap<Choice, usize> = BTreeMap::new();
        for (group, found) in open.iter().zip(&allocation.groups) {
            let choice = *budget.choices.get(found.choice)?;
            let names = group.linears.iter().map(|it| it.name.as_str());
            if found.layer != group.layer || !names.eq(found.linears.iter()) {
                return None;
            }
            *counts.entry(choice).or_default() += group.linears.len();
            let modules = group.linears.iter().map(|it| it.module(group.layer));
            branch.picked.extend(modules.map(|module| (module, choice)));
        }
        let narrowest = counts.keys().next()?.bits;
        let narrow = counts
            .into_iter()
            .filter(|(choice, _)| choice.bits == narrowest);
        let (base, _) = narrow.max_by_key(|&(choice, count)| (count, choice))?;
        (branch.bits, branch.group_size) = (base.bits, base.group_size);
        branch.allocation = Some(allocation.clone());
        Some(branch)
    }
}

impl Choice {
    /// Returns the bits of a linear layer with this setting.
    fn stored_bits(self, linear: &LinearSpec) -> u64 {
        let stored = LinearShape {
            in_features: linear.in_features,
            out_features: linear.out_features,
            bits: self.bits,
            group_size: self.group_size,
        };
        stored.stored_bits()
    }
}

impl OpenGroup {
    /// Returns the bits with each choice; `None` if its groups do not divide the inputs.
    pub(crate) fn sizes(&self, choices: &[Choice]) -> Vec<Option<u64>> {
        let size = |choice: &Choice| {
            let n_in = self.linears[0].in_features;
            let bits = self.linears.iter().map(|linear| choice.stored_bits(linear));
            choice.group_size.divides(n_in).then(|| bits.sum())
        };
        choices.iter().map(size).collect()
    }
}
