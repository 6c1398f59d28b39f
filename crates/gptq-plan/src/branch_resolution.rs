//! Resolves a branch of a recipe over the defaults, and checks it against the model's shapes.

use std::collections::BTreeMap;

use gptq_format::{Bits, FormatName, GroupSize, Half};
use gptq_spec::ModelConfig;
use toml::Spanned;

use crate::branch_plan::linears;
use crate::pattern::matches;
use crate::recipe_file::{BranchTable, OverrideTable};
use crate::{
    BranchFiles, BranchPlan, ColumnOrder, Method, ModuleOverride, Recipe, RecipeError, budget,
    check_name,
};

/// Group sizes that are tried if a recipe sets none, the most common first.
pub(crate) const DEFAULT_GROUPS: [usize; 3] = [128, 64, 32];

/// Resolves `branch` over the recipe's defaults and checks it against the model's shapes.
pub(crate) fn resolve(
    recipe: &Recipe,
    branch: &Spanned<BranchTable>,
    config: &ModelConfig,
) -> Result<BranchPlan, RecipeError> {
    let place = branch;
    let branch = branch.get_ref();
    let defaults = &recipe.file.defaults;
    check_name(branch.name.get_ref()).map_err(|why| recipe.refuse(&branch.name, why))?;

    let budget = budget::read(recipe, branch)?;
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
        format: branch.format.or(defaults.format).unwrap_or_default(),
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
        choose_groups(&mut plan, branch, config);
    }
    for own in &branch.overrides {
        add_override(&mut plan, recipe, own, config)?;
    }
    let (linears, format) = (plan.planned_linears(config), plan.layout());
    for linear in &linears {
        let (module, (n_in, n_out)) = (&linear.module, linear.shape);
        let stored = linear.stored();
        if let Err(refusal) = format.fits(&stored, plan.grids(&stored)) {
            let reason = format!("{module} is {n_in} x {n_out}: {refusal}");
            return Err(recipe.refuse(place, reason));
        }
        // An override's own group size was checked when it was added.
        let size = linear.settings.group_size;
        if budget.is_none() && !size.divides(n_in) {
            return Err(recipe.refuse(group_size, group_reason(size, module, n_in)));
        }
    }
    if plan.method.tune > 0 && config.blocks().iter().any(|block| block.has_experts()) {
        let reason = "mixtures of experts are not tuned; use preset = \"best\", or tune = 0";
        return Err(match branch.tune.as_ref().or(defaults.tune.as_ref()) {
            Some(steps) => recipe.refuse(steps, reason),
            None => recipe.refuse(place, reason),
        });
    }
    if linears.is_empty() {
        return Err(recipe.refuse(
            place,
            "its overrides skip every linear layer; nothing is left to quantize",
        ));
    }
    if plan.format == FormatName::Gguf {
        if let Some((_, at)) = &budget {
            let reason = "a size budget is for AutoGPTQ's tensors, and a GGUF file has no fewer bits for 2 and 3 than for 4; \
                          leave format out, and run gptq export --to gguf";
            return Err(recipe.refuse(at, reason));
        }
        let layout = BranchFiles::of(&plan, config).gguf(Half::F16);
        layout.map_err(|reason| recipe.refuse(place, reason))?;
    }
    if let Some((budget, at)) = &budget {
        budget::check(&plan, recipe, (budget, at), config)?;
    }
    BranchFiles::of(&plan, config)
        .quantize_config("")
        .check_patterns()
        .map_err(|why| {
            let remedy = "use the same settings for more linear layers, or fewer overrides";
            recipe.refuse(place, format!("its overrides: {why}; {remedy}"))
        })?;
    Ok(plan)
}

/// Chooses the largest default group size that divides the inputs of every linear layer that
/// uses it. If none does, the codes cannot be packed either.
fn choose_groups(plan: &mut BranchPlan, branch: &BranchTable, config: &ModelConfig) {
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
        plan.group_size = GroupSize::Columns(size);
        plan.group_note = wider.map(|(wider, (module, n_in)): (usize, &(String, usize))| {
            format!("groups of {size}, as {wider} does not divide the {n_in} inputs of {module}")
        });
        match inputs.iter().find(|(_, n_in)| !n_in.is_multiple_of(size)) {
            Some(odd) => wider = Some((size, odd)),
            None => return,
        }
    }
}

fn add_override(
    plan: &mut BranchPlan,
    recipe: &Recipe,
    own: &OverrideTable,
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
    if plan.overrides.iter().any(|o| o.pattern == *pattern) {
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
        .map_or(plan.group_size, |g| *g.get_ref());
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
    let bits = own.bits.as_ref().map_or(plan.bits, |b| *b.get_ref());
    plan.overrides.push(ModuleOverride {
        pattern: pattern.clone(),
        settings: (!own.skip).then_some((bits, group_size)),
    });
    Ok(())
}

/// Maximum number of refinement passes in a recipe.
const MAX_PASSES: usize = 100;

/// Maximum number of steps of tuning in a recipe.
const MAX_STEPS: usize = 10_000;

/// Applies single options of the branch, or else of the defaults, to `preset`.
fn method(recipe: &Recipe, branch: &BranchTable, preset: Method) -> Result<Method, RecipeError> {
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
    if let Some(steps) = branch.tune.as_ref().or(defaults.tune.as_ref()) {
        method.tune = *steps.get_ref();
        if method.tune > MAX_STEPS {
            let reason = format!("tune = {} is more than {MAX_STEPS} steps", method.tune);
            return Err(recipe.refuse(steps, reason));
        }
    }
    if let Some(experts) = branch.experts.or(defaults.experts) {
        method.experts = experts;
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
