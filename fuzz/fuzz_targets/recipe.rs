//! Any text as a recipe, planned against a small model's shapes.
#![no_main]

use std::path::Path;

use gptq_fuzz::small_model;
use gptq_plan::{BranchFiles, Memory, Plan, Recipe};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(recipe) = Recipe::parse(Path::new("recipe.toml"), text.to_owned()) else {
        return;
    };
    let config = small_model();
    if let Ok(plan) = Plan::for_config(&recipe, config.clone()) {
        assert!(plan.tokens() > 0);
        let memory = Memory::of(&plan);
        assert!(memory.device > memory.states && memory.cpu > memory.states);
        for branch in &plan.branches {
            assert!(BranchFiles::of(branch, &config).bytes() > 0);
            assert!(!BranchFiles::of(branch, &config).clients().is_empty());
            let written = BranchFiles::of(branch, &config).quantize_config(&plan.model_name);
            for linear in branch.planned_linears(&config) {
                let (module, own) = (linear.module, linear.settings);
                // Settings declared to clients for a module equal those of the solver.
                let told = written.module(&module).expect("the pattern is ours");
                assert_eq!(told, Some((own.bits, own.group_size)), "{module}");
            }
        }
    }
});
