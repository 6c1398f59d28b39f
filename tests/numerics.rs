//! Numbers out of range: the recipe's settings, and the report's records.

use std::fs;
use std::path::Path;

use half::f16;
use serde_json::Value;

use crate::harness::{Scratch, edit_tensor, gptq, medi_tiny, refuse, succeed};

const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\n";

fn report(scratch: &Scratch) -> Value {
    let text = fs::read(scratch.out().join("a/report.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// Makes a model whose first block writes numbers beyond f16's range into the residual.
fn overflowing(scratch: &Scratch) -> std::path::PathBuf {
    let model = scratch.copy_model();
    edit_tensor(
        &model.join("model.safetensors"),
        "model.layers.0.mlp.down_proj.weight",
        |bytes| {
            for pair in bytes.chunks_exact_mut(2) {
                let weight = f16::from_le_bytes([pair[0], pair[1]]).to_f32();
                let large = f16::from_f32((weight * 1e6).clamp(-6e4, 6e4));
                pair.copy_from_slice(&large.to_le_bytes());
            }
        },
    );
    model
}

fn with(scratch: &Scratch, model: &Path, top: &str, branch: &str) -> String {
    let recipe = scratch.recipe_with(model, top, "", branch);
    recipe.to_str().unwrap().to_owned()
}

#[test]
fn hidden_states_beyond_f16_stop_a_run_with_block_tensor_place_and_count() {
    let scratch = Scratch::new();
    let model = overflowing(&scratch);
    let recipe = with(&scratch, &model, "", ONE);
    let line = refuse(["quantize", &recipe, "--device", "cpu"]);
    for part in [
        "branch a, model.layers.1.self_attn.q_proj",
        "the residual before it has ",
        "beyond f16's range of 65504; the first is in window 0, token ",
        "overflow = \"clamp\"",
    ] {
        assert!(line.contains(part), "{part}: {line}");
    }
}

#[test]
fn hidden_states_beyond_f16_are_clamped_and_counted_where_the_recipe_allows_it() {
    let scratch = Scratch::new();
    let model = overflowing(&scratch);
    let top = "[numerics]\noverflow = \"clamp\"\n";
    let output = gptq([
        "quantize",
        &with(&scratch, &model, top, ONE),
        "--device",
        "cpu",
    ]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{told}");
    assert!(
        told.contains("warning: a: ") && told.contains("clamped"),
        "{told}"
    );
    let report = report(&scratch);
    let clamped = report["clamped"].as_array().unwrap();
    assert_eq!(
        (&clamped[0]["layer"], &clamped[0]["after"]),
        (&0.into(), &"down".into()),
        "{clamped:?}"
    );
    assert!(clamped[0]["values"].as_u64().unwrap() > 0);
    for linear in report["linears"].as_array().unwrap() {
        assert!(
            linear["relative_error"].as_f64().unwrap().is_finite(),
            "{linear}"
        );
    }
}

#[test]
fn damping_is_raised_as_far_as_the_recipe_allows_and_the_report_has_what_was_used() {
    // 32 tokens for 256 inputs, and no damping: no Hessian has a factor.
    let flags = ["--samples", "1", "--seq-len", "32", "--device", "cpu"];
    let branch = "[[branch]]\nname = \"a\"\nbits = 4\ndamp_percent = 0.0\n";
    let scratch = Scratch::new();
    let recipe = with(
        &scratch,
        &medi_tiny(),
        "[numerics]\nmax_damping = 0.005\n",
        branch,
    );
    let line = refuse(["quantize", recipe.as_str()].iter().chain(&flags));
    assert!(
        line.contains("model.layers.0.self_attn.q_proj") && line.contains("max_damping is 0.005"),
        "{line}"
    );
    scratch.assert_nothing_written();

    let recipe = with(&scratch, &medi_tiny(), "", branch);
    let log = scratch.path("log");
    let logged = ["--log-file", log.to_str().unwrap()];
    succeed(
        ["quantize", recipe.as_str()]
            .iter()
            .chain(&flags)
            .chain(&logged),
    );
    let report = report(&scratch);
    assert_eq!(report["solved"]["damp_percent"], 0.0);
    // GPTQModel refuses files with 0.
    assert_eq!(report["quantize_config"]["damp_percent"], 1e-6);
    assert_eq!(report["linears"][0]["damp_percent"], 0.01, "the first step");
    let log = fs::read_to_string(log).unwrap();
    assert!(
        log.contains("WARN") && log.contains("damping raised"),
        "{log}"
    );
}

#[test]
fn a_numerics_policy_that_makes_no_sense_is_refused_at_its_place() {
    let scratch = Scratch::new();
    for (top, words) in [
        ("[numerics]\nmax_damping = 2.0\n", "is not between 0 and 1"),
        (
            "[numerics]\nmax_damping = 0.01\n",
            "below the damp_percent = 0.1 of branch a",
        ),
        ("[numerics]\noverflow = \"ignore\"\n", "`stop` or `clamp`"),
        ("[numerics]\nmore = 1\n", "unknown field `more`"),
    ] {
        let line = refuse(["plan", &with(&scratch, &medi_tiny(), top, ONE)]);
        assert!(
            line.contains("recipe.toml:2:") && line.contains(words),
            "{line}"
        );
    }
}
