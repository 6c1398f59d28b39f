//! Branches in other formats: exported, or written by a recipe that asks for them.
//!
//! Longer than most: each format is written, read back, refused and resumed.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Scratch, medi_tiny, refuse, root, succeed};
use crate::inspect::gptqmodel_branch;

/// Branches of every kind that compressed-tensors holds.
const BRANCHES: &str = r#"
[[branch]]
name = "four"
bits = 4
group_size = 64

[[branch]]
name = "asymmetric"
bits = 4
group_size = 128
sym = false
desc_act = false

[[branch]]
name = "eight"
bits = 8
group_size = -1
desc_act = false

[[branch]]
name = "mixed"
bits = 4
group_size = 64
desc_act = false

[[branch.override]]
match = "*.down_proj"
bits = 8
group_size = 32

[[branch.override]]
match = "*.layers.0.self_attn.k_proj"
skip = true
"#;

fn quantize(recipe: &Path) {
    let flags = ["--device", "cpu", "--samples", "2", "--seq-len", "128"];
    succeed(["quantize", recipe.to_str().unwrap()].iter().chain(&flags));
}

fn export(dir: &Path, to: &str, output: &Path) -> String {
    succeed([
        "export",
        dir.to_str().unwrap(),
        "--to",
        to,
        "--output",
        output.to_str().unwrap(),
    ])
}

/// Verifies an exported branch, and that it has the weights of `branch`.
fn verify(dir: &Path, branch: &Path) -> Value {
    let text = succeed([
        "verify",
        dir.to_str().unwrap(),
        "--branch",
        branch.to_str().unwrap(),
        "--json",
    ]);
    serde_json::from_str(&text).unwrap()
}

fn inspect(dir: &Path) -> Value {
    let text = succeed(["inspect", dir.to_str().unwrap(), "--json"]);
    serde_json::from_str(&text).unwrap()
}

fn greedy(dir: &Path) -> Value {
    let fixed = [
        "--prompt",
        "Asthma is",
        "--greedy",
        "--max-new-tokens",
        "8",
        "--json",
    ];
    let line = succeed(["generate", dir.to_str().unwrap()].iter().chain(&fixed));
    serde_json::from_str::<Value>(line.trim()).unwrap()["tokens"].clone()
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn exported_branches_have_their_weights_to_the_bit_and_go_back() {
    let scratch = Scratch::new();
    quantize(&scratch.recipe(&medi_tiny(), BRANCHES));
    let exported = scratch.path("exported");
    let said = export(&scratch.out(), "compressed-tensors", &exported);
    assert_eq!(said.lines().count(), 4, "{said}");
    for name in ["four", "asymmetric", "eight", "mixed"] {
        let (branch, dir) = (scratch.out().join(name), exported.join(name));
        let receipt = verify(&dir, &branch);
        let checks = receipt["checks"].as_array().unwrap();
        let same = checks
            .iter()
            .find(|it| it["name"] == "same weights")
            .unwrap();
        assert!(
            same["detail"].as_str().unwrap().contains("to the bit"),
            "{same}"
        );
        let digests = checks.iter().find(|it| it["name"] == "digests").unwrap();
        assert!(
            digests["detail"]
                .as_str()
                .unwrap()
                .contains("weight_packed"),
            "{digests}"
        );
        let found = inspect(&dir);
        assert_eq!(found["format"], "compressed-tensors", "{name}");
        assert_eq!(found["linears"], {
            let mut linears = inspect(&branch)["linears"].clone();
            for linear in linears.as_array_mut().unwrap() {
                linear["g_idx"] = false.into();
            }
            linears
        });
        assert_eq!(greedy(&dir), greedy(&branch), "{name}");
        // And back: the files that the run wrote.
        let back = scratch.path("back").join(name);
        export(&dir, "gptq", &back);
        let weights = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
        assert!(weights(&back) == weights(&branch), "{name}");
        let settings = |dir: &Path| json(dir.join("quantize_config.json"))["dynamic"].clone();
        assert_eq!(settings(&back), settings(&branch), "{name}");
    }
    let config = json(exported.join("mixed/config.json"));
    let settings = &config["quantization_config"];
    assert_eq!(settings["quant_method"], "compressed-tensors");
    assert_eq!(
        settings["config_groups"]["group_1"]["weights"]["num_bits"],
        8
    );
    assert_eq!(settings["ignore"].as_array().unwrap().len(), 2);
    assert!(!exported.join("mixed/quantize_config.json").exists());
    // One flipped bit is found.
    let file = exported.join("four/model.safetensors");
    let name = "model.layers.1.mlp.up_proj.weight_packed";
    crate::harness::edit_tensor(&file, name, |bytes| bytes[40] ^= 1);
    let (dir, branch) = (exported.join("four"), scratch.out().join("four"));
    let line = refuse([
        "verify",
        dir.to_str().unwrap(),
        "--branch",
        branch.to_str().unwrap(),
        "--no-receipt",
    ]);
    assert!(
        line.contains("model.layers.1.mlp.up_proj.weight differs from that of"),
        "{line}"
    );
    assert!(
        line.contains("weight_packed differs from its recorded digest"),
        "{line}"
    );
}

#[test]
fn a_recipe_writes_what_an_export_of_its_branch_would() {
    let scratch = Scratch::new();
    let branches = BRANCHES.replace(
        "[[branch]]\n",
        "[[branch]]\nformat = \"compressed-tensors\"\n",
    );
    quantize(&scratch.recipe(&medi_tiny(), &branches));
    let direct = scratch.path("direct");
    fs::rename(scratch.out(), &direct).unwrap();
    quantize(&scratch.recipe(&medi_tiny(), BRANCHES));
    let exported = scratch.path("exported");
    export(&scratch.out(), "compressed-tensors", &exported);
    for name in ["four", "asymmetric", "eight", "mixed"] {
        for file in ["model.safetensors", "config.json", "tokenizer.json"] {
            let read = |dir: &Path| fs::read(dir.join(name).join(file)).unwrap();
            assert!(read(&direct) == read(&exported), "{name}/{file}");
        }
    }
    succeed(["verify", direct.to_str().unwrap()]);
    let table = succeed(["inspect", direct.to_str().unwrap()]);
    assert!(table.contains("compressed-tensors"), "{table}");
}

#[test]
fn act_order_in_scattered_groups_is_refused_before_any_work() {
    let scratch = Scratch::new();
    let branch = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 128\ndesc_act = true\n";
    let recipe = scratch.recipe(
        &medi_tiny(),
        &format!("{branch}format = \"compressed-tensors\"\n"),
    );
    for command in ["plan", "quantize"] {
        let line = refuse([command, recipe.to_str().unwrap()]);
        for words in [
            "cannot hold act order",
            "static_groups = true or desc_act = false",
            "recipe.toml:",
        ] {
            assert!(line.contains(words), "{words:?} is not in: {line}");
        }
    }
    scratch.assert_nothing_written();
    let recipe = scratch.recipe(&medi_tiny(), &format!("{branch}format = \"onnx\"\n"));
    let line = refuse(["plan", recipe.to_str().unwrap()]);
    assert!(
        line.contains("format \"onnx\" is not one of gptq, compressed-tensors"),
        "{line}"
    );
    // A finished branch, by another tool.
    let dir = gptqmodel_branch(&scratch);
    let output = scratch.path("exported");
    let line = refuse([
        "export",
        dir.to_str().unwrap(),
        "--to",
        "compressed-tensors",
        "--output",
        output.to_str().unwrap(),
    ]);
    for words in [
        "self_attn.q_proj does not fit compressed-tensors",
        "desc_act = false",
    ] {
        assert!(line.contains(words), "{words:?} is not in: {line}");
    }
    assert!(!output.exists());
    let dense = root().join(medi_tiny());
    let line = refuse(["export", dense.to_str().unwrap(), "--to", "gptq"]);
    assert!(line.contains("not quantized"), "{line}");
    let line = refuse(["export", dir.to_str().unwrap(), "--to", "gptq"]);
    assert!(line.contains("already has the format gptq"), "{line}");
}

/// Families with a row in llama.cpp's table.
const FAMILIES: [&str; 12] = [
    "llama",
    "llama3",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3-longrope",
    "granite",
    "olmo2",
    "smollm3",
    "mixtral",
    "qwen3_moe",
];

/// Sets what llama.cpp computes without being told, where the fixture has something else on purpose.
fn as_llama_cpp_computes(path: &Path, family: &str) {
    let mut config = json(path.to_owned());
    match family {
        "gemma2" => config["query_pre_attn_scalar"] = 32.into(),
        "gemma3_text" => {
            config["query_pre_attn_scalar"] = 32.into();
            config["layer_types"] = vec!["sliding_attention"; 3].into();
        }
        "smollm3" => config["no_rope_layers"] = vec![1; 3].into(),
        _ => return,
    }
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn every_family_that_llama_cpp_runs_goes_into_a_gguf_file() {
    for family in FAMILIES {
        let scratch = Scratch::new();
        let model = crate::families::model(&scratch, family);
        as_llama_cpp_computes(&model.join("config.json"), family);
        // Rows of a linear in full precision are ordered like those of others.
        let skipped = if family.starts_with("phi3") {
            "qkv_proj"
        } else {
            "q_proj"
        };
        let branch = format!(
            "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\npreset = \"standard\"\n\
             [[branch.override]]\nmatch = \"*.layers.0.self_attn.{skipped}\"\nskip = true\n"
        );
        let recipe = scratch.recipe(&model, &branch);
        let flags = ["--device", "cpu", "--samples", "4", "--seq-len", "64"];
        succeed(["quantize", recipe.to_str().unwrap()].iter().chain(&flags));
        let (dir, file) = (scratch.out().join("a"), scratch.path("a.gguf"));
        let said = export(&dir, "gguf", &file);
        assert!(said.contains("a.gguf: gguf, "), "{family}: {said}");
        let text = succeed([
            "verify",
            file.to_str().unwrap(),
            "--branch",
            dir.to_str().unwrap(),
            "--json",
        ]);
        let checks: Value = serde_json::from_str(&text).unwrap();
        assert!(
            checks[1]["detail"].as_str().unwrap().contains("to the bit"),
            "{family}: {text}"
        );
        let found = inspect(&file);
        assert_eq!(found["format"], "gguf");
        // Those of all experts of a block are one.
        let tensors = found["tensors"].as_array().unwrap().iter();
        let tensors = tensors.filter(|it| it["dtype"] == "Q4_0");
        let counts = tensors.map(|it| match it["shape"].as_array().unwrap().len() {
            3 => it["shape"][0].as_u64().unwrap() as usize,
            _ => 1,
        });
        let quantized: usize = counts.sum();
        let linears = inspect(&dir)["linears"].as_array().unwrap().len();
        assert_eq!(quantized, linears, "{family}");
    }
}

/// Branches with a GGUF file each, one of them with overrides.
const WITH_GGUF: &str = r#"
[defaults]
format = "gguf"
group_size = 64
desc_act = false

[[branch]]
name = "a"
bits = 4

[[branch]]
name = "b"
bits = 4
sym = false

[[branch.override]]
match = "*.down_proj"
bits = 3

[[branch.override]]
match = "*.layers.0.self_attn.q_proj"
skip = true
"#;

#[test]
fn a_recipe_writes_gguf_files_beside_the_tensors_they_were_made_from() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), WITH_GGUF);
    let planned = succeed(["plan", recipe.to_str().unwrap(), "--json"]);
    let planned: Value = serde_json::from_str(&planned).unwrap();
    quantize(&recipe);
    let report = json(scratch.out().join("a/report.json"));
    let planned = planned["branches"][0]["bytes"].as_u64().unwrap();
    let found = report["bytes"].as_u64().unwrap();
    assert!(
        found > planned && found < planned + (1 << 20),
        "{found} {planned}"
    );
    let sizes = ["a.gguf", "model.safetensors"].map(|name| {
        let path = scratch.out().join("a").join(name);
        fs::metadata(path).unwrap().len()
    });
    assert_eq!(sizes.iter().sum::<u64>(), found);
    for name in ["a", "b"] {
        let dir = scratch.out().join(name);
        let (file, exported) = (
            dir.join(format!("{name}.gguf")),
            scratch.path(&format!("exported-{name}.gguf")),
        );
        let said = succeed(["verify", dir.to_str().unwrap()]);
        assert!(said.contains("to the bit those of"), "{said}");
        export(&dir, "gguf", &exported);
        assert!(fs::read(&file).unwrap() == fs::read(&exported).unwrap());
        let found = inspect(&dir);
        let clients = found["clients"].as_array().unwrap();
        let own = clients.iter().find(|it| it["name"] == "llama.cpp").unwrap();
        assert_eq!(
            (&own["loads"], &own["note"]),
            (&true.into(), &"its gguf file".into())
        );
    }
    // A finished branch stays as it is.
    let again = succeed([
        "quantize",
        recipe.to_str().unwrap(),
        "--device",
        "cpu",
        "--samples",
        "2",
        "--seq-len",
        "128",
    ]);
    assert!(again.contains("written to"), "{again}");
    let file = scratch.out().join("a/a.gguf");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() - 4096;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    let line = refuse([
        "verify",
        scratch.out().join("a").to_str().unwrap(),
        "--no-receipt",
    ]);
    assert!(
        line.contains("a.gguf: ") && line.contains("differs from"),
        "{line}"
    );
}

#[test]
fn an_interrupted_run_ends_with_the_same_gguf_files() {
    let branch = "[[branch]]\nname = \"a\"\nformat = \"gguf\"\nbits = 4\ngroup_size = 64\n";
    let (expected, _) = crate::resume::uninterrupted(branch, &crate::resume::SLOW);
    let scratch = Scratch::new();
    let (recipe, out) = (scratch.recipe(&medi_tiny(), branch), scratch.out());
    crate::resume::killed_after_a_block(&recipe, &out, &crate::resume::SLOW);
    // What a run leaves that is stopped in its end.
    for name in ["a.gguf", "a.gguf.partial"] {
        fs::write(out.join("a.partial").join(name), "half").unwrap();
    }
    let run = crate::resume::quantize(&recipe, &crate::resume::SLOW).output();
    assert!(run.unwrap().status.success());
    crate::resume::assert_same(&out, &expected);
}

#[test]
fn what_a_gguf_file_cannot_hold_is_refused_with_the_recipe() {
    let scratch = Scratch::new();
    let gguf = "[[branch]]\nname = \"a\"\nformat = \"gguf\"\n";
    for (settings, words) in [
        (
            "bits = 4\ndesc_act = true\nstatic_groups = false\n",
            "gguf cannot hold act order",
        ),
        (
            "bits = 8\nsym = false\ndesc_act = false\n",
            "no type for asymmetric codes of 8 bits",
        ),
        ("bits = 4\ngroup_size = 16\n", "multiple of 32"),
        ("budget_bits = 4.5\n", "run gptq export --to gguf"),
    ] {
        let recipe = scratch.recipe(&medi_tiny(), &format!("{gguf}{settings}"));
        for command in ["plan", "quantize"] {
            let line = refuse([command, recipe.to_str().unwrap()]);
            assert!(
                line.contains(words) && line.contains("recipe.toml:"),
                "{line}"
            );
        }
    }
    scratch.assert_nothing_written();
    let four = format!("{gguf}bits = 4\ngroup_size = 32\n");
    let scratch = Scratch::new();
    let model = crate::families::model(&scratch, "cohere2");
    let line = refuse(["plan", scratch.recipe(&model, &four).to_str().unwrap()]);
    assert!(
        line.contains("gguf files of this family are not written"),
        "{line}"
    );
    let experts = format!(
        "{four}desc_act = false\n[[branch.override]]\nmatch = \"*.experts.3.w2\"\nbits = 8\n"
    );
    let scratch = Scratch::new();
    let model = crate::families::model(&scratch, "mixtral");
    let line = refuse(["plan", scratch.recipe(&model, &experts).to_str().unwrap()]);
    assert!(
        line.contains("experts.3.w2: llama.cpp holds all experts of a block in one tensor"),
        "{line}"
    );
    // A tokenizer that splits as none that llama.cpp knows.
    let scratch = Scratch::new();
    let model = crate::families::model(&scratch, "llama");
    let path = model.join("tokenizer.json");
    let mut tokenizer = json(path.clone());
    tokenizer["pre_tokenizer"] = serde_json::json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": false},
    ]});
    fs::write(&path, tokenizer.to_string()).unwrap();
    let recipe = scratch.recipe(&model, &four);
    for command in ["plan", "quantize"] {
        let line = refuse([
            command,
            recipe.to_str().unwrap(),
            "--samples",
            "2",
            "--seq-len",
            "64",
        ]);
        assert!(line.contains("llama.cpp has no name for"), "{line}");
    }
    scratch.assert_nothing_written();
}

#[test]
fn gguf_files_hold_every_width_and_say_what_they_cannot() {
    let scratch = Scratch::new();
    let asymmetric =
        "[[branch]]\nname = \"five\"\nbits = 4\ngroup_size = 64\nsym = false\ndesc_act = false\n";
    quantize(&scratch.recipe(&medi_tiny(), &format!("{BRANCHES}{asymmetric}")));
    let output = scratch.path("gguf");
    export(&scratch.out(), "gguf", &output);
    for (name, kind) in [
        ("four", "Q4_0"),
        ("asymmetric", "Q5_0"),
        ("eight", "Q8_0"),
        ("mixed", "Q4_0"),
        ("five", "Q5_0"),
    ] {
        let (file, branch) = (
            output.join(format!("{name}.gguf")),
            scratch.out().join(name),
        );
        let said = succeed([
            "verify",
            file.to_str().unwrap(),
            "--branch",
            branch.to_str().unwrap(),
        ]);
        assert!(
            said.contains("to the bit") && said.contains(kind),
            "{name}: {said}"
        );
    }
    let (file, branch) = (output.join("four.gguf"), scratch.out().join("four"));
    let rounded = scratch.path("rounded.gguf");
    succeed([
        "export",
        branch.to_str().unwrap(),
        "--to",
        "gguf",
        "--tables",
        "q8_0",
        "--output",
        rounded.to_str().unwrap(),
    ]);
    let verify = |file: &Path, branch: &Path| {
        [
            "verify",
            file.to_str().unwrap(),
            "--branch",
            branch.to_str().unwrap(),
        ]
        .map(str::to_owned)
    };
    let said = succeed(verify(&rounded, &branch));
    assert!(said.contains("2 Q8_0") && !said.contains("F16"), "{said}");
    // Files that exist stay, other branches differ, damage is one line.
    let line = refuse([
        "export",
        branch.to_str().unwrap(),
        "--to",
        "gguf",
        "--output",
        file.to_str().unwrap(),
    ]);
    assert!(line.contains("exists already"), "{line}");
    let line = refuse(verify(&file, &scratch.out().join("mixed")));
    assert!(line.contains("differs from model."), "{line}");
    let mut bytes = fs::read(&file).unwrap();
    bytes.truncate(bytes.len() / 2);
    fs::write(&file, bytes).unwrap();
    for line in [
        refuse(verify(&file, &branch)),
        refuse(["inspect", file.to_str().unwrap()]),
    ] {
        assert!(line.contains("is not within the file"), "{line}");
    }
    let dir = gptqmodel_branch(&scratch);
    let line = refuse(["export", dir.to_str().unwrap(), "--to", "gguf"]);
    assert!(line.contains("gguf cannot hold act order"), "{line}");
}

#[test]
fn mlx_files_have_the_weights_to_the_bit_and_say_what_they_cannot() {
    let scratch = Scratch::new();
    let three = "[[branch]]\nname = \"three\"\nbits = 3\ngroup_size = 32\n";
    let mixed = BRANCHES.split("[[branch]]").last().unwrap();
    quantize(&scratch.recipe(&medi_tiny(), &format!("{three}[[branch]]{mixed}")));
    for name in ["three", "mixed"] {
        let (branch, dir) = (scratch.out().join(name), scratch.path("mlx").join(name));
        export(&branch, "mlx", &dir);
        verify(&dir, &branch);
        let found = inspect(&dir);
        assert_eq!(found["format"], "mlx");
        let loads = found["clients"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|it| it["loads"] == true);
        let loads: Vec<&str> = loads.map(|it| it["name"].as_str().unwrap()).collect();
        assert_eq!(loads, ["mlx-lm"]);
        assert_eq!(greedy(&dir), greedy(&branch), "{name}");
    }
    let config = json(scratch.path("mlx/mixed/config.json"));
    let quantization = &config["quantization"];
    assert_eq!(quantization["model.layers.1.mlp.down_proj"]["bits"], 8);
    assert_eq!(quantization["model.layers.0.self_attn.k_proj"], false);
    let recipe = "[[branch]]\nname = \"a\"\nformat = \"mlx\"\nbits = 4\n";
    for (settings, words) in [
        ("group_size = 256\n", "groups of 32, 64 and 128 only"),
        ("group_size = 64\nsym = false\n", "asymmetric codes"),
    ] {
        let recipe = scratch.recipe(&medi_tiny(), &format!("{recipe}{settings}"));
        let line = refuse(["plan", recipe.to_str().unwrap()]);
        assert!(line.contains(words), "{line}");
    }
}
