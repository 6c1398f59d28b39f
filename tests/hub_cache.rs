//! The cache: what it must hold before it stands for the Hub, and what is left alone in it.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::harness::{Scratch, command, medi_tiny, refused, root, succeeded};
use crate::hub::{MODEL, ONE, WIKIDOC, hub, run, snapshot};
use crate::hub_server::{HubServer, Wrong, commit};

const DATASET: &str = "medi/shards";

/// A dataset of two shards.
fn dataset() -> HubServer {
    let hub = HubServer::start();
    let rows = fs::read(root().join(WIKIDOC)).unwrap();
    let more = b"[{\"input\": \"a\", \"output\": \"b\"}]";
    hub.put("datasets", DATASET, "main", "data/train-0.json", &rows);
    hub.put("datasets", DATASET, "main", "data/train-1.json", more);
    hub
}

/// `calibration show` of the dataset, with more lines beside its name; without a Hub, offline.
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

/// How many files `calibration show` took rows from.
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
        line.contains("data/train-1.json is not all there") && line.contains("run once without"),
        "{line}"
    );
    let line = refused(show(&scratch, Some("http://127.0.0.1:9"), ""));
    assert!(line.contains("cannot be reached"), "{line}");
    assert_eq!(files(show(&scratch, Some(&hub.url()), "")), 2);
    assert_eq!(files(show(&scratch, None, "")), 2);

    // A first download that broke off between the shards, of a commit that needs no looking up.
    let (scratch, hub) = (Scratch::new(), dataset());
    let pinned = format!("revision = {:?}", commit(DATASET, "main"));
    hub.fail("train-1", 1000, Wrong::Cut(0));
    refused(show(&scratch, Some(&hub.url()), &pinned));
    let line = refused(show(&scratch, None, &pinned));
    assert!(line.contains("data/train-1.json"), "{line}");
    hub.heal();
    assert_eq!(files(show(&scratch, Some(&hub.url()), &pinned)), 2);
    assert_eq!(files(show(&scratch, None, &pinned)), 2);

    // Without a listing it is taken, and that is said.
    fs::remove_dir_all(scratch.path("hf/hub/datasets--medi--shards/.gptq")).unwrap();
    let unchecked = show(&scratch, None, &pinned);
    let told = String::from_utf8_lossy(&unchecked.stderr).into_owned();
    assert_eq!(files(unchecked), 2);
    assert!(told.contains("could not be checked"), "{told}");
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
    assert!(line.contains(&format!("{name} is not all there")), "{line}");
}
