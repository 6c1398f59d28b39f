//! Meaning of recipes, and refusals with their place.
//!
//! Longer than most: every refusal of a recipe is tested here.

use gptq_calibration::{Rendering, Template};
use gptq_format::{Bits, CheckpointFormat, Client, Dynamic, GroupSize, QuantizeConfig};
use serde_json::json;

use super::*;
use crate::{BranchFiles, Memory, calibration_source};

fn tiny() -> ModelConfig {
    ModelConfig::from_json(json!({
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096,
        "max_position_embeddings": 2048
    }))
    .unwrap()
}

fn meditron() -> ModelConfig {
    ModelConfig::from_json(json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32017,
        "max_position_embeddings": 2048
    }))
    .unwrap()
}

fn llama2_70b() -> ModelConfig {
    ModelConfig::from_json(json!({
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "vocab_size": 32000, "max_position_embeddings": 4096
    }))
    .unwrap()
}

const HEAD: &str =
    "[model]\nsource = \"m\"\n[calibration]\nsource = \"c.json\"\n[output]\ndir = \"out\"\n";

fn plan(rest: &str) -> Result<Plan, String> {
    let text = format!("{HEAD}{rest}");
    let recipe = Recipe::parse(Path::new("r.toml"), text).map_err(|e| e.to_string())?;
    Plan::for_config(&recipe, tiny()).map_err(|e| e.to_string())
}

fn configs() -> Vec<PathBuf> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "toml"))
        .collect();
    paths.sort();
    paths
}

#[test]
fn every_recipe_in_configs_plans() {
    let paths = configs();
    assert_eq!(paths.len(), 4);
    for path in paths {
        let recipe = Recipe::read(&path).unwrap();
        let config = match path.ends_with("tiny.toml") {
            true => tiny(),
            false if path.ends_with("llama2-70b.toml") => llama2_70b(),
            false => meditron(),
        };
        let plan = Plan::for_config(&recipe, config).unwrap();
        assert!(!plan.branches.is_empty(), "{}", path.display());
    }
}

#[test]
fn the_published_matrix_has_the_published_sizes() {
    let path = configs()
        .into_iter()
        .find(|p| p.ends_with("meditron-7b.toml"))
        .unwrap();
    let plan = Plan::for_config(&Recipe::read(&path).unwrap(), meditron()).unwrap();
    let published = [
        ("main", 3.90, true),
        ("gptq-4bit-32g-actorder_True", 4.28, true),
        ("gptq-8bit--1g-actorder_True", 7.01, false),
        ("gptq-8bit-128g-actorder_True", 7.16, false),
        ("gptq-8bit-32g-actorder_True", 7.62, false),
        ("gptq-4bit-64g-actorder_True", 4.02, true),
    ];
    assert_eq!(plan.branches.len(), published.len());
    for (branch, (name, gigabytes, exllama)) in plan.branches.iter().zip(published) {
        assert_eq!(branch.name, name);
        let size = BranchFiles::of(branch, &plan.config).bytes() as f64 / 1e9;
        // The table is rounded to 0.005 GB and counts 2.7 MB of zero biases that are not written.
        assert!((size / gigabytes - 1.0).abs() < 0.002, "{name}: {size}");
        let loads = BranchFiles::of(branch, &plan.config).clients().into_iter();
        let loads: Vec<Client> = loads
            .filter(|s| s.verdict.is_ok())
            .map(|s| s.client)
            .collect();
        assert_eq!(loads.contains(&Client::ExLlama), exllama, "{name}");
        // vLLM does not support act order, which has no effect if a row is one group.
        let vllm = name == "gptq-8bit--1g-actorder_True";
        assert_eq!(loads.contains(&Client::Vllm), vllm, "{name}");
        assert!(branch.needs_desc_act() && branch.desc_act, "{name}");
    }
    assert_eq!(plan.tokens(), 128 * 4096);
    assert!(plan.warnings[0].contains("4096") && plan.warnings[0].contains("2048"));
}

#[test]
fn each_branch_of_the_serving_recipe_is_read_where_its_comment_says() {
    let path = configs().into_iter().find(|p| p.ends_with("serving.toml"));
    let recipe = Recipe::read(&path.unwrap()).unwrap();
    let plan = Plan::for_config(&recipe, meditron()).unwrap();
    let readers: [&[Client]; 4] = [
        &[
            Client::Vllm,
            Client::SgLang,
            Client::Transformers,
            Client::ExLlama,
        ],
        &[Client::Vllm],
        &[Client::LlamaCpp],
        &[Client::MlxLm],
    ];
    assert_eq!(plan.branches.len(), readers.len());
    for (branch, readers) in plan.branches.iter().zip(readers) {
        assert!(!branch.needs_desc_act(), "{}", branch.name);
        let files = BranchFiles::of(branch, &plan.config);
        for reader in readers {
            let loads = (files.clients().into_iter())
                .any(|support| support.client == *reader && support.verdict.is_ok());
            assert!(loads, "{} in {}", branch.name, reader.name());
        }
    }
}

#[test]
fn seventy_billion_parameters_plan() {
    let path = configs()
        .into_iter()
        .find(|p| p.ends_with("llama2-70b.toml"))
        .unwrap();
    let plan = Plan::for_config(&Recipe::read(&path).unwrap(), llama2_70b()).unwrap();
    assert_eq!(plan.config.parameters(), 68_976_648_192);
    // Per block: q and o, k and v, gate, up and down.
    let block: u64 = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672;
    let rows: u64 = 2 * 8192 + 2 * 1024 + 2 * 28672 + 8192;
    let columns: u64 = 6 * 8192 + 28672;
    let rest: u64 = (2 * 32000 * 8192 + 161 * 8192) * 2;
    for (branch, (name, bits, group)) in plan.branches.iter().zip([
        ("main", 4, None),
        ("gptq-4bit-128g-actorder_True", 4, Some(128)),
        ("gptq-4bit-64g-actorder_True", 4, Some(64)),
        ("gptq-4bit-32g-actorder_True", 4, Some(32)),
        ("gptq-3bit--1g-actorder_True", 3, None),
        ("gptq-3bit-128g-actorder_True", 3, Some(128)),
    ]) {
        assert_eq!(branch.name, name);
        // A scale of two bytes and a zero point of `bits` for each row of each group.
        let groups = group.map_or(rows, |group| block / group);
        let bytes = 80 * (block * bits / 8 + groups * 2 + groups * bits / 8 + columns * 4) + rest;
        assert_eq!(
            BranchFiles::of(branch, &plan.config).bytes(),
            bytes,
            "{name}"
        );
    }
    // Six streams of 524288 tokens by 8192 features and one activation of 28672, in f16; and for a quarter of the
    // tokens the dense model's states before every tap and at the end.
    let memory = Memory::of(&plan);
    let dense = (3 * 8192 + 8192 + 28672) / 4;
    assert_eq!(memory.states, 524_288 * (6 * 8192 + 28672 + dense) * 2);
    assert!(
        memory.device > memory.states && memory.least_host < 16 << 30,
        "{memory:?}"
    );
    // 80 GB of device memory and 64 GiB of host memory hold some of them, and the disk the rest.
    let places =
        |host| crate::Places::new(&plan, 1, crate::Chunking::CUDA, Some(79 << 30), host, false);
    let free = places(None).unwrap();
    assert!(free.device > 0 && free.host > 0, "{free:?}");
    assert_eq!(free.disk_bytes, 0);
    let chunk = memory.states / (free.device + free.host) as u64;
    let tight = places(Some(24 << 30)).unwrap();
    assert_eq!(tight.device, free.device);
    assert_eq!(tight.disk_bytes, (free.host - tight.host) as u64 * chunk);
    assert!(
        tight.disk_bytes > 0 && (tight.host as u64 * chunk) < 24 << 30,
        "{tight:?}"
    );
    assert!(
        places(Some(1 << 30))
            .unwrap_err()
            .to_string()
            .contains("--host-memory")
    );
}

#[test]
fn defaults_fill_in_what_a_branch_leaves_out() {
    let plan = plan(
        "[defaults]\nbits = 4\ngroup_size = 64\ndamp_percent = 0.01\npreset = \"autogptq\"\n\
         [[branch]]\nname = \"a\"\n[[branch]]\nname = \"b\"\nbits = 8\ngroup_size = -1\ndesc_act = false\nsym = false\n",
    )
    .unwrap();
    let [a, b] = &plan.branches[..] else { panic!() };
    assert_eq!(
        (a.bits, a.group_size, a.desc_act),
        (Bits::Four, GroupSize::Columns(64), true)
    );
    assert_eq!(
        (b.bits, b.group_size, b.desc_act),
        (Bits::Eight, GroupSize::Row, false)
    );
    assert_eq!((a.damp_percent, a.preset), (0.01, crate::Preset::Autogptq));
    assert_eq!(
        (a.checkpoint_format(), b.checkpoint_format()),
        (CheckpointFormat::Gptq, CheckpointFormat::GptqV2)
    );
    assert_eq!(plan.calibration.samples, 128);
}

#[test]
fn overrides_change_or_skip_the_modules_they_match() {
    let plan = plan(
        "[[branch]]\nname = \"a\"\nbits = 4\n\
         [[branch.override]]\nmatch = \"*.down_proj\"\nbits = 8\ngroup_size = 32\n\
         [[branch.override]]\nmatch = \"model.layers.0.*.k_proj\"\nskip = true\n\
         [[branch.override]]\nmatch = \"model.layers.0.*\"\nbits = 3\n",
    )
    .unwrap();
    let branch = &plan.branches[0];
    let down = branch.module("model.layers.1.mlp.down_proj").unwrap();
    assert_eq!(
        (down.bits, down.group_size),
        (Bits::Eight, GroupSize::Columns(32))
    );
    assert!(branch.module("model.layers.0.self_attn.k_proj").is_none());
    assert!(branch.module("model.layers.1.self_attn.k_proj").is_some());
    // Clients get the same settings in their own notation, in whatever order they read it.
    let written = BranchFiles::of(branch, &plan.config).quantize_config("m");
    for linear in branch.planned_linears(&plan.config) {
        let (module, ours) = (&linear.module, linear.settings);
        let ours = Some((ours.bits, ours.group_size));
        assert_eq!(written.module(module).unwrap(), ours, "{module}");
    }
    for (at, block) in plan.config.blocks().iter().enumerate() {
        for module in block.linears().iter().map(|linear| linear.module(at)) {
            let alone = |(pattern, own): (&str, &Dynamic)| QuantizeConfig {
                dynamic: Some([(pattern.to_owned(), own.clone())].into_iter().collect()),
                ..written.clone()
            };
            let patterns = written.dynamic.iter().flat_map(|it| it.iter()).map(alone);
            let own = Some((branch.bits, branch.group_size));
            let matching = patterns.filter(|it| it.module(&module).unwrap() != own);
            assert!(matching.count() <= 1, "{module}");
        }
    }
    assert_eq!(
        written.module("model.layers.0.self_attn.k_proj").unwrap(),
        None
    );
    let clients = BranchFiles::of(branch, &plan.config).clients().into_iter();
    let clients: Vec<Client> = clients
        .filter(|s| s.verdict.is_ok())
        .map(|s| s.client)
        .collect();
    assert!(clients.contains(&Client::GptqModel) && !clients.contains(&Client::ExLlama));
}

#[test]
fn what_is_wrong_is_refused_with_its_place_and_what_would_be_valid() {
    let branch = "[[branch]]\nname = \"a\"\nbits = 4\n";
    for (rest, place, words) in [
        (
            format!("{branch}speed = 3\n"),
            "r.toml:10:1",
            &["unknown field `speed`", "bits"][..],
        ),
        (
            "[[branch]]\nname = \"a\"\nbits = 5\n".into(),
            "r.toml:9:8",
            &["2, 3, 4, 8"],
        ),
        (
            "[[branch]]\nname = \"a\"\n".into(),
            "r.toml:7:1",
            &["bits is set neither"],
        ),
        (
            format!("{branch}{branch}"),
            "r.toml:11:8",
            &["second branch is named \"a\""],
        ),
        (
            format!("{branch}group_size = 96\n"),
            "r.toml:10:14",
            &["does not divide the 256", "-1, 32, 64"],
        ),
        (
            format!("{branch}group_size = 0\n"),
            "r.toml:10:14",
            &["neither -1 nor positive"],
        ),
        (
            format!("{branch}damp_percent = 7.0\n"),
            "r.toml:10:16",
            &["between 0 and 1"],
        ),
        (
            "[[branch]]\nname = \"../up\"\nbits = 4\n".into(),
            "r.toml:8:8",
            &["not safe", "letters"],
        ),
        (
            "[[branch]]\nname = \"main.partial\"\nbits = 4\n".into(),
            "r.toml:8:8",
            &["not safe"],
        ),
        (String::new(), "r.toml:1:1", &["no [[branch]]"]),
        (
            format!("{branch}[[branch.override]]\nmatch = \"*.lm\"\n"),
            "r.toml:11:9",
            &["matches no linear", "down_proj"],
        ),
        (
            format!(
                "{branch}[[branch.override]]\nmatch = \"*.up_proj\"\nbits = 8\n\
                 [[branch.override]]\nmatch = \"*.up_proj\"\nbits = 2\n"
            ),
            "r.toml:14:9",
            &["used twice", "merge them"],
        ),
        (
            format!("{branch}[[branch.override]]\nmatch = \"*.up_proj\"\nskip = true\nbits = 8\n"),
            "r.toml:11:9",
            &["keep one"],
        ),
        (
            format!("{branch}[[branch.override]]\nmatch = \"*\"\nskip = true\n"),
            "r.toml:7:1",
            &["nothing is left"],
        ),
        (
            format!("{branch}[[branch.override]]\nmatch = \"*.down_proj\"\ngroup_size = 512\n"),
            "r.toml:12:14",
            &["768"],
        ),
        (
            format!("{branch}[evaluation]\ntext = 4\n"),
            "r.toml:11:8",
            &["invalid type"],
        ),
        (
            format!("{branch}preset = \"fast\"\n"),
            "r.toml:10:10",
            &["autogptq", "standard"],
        ),
    ] {
        let error = plan(&rest).expect_err(&rest);
        assert!(error.starts_with(place), "{rest}\n{error}");
        assert!(words.iter().all(|w| error.contains(w)), "{rest}\n{error}");
        assert!(!error.contains('\n'), "one line: {error}");
    }
    for (text, place, word) in [
        (
            HEAD.replace("\"c.json\"", "\"c.json\"\nrows = \"9:3\""),
            "r.toml:5:8",
            "0:1000",
        ),
        (
            HEAD.replace("\"c.json\"", "\"c.json\"\nsamples = 0"),
            "r.toml:5:11",
            "between 1",
        ),
        (
            HEAD.replace("\"c.json\"", "\"c.json\"\ntemplate = \"x\""),
            "r.toml:5:12",
            "names no column",
        ),
        (
            HEAD.replace("\"c.json\"", "\"c.json\"\nsampling = \"best\""),
            "r.toml:5:12",
            "random-windows",
        ),
        (
            HEAD.replace("\"out\"", "\"out\"\nshard_size = \"4 apples\""),
            "r.toml:7:14",
            "4GB",
        ),
        (
            HEAD.replace("\"m\"", "\"m\"\ndtype = \"f8\""),
            "r.toml:3:9",
            "bf16",
        ),
    ] {
        let recipe = Recipe::parse(Path::new("r.toml"), format!("{text}{branch}"));
        let result = recipe.and_then(|recipe| Plan::for_config(&recipe, tiny()));
        let error = result.expect_err(&text).to_string();
        assert!(
            error.starts_with(place) && error.contains(word),
            "{text}\n{error}"
        );
    }
}

#[test]
fn a_calibration_of_more_tokens_than_anyone_uses_is_refused_at_its_place() {
    let read = |samples: u64, seq_len: u64| {
        let keys = format!("\"c.json\"\nsamples = {samples}\nseq_len = {seq_len}");
        let text = HEAD.replace("\"c.json\"", &keys);
        let text = format!("{text}[[branch]]\nname = \"a\"\nbits = 4\n");
        let recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
        Plan::for_config(&recipe, llama2_70b()).map_err(|e| e.to_string())
    };
    let line = read(1 << 24, 1 << 24).unwrap_err();
    assert!(
        line.starts_with("r.toml:5:11: ") && line.contains("over 2^34 tokens"),
        "{line}"
    );
    let memory = Memory::of(&read(1 << 17, 1 << 17).unwrap());
    assert!(memory.states > 1 << 48 && memory.states < u64::MAX);
}

/// Measured with `nvidia-smi` every 50 ms on one NVIDIA H200 (driver 580.159.04, 2026-12-01): 3 blocks of random weights, 128
/// windows of 2048 tokens, one 4-bit g128 branch.
#[test]
fn a_mixture_needs_the_memory_that_is_planned_for_it_within_a_tenth() {
    let config = json!({
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": true, "decoder_sparse_step": 1,
        "max_position_embeddings": 40_960, "rope_theta": 1e6
    });
    for (preset, gigabytes) in [("standard", 24.72), ("best", 37.65)] {
        let text = format!(
            "[model]\nsource = \"m\"\n[calibration]\nsource = \"c.json\"\nsamples = 128\nseq_len = 2048\n\
             [output]\ndir = \"out\"\n[[branch]]\nname = \"a\"\npreset = \"{preset}\"\nbits = 4\n\
             group_size = 128\ndamp_percent = 0.1\n"
        );
        let recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
        let config = ModelConfig::from_json(config.clone()).unwrap();
        let plan = Plan::for_config(&recipe, config).unwrap();
        let planned = Memory::of(&plan).device as f64 / f64::from(1 << 30);
        let ratio = planned / gigabytes;
        assert!((0.9..=1.1).contains(&ratio), "{preset}: {planned}");
    }
}

#[test]
fn memory_beyond_what_64_bits_hold_is_said_to_be_the_most_they_do() {
    // Largest allowed width: 2^45 weights in an attention of 2^43 features.
    let config = ModelConfig::from_json(json!({
        "model_type": "llama", "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1,
        "num_attention_heads": 1 << 23, "head_dim": 1 << 20, "vocab_size": 1
    }));
    let text = format!("{HEAD}[[branch]]\nname = \"a\"\nbits = 4\n");
    let recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
    let mut plan = Plan::for_config(&recipe, tiny()).unwrap();
    plan.config = config.unwrap();
    (plan.calibration.samples, plan.calibration.seq_len) = (1 << 10, 1 << 24);
    let memory = Memory::of(&plan);
    assert_eq!((memory.device, memory.cpu), (u64::MAX, u64::MAX));
    assert_eq!((memory.states, memory.least_cpu), (u64::MAX, u64::MAX));
}

#[test]
fn sizes_parse_in_both_conventions() {
    assert_eq!(parse_size("4GB"), Ok(4_000_000_000));
    assert_eq!(parse_size("512MiB"), Ok(512 << 20));
    assert_eq!(parse_size("7"), Ok(7));
    for (text, bytes) in [
        ("22gib", 22 << 30),
        ("2TB", 2_000_000_000_000),
        ("1 TiB", 1 << 40),
        ("64kB", 64_000),
        ("1.5GB", 1_500_000_000),
        ("0.25MIB", 1 << 18),
        ("1.00000000001GB", 1_000_000_000),
        ("18446744073709551615", u64::MAX),
    ] {
        assert_eq!(parse_size(text), Ok(bytes), "{text}");
    }
    let wrong = [
        "",
        "GB",
        "0",
        "-1GB",
        "99999999999GiB",
        "4TB?",
        "1.GB",
        ".5GB",
        "1.2.3GB",
        "1e3",
        "4G",
        "0.5B",
        "1.+5GB",
        "+1GB",
        "0.0000000000000000001TB",
        "18446744073709551616",
    ];
    for text in wrong {
        let line = parse_size(text).unwrap_err();
        assert!(line.contains("1.5TB") && !line.contains('\n'), "{line}");
    }
}

#[test]
fn no_local_path_becomes_a_models_name() {
    assert_eq!(public_name("epfl-llm/meditron-7b"), "epfl-llm/meditron-7b");
    assert_eq!(public_name("/data/secret/meditron-7b"), "meditron-7b");
    assert_eq!(public_name("./m"), "m");
    assert_eq!(
        public_name("src/plan.rs"),
        "plan.rs",
        "it exists, so it is a path"
    );
}

#[test]
fn what_is_here_is_local_and_owner_and_name_are_on_the_hub() {
    let recipe = |model: &str, calibration: &str| {
        let text = HEAD.replace("\"m\"", &format!("{model:?}"));
        let text = text.replace("\"c.json\"", &format!("{calibration:?}"));
        Recipe::parse(Path::new("r.toml"), text).unwrap()
    };
    let hub = |repo: &str| InputSource::Hub {
        repo: repo.into(),
        revision: "main".into(),
    };
    let plain = recipe("epfl-llm/meditron-7b", "medalpaca/medical_meadow_wikidoc");
    assert_eq!(model_source(&plain), Ok(hub("epfl-llm/meditron-7b")));
    assert_eq!(
        calibration_source(&plain),
        Ok(hub("medalpaca/medical_meadow_wikidoc"))
    );
    // Tests run in the crate's directory, which contains these.
    for (model, calibration) in [
        ("src", "src/plan.rs"),
        ("src/plan", "data/rows.jsonl"),
        ("src", "data/*"),
        ("src", "rows"),
    ] {
        let recipe = recipe(model, calibration);
        assert_eq!(model_source(&recipe), Ok(InputSource::Local(model.into())));
        assert_eq!(
            calibration_source(&recipe),
            Ok(InputSource::Local(calibration.into()))
        );
    }
    for model in ["/no/where", "./no/where", "nowhere", "a/b/c"] {
        let error = model_source(&recipe(model, "c.json")).unwrap_err();
        assert!(error.to_string().contains("owner/name"), "{error}");
    }
}

#[test]
fn a_row_is_read_in_one_way() {
    let rendering = |keys: &str| {
        let text = HEAD.replace("\"c.json\"", &format!("\"c.json\"\n{keys}"));
        let text = format!("{text}[[branch]]\nname = \"a\"\nbits = 4\n");
        let recipe = Recipe::parse(Path::new("r.toml"), text).map_err(|e| e.to_string())?;
        let plan = Plan::for_config(&recipe, tiny()).map_err(|e| e.to_string())?;
        Ok::<_, String>(plan.calibration.rendering)
    };
    let column = Rendering::Template(Template::parse("{text}").unwrap());
    assert_eq!(rendering("column = \"text\""), Ok(column));
    let default = Template::parse("{input}\n{output}").unwrap();
    assert_eq!(rendering(""), Ok(Rendering::Template(default)));
    for (keys, chatml) in [("", false), ("chat_template = \"chatml\"", true)] {
        let column = "talk".to_owned();
        assert_eq!(
            rendering(&format!("messages = \"talk\"\n{keys}")),
            Ok(Rendering::Messages { column, chatml })
        );
    }
    let two = rendering("column = \"a\"\ntokens = \"b\"").unwrap_err();
    assert!(
        two.starts_with("r.toml:6:10") && two.contains("keep one"),
        "{two}"
    );
}
