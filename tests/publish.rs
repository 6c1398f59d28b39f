//! `gptq publish`, against a Hub on the loopback.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::harness::{Scratch, command, medi_tiny, refused, succeed, succeeded};
use crate::hub_server::{HubServer, Wrong, silent};

const TWO: &str = "[[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 64\n\
                   [[branch]]\nname = \"8bit\"\nbits = 8\ngroup_size = -1\n";
const REPO: &str = "me/medi-GPTQ";
const TOKEN: &str = "hf_writeWriteWRITE";

fn publish(hub: &HubServer, dir: &Path, more: &[&str]) -> Output {
    let dir = dir.to_str().unwrap();
    let args = ["publish", dir, "--repo", REPO];
    silent(&mut command(args.iter().chain(more)), &hub.url(), TOKEN)
}

/// Verifies a branch; the result may then be changed.
fn verify(dir: &Path, pass: bool) {
    succeed(["verify", dir.to_str().unwrap()]);
    let path = dir.join("verify.json");
    let text = fs::read(&path).unwrap();
    let mut receipt: serde_json::Value = serde_json::from_slice(&text).unwrap();
    receipt["pass"] = pass.into();
    fs::write(path, receipt.to_string()).unwrap();
}

#[test]
fn verified_branches_become_revisions_and_only_changes_are_sent_again() {
    let (scratch, hub) = (Scratch::new(), HubServer::start());
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    succeed(["quantize", recipe.to_str().unwrap()]);
    let out = scratch.out();
    fs::write(out.join("README.md"), "# The card\n").unwrap();

    // Nothing is sent before every branch has passed.
    verify(&out.join("main"), true);
    let line = refused(publish(&hub, &out, &[]));
    assert!(
        line.contains("8bit: not verified") && line.contains("--unverified"),
        "{line}"
    );
    verify(&out.join("8bit"), false);
    let line = refused(publish(&hub, &out, &[]));
    assert!(line.contains("did not pass"), "{line}");
    verify(&out.join("8bit"), true);
    let config = out.join("8bit/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text} ")).unwrap();
    let line = refused(publish(&hub, &out, &[]));
    assert!(
        line.contains("config.json: changed since verification"),
        "{line}"
    );
    assert_eq!(hub.requests(), Vec::<String>::new(), "nobody was asked");
    fs::write(&config, text).unwrap();

    let planned = succeeded(publish(&hub, &out, &["--dry-run"]));
    assert!(
        planned.contains("model.safetensors") && planned.contains("(not sent)"),
        "{planned}"
    );
    assert!(
        !hub.requests().join("\n").contains("POST"),
        "a dry run changes nothing"
    );
    let record = succeeded(publish(&hub, &out, &["--dry-run", "--json"]));
    let record: serde_json::Value = serde_json::from_str(&record).unwrap();
    assert_eq!(
        (&record["repo"], &record["sent"]),
        (&REPO.into(), &false.into())
    );
    let main = &record["branches"][0];
    assert_eq!(
        (&main["branch"], &main["new_revision"]),
        (&"main".into(), &true.into())
    );
    let files = main["upload"].as_array().unwrap();
    let here = fs::read_dir(out.join("main")).unwrap().count() + 1;
    assert_eq!(files.len(), here, "and the card: {files:?}");

    // The connection breaks at the second branch: run again.
    hub.fail("commit/8bit", 100, Wrong::Status(503, ""));
    let line = refused(publish(&hub, &out, &[]));
    assert!(line.contains("503"), "{line}");
    hub.heal();
    let printed = succeeded(publish(&hub, &out, &[]));
    assert!(
        printed.contains("main: 0 of"),
        "main was there already: {printed}"
    );
    for branch in ["main", "8bit"] {
        let there = hub.files("models", REPO, branch).unwrap();
        for entry in fs::read_dir(out.join(branch)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            assert!(there[name] == fs::read(&path).unwrap(), "{branch}/{name}");
        }
        assert_eq!(there["README.md"], b"# The card\n");
    }

    // Only the changed files.
    fs::write(out.join("README.md"), "# Another card\n").unwrap();
    hub.requests();
    let printed = succeeded(publish(&hub, &out, &[]));
    assert!(
        printed.contains("main: 1 of") && printed.contains("8bit: 0 of"),
        "{printed}"
    );
    let posts = hub.requests();
    let commits = posts.iter().filter(|r| r.contains("/commit/"));
    assert_eq!(commits.count(), 1, "{posts:?}");
    assert_eq!(
        hub.files("models", REPO, "main").unwrap()["README.md"],
        b"# Another card\n"
    );
}

#[test]
fn a_token_is_asked_for_and_one_that_may_not_write_is_said_so() {
    let (scratch, hub) = (Scratch::new(), HubServer::start());
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    succeed(["quantize", recipe.to_str().unwrap(), "--branch", "main"]);
    let out = scratch.out();
    let args = [
        "publish",
        out.to_str().unwrap(),
        "--repo",
        REPO,
        "--unverified",
    ];
    let line = refused(
        command(args)
            .env("HF_ENDPOINT", hub.url())
            .output()
            .unwrap(),
    );
    assert!(line.contains("HF_TOKEN"), "{line}");
    hub.fail("repos/create", 100, Wrong::Status(403, ""));
    let line = refused(publish(&hub, &out, &["--unverified"]));
    assert!(line.contains("write"), "{line}");
    let line = refused(publish(&hub, Path::new("tests/models"), &[]));
    assert!(line.contains("contains no branch"), "{line}");
}

/// Returns the warnings in `output`.
fn warnings(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let warnings = stderr.lines().filter(|line| line.contains("warning:"));
    warnings.collect::<Vec<_>>().join("\n")
}

#[test]
fn weights_that_gptq_did_not_publish_stay_unless_the_command_says_otherwise() {
    let (scratch, hub) = (Scratch::new(), HubServer::start());
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    succeed(["quantize", recipe.to_str().unwrap()]);
    let out = scratch.out();
    let there = |revision: &str, name: &str| {
        let files = hub.files("models", REPO, revision).unwrap();
        files.get(name).cloned()
    };
    let posts = || {
        let requests = hub.requests();
        requests.iter().filter(|r| r.starts_with("POST")).count()
    };
    // Another user's dense model: two shards, and an index. Another program's report does not
    // count.
    for (name, bytes) in [
        ("model-00001-of-00002.safetensors", &b"one"[..]),
        ("model-00002-of-00002.safetensors", b"two"),
        ("model.safetensors.index.json", b"{}"),
        ("quantize_config.json", b"{\"bits\": 4}"),
        ("report.json", b"{\"linears\": 3}"),
    ] {
        hub.put("models", REPO, "main", name, bytes);
    }
    for flags in [&["--unverified"][..], &["--unverified", "--dry-run"]] {
        let line = refused(publish(&hub, &out, flags));
        for words in [
            "me/medi-GPTQ main",
            "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
            "check --repo",
            "--delete",
        ] {
            assert!(line.contains(words), "{words}: {line}");
        }
        assert_eq!(posts(), 0, "nothing is sent");
    }

    // A new branch removes nothing: `main`, of which it begins as a copy, keeps its files.
    let only = out.join("8bit");
    let one = scratch.path("one");
    fs::create_dir(&one).unwrap();
    fs::rename(&only, one.join("8bit")).unwrap();
    let output = publish(&hub, &one, &["--unverified"]);
    let said = warnings(&output);
    succeeded(output);
    assert!(
        said.contains("8bit: deletes model-00001-of-00002.safetensors"),
        "{said}"
    );
    assert!(
        said.contains("main, of which it begins as a copy, keeps them"),
        "{said}"
    );
    let shard = "model-00001-of-00002.safetensors";
    assert_eq!(there("main", shard).as_deref(), Some(&b"one"[..]));
    assert_eq!(there("8bit", shard), None);

    // With the flag, and announced before it is done.
    posts();
    let output = publish(&hub, &out, &["--unverified", "--delete", "--dry-run"]);
    let said = warnings(&output);
    succeeded(output);
    assert!(said.contains("main: would delete model-00001"), "{said}");
    assert_eq!(posts(), 0);
    let output = publish(&hub, &out, &["--unverified", "--delete"]);
    let said = warnings(&output);
    succeeded(output);
    assert!(said.contains("main: deletes model-00001"), "{said}");
    assert!(said.contains("which gptq did not publish"), "{said}");
    assert_eq!(there("main", shard), None);

    // The revision is now gptq's: leftovers of an earlier version of the branch are removed without
    // a flag, with a message.
    hub.put("models", REPO, "main", shard, b"of an earlier upload");
    fs::write(out.join("main/notes.txt"), "new").unwrap();
    let output = publish(&hub, &out, &["--unverified", "--json"]);
    let said = warnings(&output);
    let record: serde_json::Value = serde_json::from_str(&succeeded(output)).unwrap();
    assert_eq!(record["branches"][0]["delete"][0], shard);
    assert!(said.contains(&format!("main: deletes {shard}")), "{said}");
    assert_eq!(there("main", shard), None);
    assert!(there("main", "model.safetensors").is_some());
}

#[test]
fn a_dense_model_of_one_file_is_not_replaced_without_being_asked_for() {
    let (scratch, hub) = (Scratch::new(), HubServer::start());
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    succeed(["quantize", recipe.to_str().unwrap(), "--branch", "main"]);
    let out = scratch.out();
    hub.put("models", REPO, "main", "model.safetensors", b"dense");
    let line = refused(publish(&hub, &out, &["--unverified"]));
    assert!(line.contains("would remove model.safetensors"), "{line}");
    let there = || hub.files("models", REPO, "main").unwrap()["model.safetensors"].clone();
    assert_eq!(there(), b"dense");
    let output = publish(&hub, &out, &["--unverified", "--delete"]);
    let said = warnings(&output);
    succeeded(output);
    assert!(said.contains("main: replaces model.safetensors"), "{said}");
    assert!(there() != b"dense");
    // Its own weights may always be replaced.
    fs::write(out.join("main/notes.txt"), "new").unwrap();
    assert_eq!(warnings(&publish(&hub, &out, &["--unverified"])), "");
}
