//! `gptq plan`.

use anyhow::Result;
use gptq_export::check_tokenizer;
use gptq_format::Support;
use gptq_plan::{
    BranchFiles, Look, Memory, Plan, RankDevice, Scaling, Weights, check_texts, tokenizer_note,
};
use gptq_spec::ModelConfig;
use serde_json::{Value, json};

use crate::cli::{PlanArgs, warn};
use crate::hub::{self, Need};
use crate::{size, table};

pub(crate) fn run(args: PlanArgs) -> Result<()> {
    let recipe = args.recipe.load(None, args.model_config.as_deref())?;
    let plan = match args.model_config {
        Some(path) => {
            let mut plan = Plan::for_config(&recipe, ModelConfig::read(&path)?)?;
            let unjudged =
                "planned from shapes alone: the tokenizer and the texts were not checked";
            plan.warnings.push(unjudged.into());
            plan
        }
        None => {
            let mut plan = Plan::new(&recipe, &hub::fetch(&recipe, Need::Shapes, false)?)?;
            plan.warnings.extend(check_texts(&plan, Look::First)?);
            check_tokenizer(&plan)?;
            plan
        }
    };
    warn(&plan);
    let split = Split {
        tp: args.tp.map(usize::from),
        ranks: args.devices,
    };
    show(&plan, split, args.json)
}

/// Numbers of devices to reckon with.
#[derive(Clone, Copy, Default)]
pub(crate) struct Split {
    /// Those that readers split a branch over.
    pub(crate) tp: Option<usize>,
    /// Ranks of the run.
    pub(crate) ranks: Option<usize>,
}

/// Prints what a run takes that so many ranks share.
fn print_scaling(plan: &Plan, ranks: usize) {
    let Scaling {
        memory,
        exchanged,
        time,
    } = Scaling::of(plan, ranks, RankDevice::Cuda);
    println!(
        "on {ranks} GPUs of one host: peak memory of each {}; rank 0 exchanges {} with the others; about {time:.2} of the time \
         of one, by the rates of one NVIDIA H200 and NVLink (the model is in kernels/README.md)",
        size::binary(memory.device),
        size::decimal(exchanged)
    );
    let Scaling {
        memory,
        exchanged,
        time,
    } = Scaling::of(plan, ranks, RankDevice::Cpu);
    println!(
        "on {ranks} ranks of the CPU: peak memory of each {}, down to {} with hidden states on its disk; rank 0 exchanges \
         {} with the others; about {time:.2} of the time of one, if each has a machine of its own (the model is in \
         kernels/README.md)",
        size::binary(memory.cpu),
        size::binary(memory.least_cpu),
        size::decimal(exchanged)
    );
}

/// Prints which branches can be split over this many devices.
fn print_split(plan: &Plan, ranks: usize) {
    for branch in &plan.branches {
        let name = &branch.name;
        let support = match BranchFiles::of(branch, &plan.config).split(ranks) {
            Ok(support) => support,
            Err(why) => {
                println!("{name}: not over {ranks} devices: {why}");
                continue;
            }
        };
        for Support {
            client, verdict, ..
        } in support
        {
            match verdict {
                Ok(()) => println!("{name}: over {ranks} devices in {}", client.name()),
                Err(why) => println!(
                    "{name}: not over {ranks} devices in {}: {why}",
                    client.name()
                ),
            }
        }
    }
}

/// Prints the plan as text or JSON, with what `split` asks for.
pub(crate) fn show(plan: &Plan, split: Split, as_json: bool) -> Result<()> {
    match as_json {
        true => println!("{}", serde_json::to_string_pretty(&record(plan, split))?),
        false => {
            print(plan, split.tp);
            if let Some(ranks) = split.ranks {
                print_scaling(plan, ranks);
            }
            tokenizer_note(plan)
                .iter()
                .for_each(|note| println!("{note}"));
        }
    }
    Ok(())
}

fn record(plan: &Plan, split: Split) -> Value {
    let ranks = split.tp;
    let config = &plan.config;
    let memory = Memory::of(plan);
    let branches = plan.branches.iter().map(|branch| {
        let mut record = json!({
            "name": branch.name,
            "bits": branch.bits,
            "group_size": branch.group_size,
            "budget_bits": branch.budget.as_ref().map(|budget| budget.bits),
            "desc_act": branch.needs_desc_act(),
            "act_order": branch.desc_act,
            "static_groups": branch.static_groups,
            "damp_percent": branch.damp_percent,
            "bytes": BranchFiles::of(branch, config).bytes(),
            "clients": clients(BranchFiles::of(branch, config).clients()),
        });
        if let Some(ranks) = ranks {
            let split = BranchFiles::of(branch, config).split(ranks);
            record["tensor_parallel"] = json!({
                "ranks": ranks,
                "splits": split.is_ok(),
                "why": split.as_ref().err(),
                "clients": clients(split.unwrap_or_default()),
            });
        }
        record
    });
    let scaling = split.ranks.map(|ranks| {
        let scaling = Scaling::of(plan, ranks, RankDevice::Cpu);
        let cuda = Scaling::of(plan, ranks, RankDevice::Cuda);
        json!({
            "ranks": ranks,
            "cuda": {
                "device": cuda.memory.device,
                "host": cuda.memory.host,
                "exchanged": cuda.exchanged,
                "relative_time": cuda.time,
            },
            "cpu": scaling.memory.cpu,
            "least_cpu": scaling.memory.least_cpu,
            "states": scaling.memory.states,
            "exchanged": scaling.exchanged,
            "relative_time": scaling.time,
        })
    });
    json!({
        "model": plan.model_name,
        "scaling": scaling,
        "parameters": config.parameters(),
        "layers": config.layers,
        "weights": plan.weights.map(|it| json!({"files": it.files, "tensors": it.tensors})),
        "copied": config.carried.iter().map(|it| &it.name).collect::<Vec<_>>(),
        "samples": plan.calibration.samples,
        "seq_len": plan.calibration.seq_len,
        "memory": {
            "device": memory.device,
            "host": memory.host,
            "cpu": memory.cpu,
            "states": memory.states,
            "least_host": memory.least_host,
            "least_cpu": memory.least_cpu,
        },
        "branches": branches.collect::<Vec<_>>(),
        "tokenizer": tokenizer_note(plan),
        "warnings": plan.warnings,
    })
}

/// Describes the check of the weights.
fn weights(plan: &Plan) -> String {
    match plan.weights {
        Some(Weights { files, tensors }) => {
            let files = match files {
                1 => "1 file".to_owned(),
                n => format!("{n} files"),
            };
            format!("{tensors} tensors in {files}, whose headers match config.json")
        }
        None => "not checked, as they are not downloaded yet".to_owned(),
    }
}

fn clients(support: Vec<Support>) -> Vec<Value> {
    let of = |support: Support| {
        json!({
            "name": support.client.name(),
            "loads": support.verdict.is_ok(),
            "why": support.verdict.err(),
            "note": support.note,
            "tried": support.tried,
        })
    };
    support.into_iter().map(of).collect()
}

/// Prints sizes, memory and clients, from shapes alone.
fn print(plan: &Plan, ranks: Option<usize>) {
    let config = &plan.config;
    println!(
        "{}: {:.2} million parameters, {} layers",
        plan.model_name,
        config.parameters() as f64 / 1e6,
        config.layers
    );
    println!("weights: {}", weights(plan));
    let copied: Vec<String> = (config.carried_parts().into_iter())
        .map(|(part, tensors)| format!("{} of {part}", table::count(tensors, "tensor")))
        .collect();
    if !copied.is_empty() {
        println!("not run, copied unchanged: {}", copied.join(", "));
    }
    println!(
        "calibration: {} of {} = {} tokens",
        table::count(plan.calibration.samples, "window"),
        plan.calibration.seq_len,
        plan.tokens()
    );
    let memory = Memory::of(plan);
    println!(
        "peak memory: {} on the device and {} on the host with CUDA, {} on the host without",
        size::binary(memory.device),
        size::binary(memory.host),
        size::binary(memory.cpu)
    );
    println!(
        "hidden states: {} of it; those beyond --host-memory go to --scratch, down to {} without \
         CUDA, and to {} with a device that cannot hold them",
        size::binary(memory.states),
        size::binary(memory.least_cpu),
        size::binary(memory.least_host)
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
        let support = BranchFiles::of(branch, config).clients();
        let loads: Vec<&str> = support
            .iter()
            .filter(|s| s.verdict.is_ok())
            .map(|s| s.client.name())
            .collect();
        rows.push(vec![
            branch.name.clone(),
            match &branch.budget {
                Some(budget) => format!("to {}", budget.bits),
                None => branch.bits.to_string(),
            },
            match &branch.budget {
                Some(_) => "measured".to_owned(),
                None => branch.group_size.to_string(),
            },
            branch.order().cell().to_owned(),
            branch.damp_percent.to_string(),
            size::decimal(BranchFiles::of(branch, config).bytes()),
            loads.join(", "),
        ]);
    }
    println!("\n{}", table::render(&rows).trim_end());
    for branch in &plan.branches {
        if let Some(budget) = &branch.budget {
            println!(
                "{}: at most {} bits per weight, scales, zero points and g_idx included; which linear layer gets \
                 which of {} settings is measured in the run, and the size is a bound",
                branch.name,
                budget.bits,
                budget.choices.len()
            );
        }
        if let Some(note) = &branch.group_note {
            println!("{}: {note}", branch.name);
        }
        for support in BranchFiles::of(branch, config).clients() {
            let client = support.client.name();
            match (support.verdict, support.note) {
                (Err(why), _) => println!("{}: not in {client}: {why}", branch.name),
                (Ok(()), Some(note)) => println!("{}: in {client} {note}", branch.name),
                (Ok(()), None) => {}
            }
        }
    }
    if let Some(ranks) = ranks {
        print_split(plan, ranks);
    }
}
