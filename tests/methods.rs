//! Presets and single options of the method, through the binary.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

use crate::harness::{Scratch, medi_tiny, refuse, succeed};

#[test]
fn presets_and_options_decide_the_codes_and_best_is_closest_to_the_dense_model() {
    let scratch = Scratch::new();
    let branch = |name: &str, options: &str| {
        format!("[[branch]]\nname = {name:?}\nbits = 2\ngroup_size = 64\n{options}\n")
    };
    let branches = [
        branch("standard", "preset = \"standard\""),
        branch("nothing", "preset = \"autogptq\"\nscale_search = true"),
        branch("zero", "mismatch_correction = 0.0\nrefine = 0"),
        branch("best", ""),
    ];
    let recipe = scratch.recipe(&medi_tiny(), &branches.concat());
    succeed([
        "quantize",
        recipe.to_str().unwrap(),
        "--samples",
        "64",
        "--perplexity",
        "tests/data/eval_wikidoc_40.json",
        "--device",
        "cpu",
    ]);
    let weights =
        |name: &str| fs::read(scratch.out().join(name).join("model.safetensors")).unwrap();
    let report = |name: &str| -> Value {
        let path = scratch.out().join(name).join("report.json");
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    };
    assert!(weights("standard") == weights("zero"));
    assert!(weights("standard") == weights("nothing"));
    assert!(weights("standard") != weights("best"));
    assert_eq!(
        report("best")["method"],
        json!({"scale_search": true, "refine": 1, "asymmetric": 1.0})
    );
    assert_eq!(report("nothing")["preset"], "autogptq");
    assert_eq!(report("nothing")["method"]["scale_search"], true);
    let perplexity = |name: &str| report(name)["perplexity"]["value"].as_f64().unwrap();
    // At 2 bits the activation mismatch is large: on these texts 4 % and more, while two runs
    // differ by 1 %.
    assert!(perplexity("best") < 0.98 * perplexity("standard"));
    // Options used by a linear layer, and their gains. The first input has no mismatch.
    let options = |name: &str, at: usize| {
        let gains = report(name)["linears"][at]["gains"].clone();
        let gains: BTreeMap<String, f64> = serde_json::from_value(gains).unwrap();
        // Relative to the output's energy, which limits the gain of an option.
        assert!(
            gains.values().all(|&gain| gain > 0.0 && gain < 1.0),
            "{gains:?}"
        );
        gains.into_keys().collect::<Vec<_>>()
    };
    assert_eq!(options("standard", 0), ["scale_search"]);
    assert_eq!(options("best", 0), ["refine", "scale_search"]);
    assert_eq!(options("best", 8), ["asymmetric", "refine", "scale_search"]);
    let csv = fs::read_to_string(scratch.out().join("best/report.csv")).unwrap();
    let mut lines = csv.lines();
    assert!(
        lines
            .next()
            .unwrap()
            .ends_with(",search_gain,asymmetric_gain,refine_gain,seconds")
    );
    let gain = report("best")["linears"][8]["gains"]["refine"]
        .as_f64()
        .unwrap();
    let refine_gain = lines.nth(8).unwrap().rsplit(',').nth(1).unwrap();
    assert_eq!(refine_gain.parse(), Ok(gain));
    let best = scratch.out().join("best");
    succeed(["verify", best.to_str().unwrap(), "--no-receipt"]);
}

#[test]
fn branches_that_make_up_for_drift_do_not_change_those_that_do_not_nor_the_other_way_round() {
    let branches = [
        "[[branch]]\nname = \"plain\"\nbits = 4\npreset = \"standard\"\n",
        "[[branch]]\nname = \"best\"\nbits = 4\n",
        "[[branch]]\nname = \"at-once\"\nbits = 4\npreset = \"best\"\ntrue_sequential = false\n",
    ];
    // Enough windows for several chunks, some of which also run through the dense model.
    let quantize = |scratch: &Scratch, branches: &str| {
        let recipe = scratch.recipe(&medi_tiny(), branches);
        let recipe = recipe.to_str().unwrap();
        let flags = ["--samples", "32", "--seq-len", "256", "--device", "cpu"];
        succeed([&["quantize", recipe], &flags[..]].concat());
    };
    let weights = |scratch: &Scratch, name: &str| {
        fs::read(scratch.out().join(name).join("model.safetensors"))
    };
    let together = Scratch::new();
    quantize(&together, &branches.concat());
    for (branch, name) in branches.into_iter().zip(["plain", "best", "at-once"]) {
        let alone = Scratch::new();
        quantize(&alone, branch);
        assert!(
            weights(&together, name).unwrap() == weights(&alone, name).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn with_dense_propagation_there_is_no_mismatch_to_correct() {
    let scratch = Scratch::new();
    let branches = "[[branch]]\nname = \"plain\"\nbits = 4\n\
                    [[branch]]\nname = \"corrected\"\nbits = 4\nmismatch_correction = 1.0\n";
    let recipe = scratch.recipe_with(&medi_tiny(), "propagate = \"dense\"", "", branches);
    succeed(["quantize", recipe.to_str().unwrap(), "--device", "cpu"]);
    let weights =
        |name: &str| fs::read(scratch.out().join(name).join("model.safetensors")).unwrap();
    assert!(weights("plain") == weights("corrected"));
}

#[test]
fn options_out_of_range_are_refused_at_their_place() {
    for (option, said) in [
        (
            "mismatch_correction = 1.5",
            "mismatch_correction = 1.5 is not between 0 and 1",
        ),
        (
            "asymmetric = nan",
            "asymmetric = NaN is not between 0 and 1",
        ),
        (
            "asymmetric = 0.5\nmismatch_correction = 0.5",
            "asymmetric is the old name of mismatch_correction",
        ),
        ("refine = 1000", "more than 100 passes"),
        ("preset = \"fast\"", "best"),
    ] {
        let scratch = Scratch::new();
        let branches = format!("[[branch]]\nname = \"a\"\nbits = 4\n{option}\n");
        let recipe = scratch.recipe(&medi_tiny(), &branches);
        let line = refuse(["quantize", recipe.to_str().unwrap()]);
        assert!(
            line.contains(said) && line.contains("recipe.toml:"),
            "{line}"
        );
    }
}
