//! Refusals and missing files of the Hub: one line each with the remedy, and nothing left behind.

use std::fs;
use std::path::Path;

use crate::harness::{Scratch, command, medi_tiny, refused, root, succeeded};
use crate::hub::{MODEL, ONE, WIKIDOC, hub, quantize, run, snapshot};
use crate::hub_server::{HubServer, Wrong, silent};

#[test]
fn a_refusal_of_the_hub_is_one_line_with_a_remedy() {
    for (path, status, code, words) in [
        (
            "revision",
            404,
            "RepoNotFound",
            ["no model medi/tiny", "HF_TOKEN"],
        ),
        (
            "revision",
            404,
            "RevisionNotFound",
            ["no revision \"main\"", "branch, tag or commit"],
        ),
        (
            "revision",
            401,
            "",
            ["not accessible to this account", "HF_TOKEN"],
        ),
        ("resolve", 403, "GatedRepo", ["gated", "/medi/tiny"]),
        ("resolve", 401, "GatedRepo", ["gated", "accept its terms"]),
        ("tree", 429, "", ["429", "run again"]),
        (
            "revision",
            429,
            "",
            [
                "limits the rate of requests",
                "the partial download is kept",
            ],
        ),
        ("revision", 503, "", ["503", "run again"]),
        ("cdn", 500, "", ["500", "the partial download is kept"]),
        (
            "revision",
            400,
            "",
            ["400 for medi/tiny (refused)", "retrying will not help"],
        ),
        ("resolve", 451, "", ["451 for medi/tiny", "another copy"]),
    ] {
        let (scratch, hub) = (Scratch::new(), hub());
        hub.fail(path, 1000, Wrong::Status(status, code));
        let line = refused(quantize(&scratch, &hub));
        assert!(
            words.iter().all(|word| line.contains(word)),
            "{status}: {line}"
        );
        scratch.assert_nothing_written();
    }
    // Temporary errors are retried.
    let (scratch, hub) = (Scratch::new(), hub());
    for (path, status) in [
        ("revision", 503),
        ("tree", 429),
        ("resolve", 502),
        ("cdn", 500),
    ] {
        hub.fail(path, 1, Wrong::Status(status, ""));
    }
    succeeded(quantize(&scratch, &hub));
}

#[test]
fn nobody_there_and_nothing_cached_is_said_plainly() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let args = ["quantize", recipe.to_str().unwrap()];
    let line = refused(run(&scratch, "http://127.0.0.1:9", &args));
    assert!(
        line.contains("cannot be reached") && line.contains("HF_ENDPOINT"),
        "{line}"
    );
    let offline = command(args)
        .env("HF_HOME", scratch.path("hf"))
        .env("HF_HUB_OFFLINE", "1")
        .output();
    let line = refused(offline.unwrap());
    assert!(
        line.contains("HF_HUB_OFFLINE") && line.contains("run once without it"),
        "{line}"
    );
    // Half a model in the cache does not count.
    let hub = hub();
    hub.fail("cdn", 1000, Wrong::Status(404, ""));
    refused(quantize(&scratch, &hub));
    let offline = command(args)
        .env("HF_HOME", scratch.path("hf"))
        .env("HF_HUB_OFFLINE", "1")
        .output();
    let line = refused(offline.unwrap());
    assert!(line.contains("not complete in"), "{line}");
}

#[test]
fn a_file_name_that_leaves_the_cache_is_refused() {
    for name in ["../../etc/passwd", "/etc/passwd", "a/../../b"] {
        let (scratch, hub) = (Scratch::new(), hub());
        hub.put("models", MODEL, "main", name, b"root");
        let line = refused(quantize(&scratch, &hub));
        assert!(
            line.contains(name) && line.contains("not a safe path"),
            "{line}"
        );
        assert!(!snapshot(&scratch).exists());
    }
    // An index that lists one: also refused, although the Hub lists no such file.
    let (scratch, hub) = (Scratch::new(), hub());
    let index = br#"{"weight_map": {"model.norm.weight": "../../etc/passwd"}}"#;
    hub.put(
        "models",
        MODEL,
        "main",
        "model.safetensors.index.json",
        index,
    );
    let line = refused(quantize(&scratch, &hub));
    assert!(line.contains("../../etc/passwd"), "{line}");
}

#[test]
fn what_a_repository_lacks_is_said_with_what_to_name_instead() {
    let (scratch, hub) = (Scratch::new(), hub());
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let text = fs::read_to_string(&recipe).unwrap();
    let refused_with = |edit: (&str, &str)| {
        fs::write(&recipe, text.replace(edit.0, edit.1)).unwrap();
        let line = refused(run(
            &scratch,
            &hub.url(),
            &["quantize", recipe.to_str().unwrap()],
        ));
        scratch.assert_nothing_written();
        line
    };
    let config = fs::read(root().join(medi_tiny()).join("config.json")).unwrap();
    hub.put("models", "medi/config", "main", "config.json", &config);
    let index = br#"{"weight_map": {"model.norm.weight": "model-7-of-9.safetensors"}}"#;
    hub.put("models", "medi/index", "main", "config.json", &config);
    let name = "model.safetensors.index.json";
    hub.put("models", "medi/index", "main", name, index);
    let rows = br#"[{"input": "a", "output": "b"}]"#;
    hub.put("datasets", "medi/tar", "main", "rows.tar", &[0; 512]);
    hub.put("datasets", "medi/two", "main", "a.json", rows);
    hub.put(
        "datasets",
        "medi/two",
        "main",
        "b.csv",
        b"input,output\na,b\n",
    );
    let quoted = format!("{WIKIDOC:?}");
    let chosen = "\"medi/two\"\nfiles = \"[\"";
    for (from, to, words) in [
        (
            MODEL,
            "medi/config",
            ["neither safetensors nor PyTorch", "another model"],
        ),
        (
            MODEL,
            "medi/index",
            ["has no model-7-of-9.safetensors", "another revision"],
        ),
        (
            "[calibration]",
            "revision = \"v9\"\n[calibration]",
            ["no revision \"v9\"", "branch, tag or commit"],
        ),
        (
            &quoted,
            "\"medi/tar\"",
            ["medi/tar has no file of rows", "name a local file"],
        ),
        (
            &quoted,
            "\"medi/two\"",
            ["several kinds (csv, json)", "files = \"*.csv\""],
        ),
        (&quoted, chosen, ["files = \"[\"", "pattern"]),
    ] {
        let line = refused_with((from, to));
        assert!(words.iter().all(|word| line.contains(word)), "{to}: {line}");
    }
    hub.fail("datasets", 1000, Wrong::Status(403, "GatedRepo"));
    let line = refused_with((&quoted, "\"medi/two\""));
    assert!(line.contains("accept its terms at"), "{line}");
    assert!(line.contains("/datasets/medi/two"), "{line}");
}

#[test]
fn what_cannot_be_a_token_is_not_sent() {
    let (scratch, hub) = (Scratch::new(), hub());
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    for (token, why) in [("two words", "a space"), ("hf_\u{e9}t\u{e9}", "not ASCII")] {
        let mut command = command(["quantize", recipe.to_str().unwrap()]);
        command.env("HF_HOME", scratch.path("hf"));
        let line = refused(silent(&mut command, &hub.url(), token));
        assert!(line.contains("HF_TOKEN") && line.contains(why), "{line}");
    }
    assert_eq!(hub.requests(), Vec::<String>::new());
}

#[test]
fn what_is_wrong_is_said_before_any_weights_are_fetched() {
    let quoted = format!("{WIKIDOC:?}");
    let rows = fs::read(root().join(WIKIDOC)).unwrap();
    let llama = ("LlamaForCausalLM", "LlamaForCausalLM");
    for (without, architecture, calibration, words) in [
        ("", ("\"llama\"", "\"mamba\""), "medi/rows", "mamba"),
        (
            "tokenizer.json",
            llama,
            "medi/rows",
            "has no tokenizer.json; name",
        ),
        ("", llama, "medi/none", "no dataset medi/none"),
        ("", llama, "no/such/rows.json", "no/such/rows.json"),
    ] {
        let (scratch, hub) = (Scratch::new(), HubServer::start());
        for entry in fs::read_dir(root().join(medi_tiny())).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let mut bytes = fs::read(&path).unwrap();
            if name == "config.json" {
                let text = String::from_utf8(bytes).unwrap();
                bytes = text.replace(architecture.0, architecture.1).into_bytes();
            }
            if name != without {
                hub.put("models", MODEL, "main", name, &bytes);
            }
        }
        hub.put("datasets", "medi/rows", "main", "rows.json", &rows);
        let recipe = scratch.recipe(Path::new(MODEL), ONE);
        let text = fs::read_to_string(&recipe).unwrap();
        fs::write(&recipe, text.replace(&quoted, &format!("{calibration:?}"))).unwrap();
        let args = ["quantize", recipe.to_str().unwrap()];
        let line = refused(run(&scratch, &hub.url(), &args));
        assert!(line.contains(words), "{line}");
        let asked = hub.requests().join("\n");
        assert!(asked.contains("config.json"), "{asked}");
        assert!(!asked.contains(".safetensors"), "{words}: {asked}");
        assert!(
            !asked.contains("rows.json"),
            "{words}, and rows were fetched: {asked}"
        );
        scratch.assert_nothing_written();
    }
}
