//! Connections to a Hub on the loopback that do not do what they should.

use std::path::Path;
use std::process::Output;

use crate::harness::{Scratch, command, refused, succeeded};
use crate::hub::{MODEL, ONE, hub};
use crate::hub_server::{HubServer, Wrong, silent};

/// `quantize` of the model on the Hub, which waits a second for what does not come.
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
    // A question, a listing, a download before its first byte, and one in its middle.
    for path in ["revision", "tree", "tokenizer_config.json"] {
        hub.fail(path, 1, Wrong::Mute);
    }
    hub.fail("cdn", 1, Wrong::Stall(100_000));
    succeeded(impatient(&scratch, &hub));
    let asked = hub.requests().join("\n");
    assert!(asked.contains("bytes=100000-"), "{asked}");

    // Silent for good: said, and what came is taken up by the next run.
    let (scratch, hub) = (Scratch::new(), self::hub());
    hub.fail("cdn", 1, Wrong::Stall(150_000));
    hub.fail("cdn", 100, Wrong::Stall(0));
    let line = refused(impatient(&scratch, &hub));
    assert!(
        line.contains("has sent nothing for 1 s") && line.contains("what has come is kept"),
        "{line}"
    );
    scratch.assert_nothing_written();
    hub.heal();
    hub.requests();
    succeeded(impatient(&scratch, &hub));
    let asked = hub.requests().join("\n");
    assert!(asked.contains("bytes=150000-"), "{asked}");

    // Whoever has the files is not kept from them by a Hub that says nothing.
    hub.fail("revision", 100, Wrong::Mute);
    let stale = impatient(&scratch, &hub);
    let told = String::from_utf8_lossy(&stale.stderr).into_owned();
    succeeded(stale);
    assert!(told.contains("cannot be reached"), "{told}");
}
