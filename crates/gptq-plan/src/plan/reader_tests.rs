//! Declarations of a plan to clients of a branch: column order, groups, names of linear layers,
//! splits over several devices.

use gptq_format::{Bits, Client, GroupSize, QuantizeConfig};
use serde_json::{Value, json};

use super::*;
use crate::{BranchFiles, ColumnOrder};

const HEAD: &str =
    "[model]\nsource = \"m\"\n[calibration]\nsource = \"c.json\"\n[output]\ndir = \"out\"\n";

/// Makes a config of these numbers: hidden and intermediate size, blocks, heads, and key-value
/// heads.
fn config(numbers: [usize; 5]) -> ModelConfig {
    let [hidden, intermediate, layers, heads, kv_heads] = numbers;
    let config: Value = json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": 4096
    });
    ModelConfig::from_json(config).unwrap()
}

const TINY: [usize; 5] = [256, 768, 2, 4, 2];
const SMOLLM2: [usize; 5] = [576, 1536, 30, 9, 3];
const QWEN2_72B: [usize; 5] = [8192, 29568, 80, 64, 8];

fn plan(numbers: [usize; 5], rest: &str) -> Result<Plan, String> {
    let recipe = Recipe::parse(Path::new("r.toml"), format!("{HEAD}{rest}"));
    let plan = recipe.and_then(|recipe| Plan::for_config(&recipe, config(numbers)));
    plan.map_err(|e| e.to_string())
}

#[test]
fn an_order_that_a_recipe_leaves_open_is_one_that_every_reader_takes() {
    let orders = |defaults: &str, branch: &str| {
        let rest = format!("[defaults]\nbits = 4\n{defaults}\n[[branch]]\nname = \"a\"\n{branch}");
        let plan = plan(TINY, &rest).unwrap();
        let branch = &plan.branches[0];
        let written = BranchFiles::of(branch, &plan.config).quantize_config("m");
        assert_eq!(written.desc_act, branch.needs_desc_act());
        assert_eq!(written.static_groups, branch.static_groups);
        assert_eq!(
            branch
                .module("model.layers.0.mlp.up_proj")
                .unwrap()
                .static_groups,
            branch.static_groups
        );
        let vllm = BranchFiles::of(branch, &plan.config)
            .clients()
            .into_iter()
            .find(|s| s.client == Client::Vllm);
        assert_eq!(vllm.unwrap().verdict.is_ok(), !written.desc_act);
        (branch.desc_act, branch.static_groups, written.desc_act)
    };
    for (defaults, branch, expected) in [
        ("", "", (true, true, false)),
        ("", "desc_act = true", (true, false, true)),
        ("", "desc_act = false", (false, false, false)),
        ("", "static_groups = true", (true, true, false)),
        ("", "static_groups = false", (true, false, true)),
        (
            "",
            "desc_act = true\nstatic_groups = true",
            (true, true, false),
        ),
        (
            "",
            "desc_act = false\nstatic_groups = true",
            (false, true, false),
        ),
        ("desc_act = true", "", (true, false, true)),
        (
            "desc_act = true",
            "static_groups = true",
            (true, true, false),
        ),
        (
            "static_groups = true",
            "desc_act = false",
            (false, true, false),
        ),
    ] {
        assert_eq!(orders(defaults, branch), expected, "{defaults} {branch}");
    }
}

#[test]
fn an_order_made_before_is_kept_where_the_recipe_leaves_it_open() {
    let order = |defaults: &str, branch: &str| {
        let text =
            format!("{HEAD}[defaults]\nbits = 4\n{defaults}\n[[branch]]\nname = \"a\"\n{branch}");
        let mut recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
        let before = ColumnOrder {
            desc_act: true,
            static_groups: false,
        };
        let overrides = RecipeOverrides {
            orders: [("a".to_owned(), before)].into(),
            ..RecipeOverrides::default()
        };
        recipe.apply(overrides).unwrap();
        let plan = Plan::for_config(&recipe, config(TINY)).unwrap();
        (plan.branches[0].desc_act, plan.branches[0].static_groups)
    };
    assert_eq!(order("", ""), (true, false));
    assert_eq!(order("", "desc_act = false"), (false, false));
    assert_eq!(order("static_groups = true", ""), (true, true));
}

#[test]
fn readers_are_told_a_damping_that_they_all_take() {
    for (asked, told) in [("0.0", 1e-6), ("0.01", 0.01), ("1.0", 1.0 - 1e-6)] {
        let rest = format!("[[branch]]\nname = \"a\"\nbits = 4\ndamp_percent = {asked}\n");
        let plan = plan(TINY, &rest).unwrap();
        let written = BranchFiles::of(&plan.branches[0], &plan.config).quantize_config("m");
        assert_eq!(written.damp_percent, Some(told), "{asked}");
        assert_eq!(
            plan.branches[0].damp_percent.to_string(),
            asked.trim_end_matches(".0")
        );
        let support = BranchFiles::of(&plan.branches[0], &plan.config).clients();
        let refusing = support.iter().filter(|it| it.verdict.is_err());
        let refusing: Vec<Client> = refusing.map(|it| it.client).collect();
        // Programs that read other formats only.
        assert_eq!(refusing, [Client::MlxLm, Client::MistralRs]);
    }
}

#[test]
fn groups_that_a_recipe_leaves_open_fit_the_model() {
    let groups = |numbers, rest: &str| {
        let plan = plan(
            numbers,
            &format!("[[branch]]\nname = \"a\"\nbits = 4\n{rest}"),
        )?;
        let branch = &plan.branches[0];
        Ok::<_, String>((
            branch.group_size,
            branch.group_note.clone().unwrap_or_default(),
        ))
    };
    assert_eq!(
        groups(TINY, ""),
        Ok((GroupSize::Columns(128), String::new()))
    );
    let (size, note) = groups(SMOLLM2, "").unwrap();
    assert_eq!(size, GroupSize::Columns(64));
    assert_eq!(
        note,
        "groups of 64, as 128 does not divide the 576 inputs of model.layers.0.self_attn.q_proj"
    );
    let (size, note) = groups([96, 768, 1, 3, 3], "").unwrap();
    assert_eq!(size, GroupSize::Columns(32));
    assert!(
        note.starts_with("groups of 32, as 64 does not divide the 96 inputs"),
        "{note}"
    );
    // Layers with their own settings or without quantization do not matter.
    let rest = "[[branch.override]]\nmatch = \"*.self_attn.*\"\nskip = true\n\
                [[branch.override]]\nmatch = \"*.gate_proj\"\ngroup_size = 64\n\
                [[branch.override]]\nmatch = \"*.up_proj\"\ngroup_size = 32\n";
    assert_eq!(groups(SMOLLM2, rest).unwrap().0, GroupSize::Columns(128));
    // An explicit size is not changed, and a layer that cannot be packed is a separate error.
    let line = groups(SMOLLM2, "group_size = 128").unwrap_err();
    assert!(
        line.contains("group_size = 128 does not divide the 576"),
        "{line}"
    );
    let line = groups([80, 768, 1, 5, 5], "").unwrap_err();
    assert!(line.contains("packing needs multiples of 32"), "{line}");
}

/// Returns the settings of a name for a client that tries each pattern at its beginning, as
/// Python's `re.match` does.
fn told(written: &QuantizeConfig, name: &str) -> Option<(Bits, GroupSize)> {
    written.module(name).unwrap()
}

#[test]
fn patterns_name_modules_and_their_tensors_and_nothing_that_begins_alike() {
    let rest = "[[branch]]\nname = \"a\"\nbits = 4\n\
                [[branch.override]]\nmatch = \"model.layers.1.mlp.down_proj\"\nbits = 8\n\
                [[branch.override]]\nmatch = \"model.layers.1.self_attn.q_proj\"\nbits = 3\n\
                [[branch.override]]\nmatch = \"model.layers.12.self_attn.*\"\nbits = 2\n\
                [[branch.override]]\nmatch = \"model.layers.2.mlp.gate_proj\"\nskip = true\n\
                [[branch.override]]\nmatch = \"*.o_proj\"\nbits = 8\n";
    let plan = plan([256, 768, 130, 4, 2], rest).unwrap();
    let branch = &plan.branches[0];
    let written = BranchFiles::of(branch, &plan.config).quantize_config("m");
    let rules = written.dynamic.iter().flat_map(|rules| rules.iter());
    let patterns: Vec<&str> = rules.map(|(pattern, _)| pattern).collect();
    assert!(
        !patterns.is_empty() && patterns.iter().all(|it| !it.contains('$')),
        "{patterns:?}"
    );
    for (layer, block) in plan.config.blocks().iter().enumerate() {
        for tap in block.taps() {
            let mut settings = Vec::new();
            for linear in &block.linears()[block.linears_of(tap)] {
                let module = linear.module(layer);
                let own = branch.module(&module).map(|it| (it.bits, it.group_size));
                assert_eq!(told(&written, &module), own, "{module}");
                for tensor in ["qweight", "scales"] {
                    assert_eq!(
                        told(&written, &format!("{module}.{tensor}")),
                        own,
                        "{module}.{tensor}"
                    );
                }
                settings.push(own);
            }
            let linears: Vec<usize> = block.linears_of(tap).collect();
            let same = settings.iter().all(|it| *it == settings[0]);
            for fused in block.fused(&linears).into_iter().filter(|_| same) {
                let fused = format!("model.layers.{layer}.{fused}");
                assert_eq!(told(&written, &fused), settings[0], "{fused}");
            }
        }
    }
    // No name of a linear layer begins with that of another.
    let linears = plan.config.block(0).linears().iter();
    let names = linears.flat_map(|it| [Some(&it.name), it.fused_as.as_ref()]);
    let names: std::collections::BTreeSet<&String> = names.flatten().collect();
    for one in &names {
        let longer = names.iter().filter(|other| other.starts_with(one.as_str()));
        assert_eq!(longer.count(), 1, "{one}");
    }
}

#[test]
fn a_branch_splits_where_every_device_gets_whole_heads_and_groups() {
    let split = |numbers, rest: &str, ranks| {
        let plan = plan(
            numbers,
            &format!("[[branch]]\nname = \"a\"\nbits = 4\n{rest}"),
        )
        .unwrap();
        let support = BranchFiles::of(&plan.branches[0], &plan.config).split(ranks)?;
        let loads = support.into_iter().filter(|it| it.verdict.is_ok());
        Ok::<_, String>(loads.map(|it| it.client).collect::<Vec<Client>>())
    };
    let all = vec![Client::Vllm, Client::SgLang, Client::Tgi];
    // Llama-2-70B: 28672 inputs of down_proj are 3584 for each of eight, 28 groups of 128.
    assert_eq!(split([8192, 28672, 80, 64, 8], "", 8), Ok(all.clone()));
    // Qwen2-72B: 29568 are 14784 for each of two, 115.5 groups of 128; in groups of 32 they are 462.
    let line = split(QWEN2_72B, "group_size = 128", 2).unwrap_err();
    assert!(
        line.contains("layers.0.mlp.down_proj: 14784 of 29568 inputs")
            && line.contains("groups of 128"),
        "{line}"
    );
    // vLLM also needs multiples of 128, which 14784 is not.
    assert_eq!(
        split(QWEN2_72B, "group_size = 32", 2),
        Ok(vec![Client::SgLang, Client::Tgi])
    );
    assert_eq!(
        split([8192, 28672, 80, 64, 8], "group_size = -1", 8),
        Ok(all)
    );
    let line = split(SMOLLM2, "", 2).unwrap_err();
    assert!(
        line.contains("9 query heads and 3 key-value heads"),
        "{line}"
    );
    let line = split(QWEN2_72B, "group_size = 32\ndesc_act = true", 4).unwrap_err();
    assert!(
        line.contains("o_proj: act order scatters") && line.contains("static_groups = true"),
        "{line}"
    );
    // More devices than key-value heads: each has a copy of one.
    assert!(split([4096, 14336, 2, 32, 8], "", 16).is_ok());
}
