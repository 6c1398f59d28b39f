//! Environment variables of the Hub: the cache directory, and the token that is sent.

use std::fs;
use std::path::Path;
use std::process::Command;

use gptq_hub::{DataFiles, Hub, HubSettings, RepoId, STALL};

use crate::harness::{Scratch, command, refused, succeeded};
use crate::hub::{MODEL, ONE, hub};
use crate::hub_server::HubServer;

/// Makes a `plan` command for the model on the Hub: the smallest command that makes a request.
fn plan(scratch: &Scratch, hub: &HubServer) -> Command {
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let mut command = command(["quantize", recipe.to_str().unwrap(), "--dry-run"]);
    command
        .env("HF_HOME", scratch.path("hf"))
        .env("HF_ENDPOINT", hub.url());
    command
}

/// Returns the token of every request since the last call.
fn token(hub: &HubServer) -> Option<String> {
    let requests = hub.requests();
    assert!(!requests.is_empty());
    let mut tokens = requests.iter().map(|request| {
        let (_, token) = request.split_once("Bearer ")?;
        Some(token.to_owned())
    });
    let first = tokens.next()?;
    assert!(tokens.all(|token| token == first), "{requests:?}");
    first
}

#[test]
fn a_token_comes_from_where_every_tool_looks_and_from_nowhere_where_that_is_switched_off() {
    let (scratch, hub) = (Scratch::new(), hub());
    succeeded(plan(&scratch, &hub).output().unwrap());
    assert_eq!(token(&hub), None, "nobody is logged in");

    fs::write(scratch.path("hf/token"), "hf_saved\n").unwrap();
    succeeded(plan(&scratch, &hub).output().unwrap());
    assert_eq!(token(&hub).as_deref(), Some("hf_saved"));

    fs::write(scratch.path("elsewhere"), "hf_elsewhere").unwrap();
    let with_path = || {
        let mut plan = plan(&scratch, &hub);
        plan.env("HF_TOKEN_PATH", scratch.path("elsewhere"));
        plan
    };
    succeeded(with_path().output().unwrap());
    assert_eq!(token(&hub).as_deref(), Some("hf_elsewhere"));
    succeeded(with_path().env("HF_TOKEN", "hf_named").output().unwrap());
    assert_eq!(token(&hub).as_deref(), Some("hf_named"));

    let mut silent = with_path();
    silent
        .env("HF_TOKEN", "hf_named")
        .env("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
    succeeded(silent.output().unwrap());
    assert_eq!(token(&hub), None);
    // 0 means off.
    silent.env("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0");
    succeeded(silent.output().unwrap());
    assert_eq!(token(&hub).as_deref(), Some("hf_named"));
}

#[test]
fn without_a_token_none_is_sent_though_the_environment_has_one() {
    // The library's own guarantee, in a process whose environment has a token: this test's, run
    // again.
    const AGAIN: &str = "GPTQ_TEST_HUB";
    if let Ok(endpoint) = std::env::var(AGAIN) {
        let scratch = Scratch::new();
        let hub = Hub::new(HubSettings {
            endpoint,
            token: None,
            cache: scratch.path("hub"),
            offline: false,
            stall: STALL,
        });
        let id = RepoId::parse("medi/rows").unwrap();
        let wanted = DataFiles {
            readable: &|name| name.ends_with(".json"),
            pattern: None,
        };
        let rows = hub.unwrap().dataset(&id, "main", wanted, &|_| ());
        assert_eq!(rows.unwrap().files, ["rows.json"]);
        return;
    }
    let hub = HubServer::start();
    hub.put("datasets", "medi/rows", "main", "rows.json", b"[]");
    let name = "hub_settings::without_a_token_none_is_sent_though_the_environment_has_one";
    let again = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env(AGAIN, hub.url())
        .env("HF_TOKEN", "hf_named")
        .env("NO_PROXY", "*")
        .env_remove("HF_HUB_DISABLE_IMPLICIT_TOKEN")
        .output();
    succeeded(again.unwrap());
    assert_eq!(token(&hub), None);
}

#[test]
fn the_cache_is_where_the_environment_says() {
    let (scratch, hub) = (Scratch::new(), hub());
    let mut plan = plan(&scratch, &hub);
    let cache = scratch.path("cache");
    succeeded(plan.env("HF_HUB_CACHE", &cache).output().unwrap());
    assert!(cache.join("models--medi--tiny/refs/main").is_file());
    assert!(!scratch.path("hf").exists(), "HF_HOME is for the rest");
}

#[test]
fn blanks_and_line_breaks_around_values_do_not_count() {
    let (scratch, hub) = (Scratch::new(), hub());
    let cache = scratch.path("hf");
    let padded = |value: &str| format!(" {value}\r\n");
    let mut plan = plan(&scratch, &hub);
    // Large files come from another server, without a token: recorded by the time requests are
    // checked.
    succeeded(plan.output().unwrap());
    hub.requests();
    plan.env("HF_ENDPOINT", padded(&hub.url()))
        .env("HF_HOME", padded(cache.to_str().unwrap()))
        .env("HF_TOKEN", padded("hf_named"))
        .env("HF_HUB_DOWNLOAD_TIMEOUT", padded("30"))
        .env("HF_HUB_DISABLE_IMPLICIT_TOKEN", padded("off"))
        .env("HF_HUB_OFFLINE", "\n")
        .env("RUST_LOG", " \n");
    let output = plan.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    succeeded(output);
    assert!(
        !stderr.contains("WARN") && !stderr.contains("ERROR"),
        "{stderr}"
    );
    assert_eq!(token(&hub).as_deref(), Some("hf_named"));
    assert!(cache.join("hub/models--medi--tiny/refs/main").is_file());

    // On, in another spelling: no request is made.
    succeeded(plan.env("HF_HUB_OFFLINE", "Yes\n").output().unwrap());
    assert_eq!(hub.requests(), Vec::<String>::new());
    let elsewhere = scratch.path("elsewhere");
    plan.env("HF_HUB_OFFLINE", "0")
        .env("HF_HUB_CACHE", format!("{}\n", elsewhere.display()));
    succeeded(plan.output().unwrap());
    assert!(elsewhere.join("models--medi--tiny/refs/main").is_file());

    fs::write(scratch.path("saved"), "hf_saved").unwrap();
    let file = format!("{}\n", scratch.path("saved").display());
    hub.requests();
    plan.env("HF_TOKEN", "\n").env("HF_TOKEN_PATH", file);
    succeeded(plan.output().unwrap());
    assert_eq!(token(&hub).as_deref(), Some("hf_saved"));
}

#[test]
fn a_value_that_its_variable_cannot_have_is_refused_by_name() {
    let (scratch, hub) = (Scratch::new(), hub());
    for (name, value) in [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "abc"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "10s"),
        ("HF_HUB_OFFLINE", "y"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "maybe"),
        ("HF_ENDPOINT", "huggingface.co"),
    ] {
        let line = refused(plan(&scratch, &hub).env(name, value).output().unwrap());
        let named = format!("{name} is \"{value}\"");
        assert!(line.contains(&named) && line.contains("unset it"), "{line}");
    }
    assert_eq!(hub.requests(), Vec::<String>::new());
}
