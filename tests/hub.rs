//! Models and datasets from a Hub on the loopback: downloads, resumption, refusals.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::harness::{Scratch, command, medi_tiny, refused, root, succeed, succeeded};
use crate::hub_bytes::commit;
use crate::hub_server::{HubServer, Wrong, silent};

pub(crate) const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n";
pub(crate) const MODEL: &str = "medi/tiny";
const DATASET: &str = "medi/wikidoc";
pub(crate) const WIKIDOC: &str = "calibration/wikidoc/wikidoc_patient_information_1000.json";
const TOKEN: &str = "hf_secretSecretSECRET";

/// Starts a Hub with the bundled model, and with other files that are not needed.
pub(crate) fn hub() -> HubServer {
    let hub = HubServer::start();
    for entry in fs::read_dir(root().join(medi_tiny())).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        hub.put("models", MODEL, "main", name, &fs::read(&path).unwrap());
    }
    for name in ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"] {
        hub.put("models", MODEL, "main", name, &[7; 30_000]);
    }
    hub
}

/// Runs `gptq` against the Hub, with a cache in the scratch directory.
pub(crate) fn run(scratch: &Scratch, hub: &str, args: &[&str]) -> Output {
    silent(command(args).env("HF_HOME", scratch.path("hf")), hub, TOKEN)
}

pub(crate) fn quantize(scratch: &Scratch, hub: &HubServer) -> Output {
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    run(scratch, &hub.url(), &["quantize", recipe.to_str().unwrap()])
}

fn weights(scratch: &Scratch) -> Vec<u8> {
    fs::read(scratch.out().join("a/model.safetensors")).unwrap()
}

pub(crate) fn snapshot(scratch: &Scratch) -> PathBuf {
    let commit = commit(MODEL, "main");
    scratch
        .path("hf/hub/models--medi--tiny/snapshots")
        .join(commit)
}

/// Splits the bundled model into two shards.
pub(crate) fn shards() -> Vec<(String, Vec<u8>)> {
    let whole = fs::read(root().join(medi_tiny()).join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let mut map = serde_json::Map::new();
    let mut files = Vec::new();
    for part in 0..2 {
        let name = format!("model-{}-of-2.safetensors", part + 1);
        let own = tensors.tensors().into_iter().enumerate();
        let own: Vec<_> = own.filter(|(i, _)| i % 2 == part).map(|(_, t)| t).collect();
        for (tensor, _) in &own {
            map.insert(tensor.clone(), name.clone().into());
        }
        files.push((name, safetensors::serialize(own, None).unwrap()));
    }
    let index = serde_json::json!({"weight_map": map});
    files.push((
        "model.safetensors.index.json".into(),
        index.to_string().into_bytes(),
    ));
    files
}

#[test]
fn every_route_of_a_model_gives_the_same_bytes() {
    let local = Scratch::new();
    let recipe = local.recipe(&medi_tiny(), ONE);
    succeed(["quantize", recipe.to_str().unwrap()]);

    let (single, hub) = (Scratch::new(), hub());
    let fetched = quantize(&single, &hub);
    let told = String::from_utf8_lossy(&fetched.stderr).into_owned();
    succeeded(fetched);
    assert!(weights(&single) == weights(&local), "from the Hub");
    let size = fs::metadata(root().join(medi_tiny()).join("model.safetensors")).unwrap();
    let size = format!("{:.2} MB", size.len() as f64 / 1e6);
    let begun = format!("downloading 1 file of {MODEL}, {size}\n");
    assert!(told.contains(&begun), "{told}");
    assert!(
        told.contains(&format!("downloaded {MODEL}: {size} in ")),
        "{told}"
    );
    let asked = hub.requests().join("\n");
    for file in ["pytorch_model.bin", "tf_model.h5", "onnx", "README"] {
        assert!(
            !asked.contains(&format!("resolve/{}/{file}", commit(MODEL, "main"))),
            "{asked}"
        );
    }
    assert!(asked.contains(&format!("Bearer {TOKEN}")), "{asked}");

    // Again, offline and without any request.
    let args = [
        "quantize",
        &single.path("recipe.toml").display().to_string(),
    ]
    .map(str::to_owned);
    let offline = command(&args)
        .env("HF_HOME", single.path("hf"))
        .env("HF_ENDPOINT", hub.url())
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    succeeded(offline);
    assert_eq!(hub.requests(), Vec::<String>::new());
    assert!(weights(&single) == weights(&local), "offline");
    let gone = "http://127.0.0.1:9";
    let stale = run(&single, gone, &["quantize", &args[1]]);
    let told = String::from_utf8_lossy(&stale.stderr).into_owned();
    succeeded(stale);
    assert!(
        told.contains("cannot be reached") && told.contains(MODEL),
        "{told}"
    );
    assert!(!told.contains("download"), "{told}");

    let (sharded, hub) = (Scratch::new(), HubServer::start());
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        let bytes = fs::read(root().join(medi_tiny()).join(name)).unwrap();
        hub.put("models", MODEL, "main", name, &bytes);
    }
    for (name, bytes) in shards() {
        hub.put("models", MODEL, "main", &name, &bytes);
    }
    hub.put(
        "models",
        MODEL,
        "main",
        "model-9-of-9.safetensors",
        b"not in the index",
    );
    succeeded(quantize(&sharded, &hub));
    assert!(weights(&sharded) == weights(&local), "in shards");
    assert!(!hub.requests().join("\n").contains("model-9-of-9"));
}

#[test]
fn the_cache_is_laid_out_as_every_tool_expects() {
    let (scratch, hub) = (Scratch::new(), hub());
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let args = ["calibration", "show", recipe.to_str().unwrap()];
    succeeded(run(&scratch, &hub.url(), &args));
    let repo = scratch.path("hf/hub/models--medi--tiny");
    let main = fs::read_to_string(repo.join("refs/main")).unwrap();
    assert_eq!(main, commit(MODEL, "main"));
    let link = fs::read_link(snapshot(&scratch).join("tokenizer.json")).unwrap();
    assert!(link.starts_with("../../blobs"), "{}", link.display());
    assert!(
        !snapshot(&scratch).join("model.safetensors").exists(),
        "weights are not needed to look at calibration data"
    );
    // The same commit again: nothing is downloaded a second time.
    hub.requests();
    succeeded(run(&scratch, &hub.url(), &args));
    let asked = hub.requests().join("\n");
    assert!(
        !asked.contains("resolve") && asked.contains("revision/main"),
        "{asked}"
    );
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    let (scratch, hub) = (Scratch::new(), hub());
    hub.fail("cdn", 1, Wrong::Cut(100_000));
    succeeded(quantize(&scratch, &hub));
    let asked = hub.requests().join("\n");
    assert!(asked.contains("bytes=100000-"), "{asked}");

    // Interrupted for good, and resumed by the next run.
    let scratch = Scratch::new();
    hub.fail("cdn", 1, Wrong::Cut(150_000));
    hub.fail("cdn", 100, Wrong::Cut(0));
    let line = refused(quantize(&scratch, &hub));
    assert!(line.contains("the partial download is kept"), "{line}");
    scratch.assert_nothing_written();
    hub.heal();
    hub.requests();
    succeeded(quantize(&scratch, &hub));
    let asked = hub.requests().join("\n");
    assert!(asked.contains("bytes=150000-"), "{asked}");

    // The server does not support ranges, so the download starts over.
    let scratch = Scratch::new();
    hub.fail("cdn", 1, Wrong::Cut(50_000));
    hub.fail("cdn", 1, Wrong::Whole);
    succeeded(quantize(&scratch, &hub));
    let whole = fs::read(root().join(medi_tiny()).join("model.safetensors")).unwrap();
    let fetched = fs::read(snapshot(&scratch).join("model.safetensors")).unwrap();
    assert!(fetched == whole, "byte for byte");
}

#[test]
fn what_is_not_what_git_says_is_refused() {
    for (path, wrong, word) in [
        ("cdn", Wrong::Flipped, "a wrong hash"),
        ("cdn", Wrong::Longer(10), "longer than"),
        ("tokenizer_config.json", Wrong::Flipped, "a wrong hash"),
    ] {
        let (scratch, hub) = (Scratch::new(), hub());
        hub.fail(path, 100, wrong);
        let line = refused(quantize(&scratch, &hub));
        assert!(line.contains(word) && line.contains(MODEL), "{line}");
        scratch.assert_nothing_written();
        hub.heal();
        succeeded(quantize(&scratch, &hub));
    }
}

/// Returns the output of `calibration show --json` for a recipe with this source.
fn shown(scratch: &Scratch, hub: &HubServer, source: &str, more: &str) -> serde_json::Value {
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let text = fs::read_to_string(&recipe).unwrap();
    let text = text.replace(&format!("{WIKIDOC:?}"), &format!("{source:?}\n{more}"));
    fs::write(&recipe, text).unwrap();
    let args = ["calibration", "show", recipe.to_str().unwrap(), "--json"];
    serde_json::from_str(&succeeded(run(scratch, &hub.url(), &args))).unwrap()
}

#[test]
fn a_dataset_s_own_files_or_its_parquet_conversion_give_the_local_windows() {
    let (scratch, hub) = (Scratch::new(), HubServer::start());
    let local = shown(&scratch, &hub, WIKIDOC, "");
    let rows = fs::read(root().join(WIKIDOC)).unwrap();
    hub.put("datasets", DATASET, "main", "README.md", b"rows");
    hub.put(
        "datasets",
        DATASET,
        "main",
        "medical_meadow_wikidoc.json",
        &rows,
    );
    let own = shown(&scratch, &hub, DATASET, "");
    assert_eq!(own["first_window"], local["first_window"]);
    assert_eq!(own["manifest"]["source"], DATASET);
    assert_eq!(
        own["manifest"]["revision"],
        commit(DATASET, "main").as_str()
    );
    assert_eq!(
        own["manifest"]["files"][0]["name"],
        "medical_meadow_wikidoc.json"
    );
    assert_eq!(
        own["manifest"]["files"][0]["sha256"],
        local["manifest"]["files"][0]["sha256"]
    );

    // A script and archives: the rows come from the Hub's conversion.
    let other = "medi/scripted";
    hub.put("datasets", other, "main", "scripted.py", b"import os");
    hub.put("datasets", other, "main", "data.tar", &[0; 512]);
    let converted = "refs/convert/parquet";
    for (part, rows) in [
        ("train", crate::inputs::parquet(&rows)),
        ("test", vec![1, 2, 3]),
    ] {
        let path = format!("default/{part}/0000.parquet");
        hub.put("datasets", other, converted, &path, &rows);
    }
    let parquet = shown(&scratch, &hub, other, "");
    assert_eq!(parquet["first_window"], local["first_window"]);
    let files = parquet["manifest"]["files"].as_array().unwrap();
    assert_eq!(files.len(), 1, "the training part: {files:?}");

    // Selected files, and a revision.
    hub.put("datasets", DATASET, "v2", "a.jsonl", b"{\"text\": \"x\"}\n");
    hub.put("datasets", DATASET, "v2", "part/b.json", &rows);
    let chosen = shown(
        &scratch,
        &hub,
        DATASET,
        "revision = \"v2\"\nfiles = \"part/*\"",
    );
    assert_eq!(chosen["first_window"], local["first_window"]);
    assert_eq!(chosen["manifest"]["files"][0]["name"], "part/b.json");
    let args = [
        "calibration",
        "show",
        "configs/tiny.toml",
        "--calibration",
        "medi/none",
    ];
    let line = refused(run(&scratch, &hub.url(), &args));
    assert!(line.contains("no dataset medi/none"), "{line}");
}

#[test]
fn pytorch_shards_from_the_hub_give_the_bytes_of_the_same_model_in_safetensors() {
    let families = root().join("tests/golden/families");
    let put = |hub: &HubServer, from: &Path, name: &str| {
        let bytes = fs::read(from.join(name)).unwrap();
        hub.put("models", MODEL, "main", name, &bytes);
    };
    let made = |files: &[(&str, &str)]| {
        let (scratch, hub) = (Scratch::new(), HubServer::start());
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            put(&hub, &families, name);
        }
        for (dir, name) in files {
            put(&hub, &families.join(dir), name);
        }
        let branch = ONE.replace("64", "32");
        let recipe = scratch.recipe(Path::new(MODEL), &branch);
        let recipe = recipe.to_str().unwrap();
        let args = ["quantize", recipe, "--seq-len", "64", "--device", "cpu"];
        succeeded(run(&scratch, &hub.url(), &args));
        weights(&scratch)
    };
    let safetensors = made(&[("llama", "config.json"), ("llama", "model.safetensors")]);
    let torch = made(&[
        ("llama", "config.json"),
        ("bin", "pytorch_model.bin.index.json"),
        ("bin", "pytorch_model-00001-of-00002.bin"),
        ("bin", "pytorch_model-00002-of-00002.bin"),
    ]);
    assert!(torch == safetensors, "other bytes");
}

#[test]
fn the_token_is_in_no_log_however_much_is_logged() {
    let (scratch, hub) = (Scratch::new(), hub());
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let log = scratch.path("all.log");
    let args = ["quantize", recipe.to_str().unwrap(), "--log-file"];
    let mut run = command(args.iter().chain(&[log.to_str().unwrap()]));
    run.env("HF_HOME", scratch.path("hf"))
        .env("RUST_LOG", "trace");
    succeeded(silent(&mut run, &hub.url(), TOKEN));
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("TRACE") && text.contains("hyper"), "much");
    assert!(!text.contains(TOKEN), "the token is logged");
}
