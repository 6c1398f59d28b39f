//! Any text as a recipe, planned against a small model's shapes.
#![no_main]

use std::path::Path;

use gptq_fuzz::small_model;
use gptq_plan::{Plan, Recipe};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(recipe) = Recipe::parse(Path::new("recipe.toml"), text.to_owned()) else {
        return;
    };
    let config = small_model();
    if let Ok(plan) = Plan::for_config(&recipe, config.clone()) {
        assert!(plan.tokens() > 0);
        let memory = plan.memory();
        assert!(memory.device > memory.states && memory.cpu > memory.states);
        for branch in &plan.branches {
            assert!(branch.bytes(&config) > 0);
            assert!(!branch.clients(&config).is_empty());
            let written = branch.quantize_config(&plan.model_name, &config);
            for linear in branch.planned_linears(&config) {
                let (module, own) = (linear.module, linear.settings);
                // Settings declared to clients for a module equal those of the solver.
                let told = written.module(&module).expect("the pattern is ours");
                assert_eq!(told, Some((own.bits, own.group_size)), "{module}");
            }
        }
    }
});
