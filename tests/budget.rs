//! Size budgets: bits and group size of each linear layer from a sensitivity pass.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{Scratch, medi_tiny, refuse, refused, succeed, succeeded};
use crate::resume::{assert_same, killed_after_a_block, quantize, uninterrupted};

/// An override sets one linear layer, which counts.
const BUDGET: &str = "[[branch]]\nname = \"a\"\nbudget_bits = 3.5\n\
                      [[branch.override]]\nmatch = \"*.1.mlp.down_proj\"\nbits = 8\ngroup_size = 32\n";
/// The same with fewer choices.
const FEW: &str = "[[branch]]\nname = \"a\"\nbudget_bits = 3.75\n\
                   budget_choices = [{ bits = 3, group_size = 128 }, { bits = 4, group_size = 32 }]\n\
                   [[branch.override]]\nmatch = \"*.1.mlp.down_proj\"\nbits = 8\ngroup_size = 32\n";
const QUICK: [&str; 6] = ["--device", "cpu", "--samples", "8", "--seq-len", "128"];

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Returns the bits of quantized tensors per weight, from the file's header.
pub(crate) fn stored_bits(file: &Path, linears: &[Value]) -> f64 {
    let bytes = fs::read(file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let (mut stored, mut weights) = (0, 0);
    for linear in linears {
        for tensor in ["qweight", "qzeros", "scales", "g_idx"] {
            let name = format!("{}.{tensor}", linear["name"].as_str().unwrap());
            let at = |end: usize| header[&name]["data_offsets"][end].as_u64().unwrap();
            stored += 8 * (at(1) - at(0));
        }
        let shape = linear["shape"].as_array().unwrap();
        weights += shape.iter().map(|n| n.as_u64().unwrap()).product::<u64>();
    }
    stored as f64 / weights as f64
}

#[test]
fn a_budget_is_kept_and_spent_where_it_counts() {
    let scratch = Scratch::new();
    let uniform = "[[branch]]\nname = \"b\"\nbits = 3\ngroup_size = 64\n";
    let recipe = scratch.recipe(&medi_tiny(), &format!("{BUDGET}{uniform}"));
    let plan = succeed(["plan", recipe.to_str().unwrap()]);
    assert!(
        plan.contains("to 3.5") && plan.contains("measured in the run"),
        "{plan}"
    );
    let flags = [
        &QUICK[..],
        &["--perplexity", "tests/data/eval_wikidoc_40.json"],
    ]
    .concat();
    let said = succeeded(quantize(&recipe, &flags).output().unwrap());
    assert!(said.contains("bits per weight: "), "{said}");

    let branch = scratch.out().join("a");
    let report = json(&branch.join("report.json"));
    let linears = report["linears"].as_array().unwrap();
    let bits = report["budget"]["mean_bits"].as_f64().unwrap();
    let found = stored_bits(&branch.join("model.safetensors"), linears);
    assert!((found - bits).abs() < 1e-9, "{found} is not {bits}");
    // The allocation is maximal: the rest is less than one step of a whole group.
    assert!((3.3..=3.5).contains(&bits), "{bits}");
    let mut settings: Vec<String> = linears
        .iter()
        .map(|it| format!("{} {}", it["bits"], it["group_size"]))
        .collect();
    let down = linears
        .iter()
        .position(|it| it["name"] == "model.layers.1.mlp.down_proj");
    assert_eq!(settings[down.unwrap()], "8 32");
    settings.sort();
    settings.dedup();
    assert!(settings.len() > 2, "{settings:?}");

    // Every reader of the files agrees on every linear layer.
    succeed(["verify", branch.to_str().unwrap(), "--no-receipt"]);
    let out = scratch.out();
    succeed(["report", out.to_str().unwrap()]);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("a budget of 3.5"));
    let rows = json(&out.join("report-table.json"));
    let row = |name: &str| {
        let rows = rows.as_array().unwrap().iter();
        rows.clone().find(|it| it["branch"] == name).unwrap()
    };
    assert_eq!(row("a")["mixed"], true);
    assert_eq!(row("b")["mixed"], false);
    assert!((row("a")["bits_per_weight"].as_f64().unwrap() - bits).abs() < 1e-9);
    succeed(["card", out.to_str().unwrap(), "--repo", "someone/medi-tiny"]);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("| mixed | mixed |"), "{card}");
}

#[test]
fn a_run_with_a_budget_goes_on_with_what_it_had_picked() {
    let (expected, _) = uninterrupted(FEW, &QUICK);
    let scratch = Scratch::new();
    let (recipe, out) = (scratch.recipe(&medi_tiny(), FEW), scratch.out());
    killed_after_a_block(&recipe, &out, &QUICK);
    let said = succeeded(quantize(&recipe, &QUICK).output().unwrap());
    assert!(said.contains("resuming after block"), "{said}");
    assert!(!said.contains("sensitivity pass"), "{said}");
    assert_same(&out, &expected);

    // A journal is checked before resuming from it.
    let scratch = Scratch::new();
    let (recipe, out) = (scratch.recipe(&medi_tiny(), FEW), scratch.out());
    killed_after_a_block(&recipe, &out, &QUICK);
    let journal = out.join(".gptq-journal.jsonl");
    let text = fs::read_to_string(&journal).unwrap();
    fs::write(&journal, text.replacen("\"choice\":", "\"choice\":9", 1)).unwrap();
    let line = refused(quantize(&recipe, &QUICK).output().unwrap());
    assert!(line.contains("--restart"), "{line}");
}

#[test]
fn a_budget_that_cannot_be_kept_or_spent_is_refused_at_its_place() {
    for (branch, words) in [
        ("budget_bits = 2.0", "is not between 2."),
        ("budget_bits = 9.5", "is not between 2."),
        ("budget_bits = nan", "is not between 2."),
        (
            "bits = 4\nbudget_choices = [{ bits = 3, group_size = 32 }]",
            "requires budget_bits",
        ),
        (
            "budget_bits = 4.0\nbudget_choices = [{ bits = 4, group_size = 32 }]",
            "two settings or more",
        ),
        (
            "budget_bits = 4.0\nbudget_choices = [{ bits = 4, group_size = 100 }, { bits = 3, group_size = 100 }]",
            "none of the group sizes divides the",
        ),
        (
            "budget_bits = 4.0\n[[branch.override]]\nmatch = \"*\"\nbits = 4",
            "its overrides match every linear layer",
        ),
    ] {
        let scratch = Scratch::new();
        let recipe = scratch.recipe(
            &medi_tiny(),
            &format!("[[branch]]\nname = \"a\"\n{branch}\n"),
        );
        let line = refuse(["quantize", recipe.to_str().unwrap(), "--device", "cpu"]);
        assert!(line.contains(words), "{branch}: {line}");
        assert!(line.contains("recipe.toml:"), "{line}");
        scratch.assert_nothing_written();
    }
}
