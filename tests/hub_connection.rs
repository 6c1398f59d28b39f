//! Connections to a misbehaving Hub on the loopback.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::harness::{Scratch, command, medi_tiny, refused, root, succeeded};
use crate::hub::{MODEL, ONE, hub, quantize, shards};
use crate::hub_server::{HubServer, Wrong, silent};

/// Runs `quantize` of the model on the Hub, with a timeout of one second.
fn impatient(scratch: &Scratch, hub: &HubServer) -> Output {
    let recipe = scratch.recipe(Path::new(MODEL), ONE);
    let mut command = command(["quantize", recipe.to_str().unwrap()]);
    command
        .env("HF_HOME", scratch.path("hf"))
        .env("HF_HUB_DOWNLOAD_TIMEOUT", "1");
    silent(&mut command, &hub.url(), "hf_secretSecretSECRET")
}

#[test]
fn a_connection_that_is_silent_counts_as_broken() {
    let (scratch, hub) = (Scratch::new(), hub());
    // Silent at a request, at a listing, before the first byte of a download, and in its middle.
    for path in ["revision", "tree", "tokenizer_config.json"] {
        hub.fail(path, 1, Wrong::Mute);
    }
    hub.fail("cdn", 1, Wrong::Stall(100_000));
    succeeded(impatient(&scratch, &hub));
    let asked = hub.requests().join("\n");
    assert!(asked.contains("bytes=100000-"), "{asked}");

    // Silent for good: reported, and the partial download is resumed by the next run.
    let (scratch, hub) = (Scratch::new(), self::hub());
    hub.fail("cdn", 1, Wrong::Stall(150_000));
    hub.fail("cdn", 100, Wrong::Stall(0));
    let line = refused(impatient(&scratch, &hub));
    assert!(
        line.contains("has sent nothing for 1 s") && line.contains("the partial download is kept"),
        "{line}"
    );
    scratch.assert_nothing_written();
    hub.heal();
    hub.requests();
    succeeded(impatient(&scratch, &hub));
    let asked = hub.requests().join("\n");
    assert!(asked.contains("bytes=150000-"), "{asked}");

    // Cached files can be used even if the Hub is silent.
    hub.fail("revision", 100, Wrong::Mute);
    let stale = impatient(&scratch, &hub);
    let told = String::from_utf8_lossy(&stale.stderr).into_owned();
    succeeded(stale);
    assert!(told.contains("cannot be reached"), "{told}");
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let (scratch, hub) = (Scratch::new(), hub());
    succeeded(quantize(&scratch, &hub));
    let requests = hub.requests();
    let (elsewhere, here): (Vec<_>, Vec<_>) = requests.iter().partition(|r| r.contains(" /cdn/"));
    assert!(elsewhere.iter().any(|r| r.starts_with("GET")), "{here:?}");
    assert!(here.iter().all(|r| r.contains("Bearer ")), "{here:?}");
    let told = elsewhere.iter().any(|r| r.contains("Bearer"));
    assert!(!told, "another host is told the token: {elsewhere:?}");
}

#[test]
fn a_renamed_repository_is_found_under_its_old_name() {
    let (scratch, hub) = (Scratch::new(), hub());
    hub.rename("medi/old", MODEL);
    let recipe = scratch.recipe(Path::new("medi/old"), ONE);
    let mut command = command(["quantize", recipe.to_str().unwrap()]);
    command.env("HF_HOME", scratch.path("hf"));
    succeeded(silent(&mut command, &hub.url(), "hf_secretSecretSECRET"));
    assert!(scratch.path("hf/hub/models--medi--old/refs/main").is_file());
}

#[test]
fn a_file_that_ends_too_early_is_refused_with_what_came_of_it() {
    let (scratch, hub) = (Scratch::new(), hub());
    hub.fail("cdn", 100, Wrong::Short(250_000));
    let line = refused(quantize(&scratch, &hub));
    let words = "model.safetensors ended after 250000 of";
    assert!(line.contains(words) && line.contains("run again"), "{line}");
    scratch.assert_nothing_written();
    hub.heal();
    succeeded(quantize(&scratch, &hub));

    // Interrupted once; the rest is downloaded on retry.
    let (scratch, hub) = (Scratch::new(), self::hub());
    hub.fail("cdn", 1, Wrong::Short(120_000));
    succeeded(quantize(&scratch, &hub));
    assert!(hub.requests().join("\n").contains("bytes=120000-"));
}

#[test]
fn several_files_come_at_once() {
    let (scratch, hub) = (Scratch::new(), HubServer::start());
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        let bytes = fs::read(root().join(medi_tiny()).join(name)).unwrap();
        hub.put("models", MODEL, "main", name, &bytes);
    }
    for (name, bytes) in shards() {
        hub.put("models", MODEL, "main", &name, &bytes);
    }
    // The shards wait for each other: one after the other, each would time out.
    hub.fail("-of-2.safetensors", 2, Wrong::Together);
    succeeded(quantize(&scratch, &hub));
    assert!(hub.most_at_once() >= 2, "{}", hub.most_at_once());
}

#[test]
fn another_protocol_is_offered_and_plain_http_is_kept_to() {
    let hash = Wrong::Header("X-Xet-Hash", "c0ffee");
    let (scratch, hub) = (Scratch::new(), hub());
    hub.fail("/model.safetensors", 100, hash);
    succeeded(quantize(&scratch, &hub));
    let asked = hub.requests().join("\n");
    assert!(
        asked.contains("GET /cdn/") && !asked.contains("xet"),
        "{asked}"
    );

    // A server that insists on the Xet protocol, but does not implement it.
    let (scratch, hub) = (Scratch::new(), self::hub());
    hub.fail("cdn", 100, hash);
    let line = refused(quantize(&scratch, &hub));
    for words in [MODEL, "Xet", "404", "name its directory"] {
        assert!(line.contains(words), "{line}");
    }
}
