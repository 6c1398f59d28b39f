//! `gptq plan`.

use anyhow::Result;
use gptq_model::ModelConfig;
use gptq_pipeline::Plan;

use crate::cli::{PlanArgs, warn};
use crate::hub::{self, Need};
use crate::{size, table};

pub(crate) fn run(args: PlanArgs) -> Result<()> {
    let recipe = args.recipe.load(None)?;
    let plan = match args.model_config {
        Some(path) => Plan::for_config(&recipe, ModelConfig::read(&path)?)?,
        None => Plan::new(&recipe, &hub::fetch(&recipe, Need::Shapes, false)?)?,
    };
    warn(&plan);
    print(&plan);
    Ok(())
}

/// Sizes, memory and clients, from shapes alone.
pub(crate) fn print(plan: &Plan) {
    let config = &plan.config;
    println!(
        "{}: {:.2} million parameters, {} layers",
        plan.model_name,
        config.parameters() as f64 / 1e6,
        config.layers
    );
    println!(
        "calibration: {} windows of {} = {} tokens",
        plan.calibration.samples,
        plan.calibration.seq_len,
        plan.tokens()
    );
    let memory = plan.memory();
    println!(
        "peak memory: {} on the device and {} on the host with CUDA, {} on the host without",
        size::binary(memory.device),
        size::binary(memory.host),
        size::binary(memory.cpu)
    );
    let mut rows = vec![
        [
            "branch",
            "bits",
            "group",
            "act order",
            "damp",
            "size",
            "loads in",
        ]
        .map(String::from)
        .to_vec(),
    ];
    for branch in &plan.branches {
        let support = branch.clients(config);
        let loads: Vec<&str> = support
            .iter()
            .filter(|s| s.verdict.is_ok())
            .map(|s| s.client.name())
            .collect();
        rows.push(vec![
            branch.name.clone(),
            branch.bits.to_string(),
            branch.group_size.to_string(),
            if branch.desc_act { "yes" } else { "no" }.to_owned(),
            branch.damp_percent.to_string(),
            size::decimal(branch.bytes(config) as u64),
            loads.join(", "),
        ]);
    }
    println!("\n{}", table::render(&rows).trim_end());
    for branch in &plan.branches {
        for support in branch.clients(config) {
            if let Err(why) = support.verdict {
                println!("{}: not in {}: {why}", branch.name, support.client.name());
            }
        }
    }
}
