//! The cache: what it must contain for offline use, and what must not be modified in it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::SystemTime;

use crate::harness::{Scratch, command, medi_tiny, refused, root, succeeded};
use crate::hub::{MODEL, ONE, WIKIDOC, hub, run, snapshot};
use crate::hub_bytes::{commit, git_oid, sha256};
use crate::hub_server::{HubServer, Wrong};

const DATASET: &str = "medi/shards";

/// Starts a Hub with a dataset of two shards.
fn dataset() -> HubServer {
    let hub = HubServer::start();
    let rows = fs::read(root().join(WIKIDOC)).unwrap();
    let more = b"[{\"input\": \"a\", \"output\": \"b\"}]";
    hub.put("datasets", DATASET, "main", "data/train-0.json", &rows);
    hub.put("datasets", DATASET, "main", "data/train-1.json", more);
    hub
}

/// Runs `calibration show` on the dataset with more recipe lines; without a Hub, offline.
fn show(scratch: &Scratch, hub: Option<&str>, more: &str) -> Output {
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let text = fs::read_to_string(&recipe).unwrap();
    let text = text.replace(&format!("{WIKIDOC:?}"), &format!("{DATASET:?}\n{more}"));
    fs::write(&recipe, text).unwrap();
    let args = ["calibration", "show", recipe.to_str().unwrap(), "--json"];
    match hub {
        Some(url) => run(scratch, url, &args),
        None => command(args)
            .env("HF_HOME", scratch.path("hf"))
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap(),
    }
}

/// Returns the number of files that `calibration show` used.
fn files(output: Output) -> usize {
    let shown: serde_json::Value = serde_json::from_str(&succeeded(output)).unwrap();
    shown["manifest"]["files"].as_array().unwrap().len()
}

#[test]
fn a_part_of_a_dataset_in_the_cache_does_not_stand_for_the_whole() {
    let (scratch, hub) = (Scratch::new(), dataset());
    let one = "files = \"data/train-0*\"";
    assert_eq!(files(show(&scratch, Some(&hub.url()), one)), 1);
    assert_eq!(files(show(&scratch, None, one)), 1);
    let line = refused(show(&scratch, None, ""));
    assert!(
        line.contains("data/train-1.json is incomplete") && line.contains("run once without"),
        "{line}"
    );
    let line = refused(show(&scratch, Some("http://127.0.0.1:9"), ""));
    assert!(line.contains("cannot be reached"), "{line}");
    assert_eq!(files(show(&scratch, Some(&hub.url()), "")), 2);
    assert_eq!(files(show(&scratch, None, "")), 2);

    // A first download that was interrupted between the shards, of a commit that needs no lookup.
    let (scratch, hub) = (Scratch::new(), dataset());
    let pinned = format!("revision = {:?}", commit(DATASET, "main"));
    hub.fail("train-1", 1000, Wrong::Cut(0));
    refused(show(&scratch, Some(&hub.url()), &pinned));
    let line = refused(show(&scratch, None, &pinned));
    assert!(line.contains("data/train-1.json"), "{line}");
    hub.heal();
    assert_eq!(files(show(&scratch, Some(&hub.url()), &pinned)), 2);
    assert_eq!(files(show(&scratch, None, &pinned)), 2);

    // Without a listing the cache is used, with a warning.
    fs::remove_dir_all(scratch.path("hf/hub/datasets--medi--shards/.gptq")).unwrap();
    let unchecked = show(&scratch, None, &pinned);
    let told = String::from_utf8_lossy(&unchecked.stderr).into_owned();
    assert_eq!(files(unchecked), 2);
    assert!(told.contains("could not be checked"), "{told}");
}

#[test]
fn a_conversion_in_the_cache_serves_whether_the_hub_is_away_or_not_asked() {
    let (scratch, hub) = (Scratch::new(), HubServer::start());
    let rows = crate::inputs::parquet(&fs::read(root().join(WIKIDOC)).unwrap());
    let converted = "refs/convert/parquet";
    let path = "default/train/0000.parquet";
    hub.put("datasets", DATASET, "main", "scripted.py", b"import os");
    hub.put("datasets", DATASET, converted, path, &rows);
    assert_eq!(files(show(&scratch, Some(&hub.url()), "")), 1);
    assert_eq!(files(show(&scratch, None, "")), 1);
    assert_eq!(files(show(&scratch, Some("http://127.0.0.1:9"), "")), 1);
}

#[test]
fn a_tokenizer_in_the_cache_without_all_of_its_files_is_not_a_tokenizer() {
    let (scratch, hub) = (Scratch::new(), hub());
    let name = "special_tokens_map.json";
    hub.put("models", MODEL, "main", name, b"{}");
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let args = ["calibration", "show", recipe.to_str().unwrap()];
    succeeded(run(&scratch, &hub.url(), &args));
    fs::remove_file(snapshot(&scratch).join(name)).unwrap();
    let offline = command(args)
        .env("HF_HOME", scratch.path("hf"))
        .env("HF_HUB_OFFLINE", "1")
        .output();
    let line = refused(offline.unwrap());
    assert!(line.contains(&format!("{name} is incomplete")), "{line}");
}

/// Returns the modification times of all files, links and directories below `dir`.
fn times(dir: &Path) -> Vec<(PathBuf, SystemTime)> {
    let mut times = Vec::new();
    let mut paths = vec![dir.to_owned()];
    while let Some(path) = paths.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        times.push((path, metadata.modified().unwrap()));
    }
    times.sort();
    times
}

/// Runs with a complete cache, which must not be modified, and must not download anything.
fn assert_left_alone(scratch: &Scratch, hub: &HubServer) {
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let before = times(&scratch.path("hf/hub/models--medi--tiny"));
    hub.requests();
    let args = ["quantize", recipe.to_str().unwrap()];
    succeeded(run(scratch, &hub.url(), &args));
    let asked = hub.requests().join("\n");
    assert!(!asked.contains("resolve"), "{asked}");
    assert!(asked.contains("revision"), "it was online: {asked}");
    assert_eq!(before, times(&scratch.path("hf/hub/models--medi--tiny")));
    fs::remove_dir_all(scratch.out()).unwrap();
}

/// Makes everything below `dir` read-only, or writable again.
fn read_only(dir: &Path, yes: bool) {
    for (path, _) in times(dir) {
        let mut permissions = fs::symlink_metadata(&path).unwrap().permissions();
        if permissions.readonly() != yes && !path.is_symlink() {
            let mode = if yes { 0o555 } else { 0o755 };
            std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, mode);
            fs::set_permissions(&path, permissions).unwrap();
        }
    }
}

#[test]
fn a_cache_that_has_all_is_left_as_it_is() {
    let (scratch, hub) = (Scratch::new(), hub());
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let args = ["quantize", recipe.to_str().unwrap()];
    succeeded(run(&scratch, &hub.url(), &args));
    fs::remove_dir_all(scratch.out()).unwrap();
    // A read-only cache works, and a writable one is not written to.
    read_only(&scratch.path("hf"), true);
    assert_left_alone(&scratch, &hub);
    read_only(&scratch.path("hf"), false);

    // A link to a different content is replaced.
    let link = snapshot(&scratch).join("config.json");
    let right = fs::read_link(&link).unwrap();
    let tokenizer = fs::read_link(snapshot(&scratch).join("tokenizer.json")).unwrap();
    fs::remove_file(&link).unwrap();
    symlink(tokenizer, &link).unwrap();
    succeeded(run(&scratch, &hub.url(), &args));
    assert_eq!(fs::read_link(&link).unwrap(), right);
}

#[test]
fn caches_that_other_tools_made_are_used_as_they_are() {
    for links in [true, false] {
        let (scratch, hub) = (Scratch::new(), hub());
        let repo = scratch.path("hf/hub/models--medi--tiny");
        for dir in [&repo.join("refs"), &repo.join("blobs"), &snapshot(&scratch)] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(repo.join("refs/main"), commit(MODEL, "main")).unwrap();
        for name in [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ] {
            let Ok(bytes) = fs::read(root().join(medi_tiny()).join(name)) else {
                continue;
            };
            let etag = match bytes.len() < 20_000 {
                true => git_oid(&bytes),
                false => sha256(&bytes),
            };
            let place = snapshot(&scratch).join(name);
            match links {
                true => {
                    fs::write(repo.join("blobs").join(&etag), bytes).unwrap();
                    symlink(format!("../../blobs/{etag}"), place).unwrap();
                }
                false => fs::write(place, bytes).unwrap(),
            }
        }
        // Only the listing is written, once.
        fs::create_dir_all(repo.join(".gptq")).unwrap();
        let listing = repo
            .join(".gptq")
            .join(format!("{}.json", commit(MODEL, "main")));
        fs::write(&listing, "{\"files\": {}}").unwrap();
        assert_left_alone(&scratch, &hub);
    }
}
