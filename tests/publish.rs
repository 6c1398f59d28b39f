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

/// Verifies a branch; what it says may then be changed.
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

    // Nothing goes out before every branch has passed.
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
        line.contains("config.json: not what was verified"),
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

    // A connection that breaks at the second branch: run again.
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

    // Only what changed.
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
    assert!(line.contains("no branch here"), "{line}");
}
