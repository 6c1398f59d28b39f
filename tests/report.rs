//! `gptq report`, and the contents of `report.json`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use gptq_format::{Checkpoint, sha256};
use serde_json::Value;

use crate::harness::{Scratch, medi_tiny, refuse, succeed};

const BRANCHES: &str = "[[branch]]\nname = \"main\"\nbits = 4\n\
    [[branch]]\nname = \"wide\"\nbits = 8\ngroup_size = -1\n\
    [[branch.override]]\nmatch = \"*.layers.1.mlp.down_proj\"\nskip = true\n";

/// Makes two finished branches, one of them with an unquantized linear layer.
fn matrix(scratch: &Scratch) -> PathBuf {
    let recipe = scratch.recipe(&medi_tiny(), BRANCHES);
    let recipe = recipe.to_str().unwrap();
    let text = "tests/data/eval_wikidoc_40.json";
    succeed(["quantize", recipe, "--perplexity", text]);
    scratch.out()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn digests_are_those_of_the_tensors_in_the_file_and_the_run_is_on_record() {
    let scratch = Scratch::new();
    let out = matrix(&scratch);
    for (branch, count) in [("main", 21), ("wide", 20)] {
        let dir = out.join(branch);
        let report = json(&dir.join("report.json"));
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let linears = report["linears"].as_array().unwrap();
        assert_eq!(linears.len(), count);
        for linear in linears {
            for tensor in ["qweight", "qzeros", "scales", "g_idx"] {
                let name = format!("{}.{tensor}", linear["name"].as_str().unwrap());
                let bytes = checkpoint.view(&name).unwrap().bytes();
                assert_eq!(linear["digests"][tensor], sha256(&bytes), "{name}");
            }
        }
        let command = report["command"].as_str().unwrap();
        assert!(
            command.starts_with("gptq quantize recipe.toml --perplexity "),
            "{command}"
        );
        assert_eq!(report["perplexity"]["text"], "eval_wikidoc_40.json");
        assert!(report["perplexity"]["value"].as_f64().unwrap() > 1.0);
        let [own, text] = ["dense", "text_sha256"].map(|key| &report["perplexity"][key]);
        assert!(
            own.is_f64() && text.as_str().unwrap().len() == 64,
            "{report}"
        );
        let phases = report["phases"].as_array().unwrap();
        assert!(phases.iter().any(|p| p["phase"] == "Gram"), "{phases:?}");
    }
}

#[test]
fn the_dense_models_perplexity_stands_beside_the_branches() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), BRANCHES);
    let text = "tests/data/eval_wikidoc_40.json";
    let args = ["quantize", recipe.to_str().unwrap(), "--perplexity", text];
    let alone = succeed(["verify", "tests/models/medi-tiny", "--text", text, "--json"]);
    let alone: Value = serde_json::from_str(&alone).unwrap();
    let dense = alone["perplexity"]["value"].as_f64().unwrap();
    let table = succeed(args);
    let row = table
        .lines()
        .find(|l| l.starts_with("dense model"))
        .unwrap();
    assert!(row.contains(&format!("{dense:.3}")), "{table}");
    assert!(
        table.contains("over dense") && table.contains("windows of 1024"),
        "{table}"
    );
    let own = || json(&scratch.out().join("main/report.json"))["perplexity"].clone();
    assert_eq!(own()["dense"], dense);
    // On the same text it is taken from there: the recorded value appears again.
    let path = scratch.out().join("main/report.json");
    let mut edited = json(&path);
    edited["perplexity"]["dense"] = 123.25.into();
    fs::write(&path, edited.to_string()).unwrap();
    let record: Value = serde_json::from_str(&succeed(args.iter().chain(&["--json"]))).unwrap();
    assert_eq!(record["dense_perplexity"], 123.25);
}

#[test]
fn the_page_and_its_tables_lie_beside_the_branches() {
    let scratch = Scratch::new();
    let out = matrix(&scratch);
    let printed = succeed(["report", out.to_str().unwrap(), "--json"]);
    let table: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(json(&out.join("report-table.json")), table);
    for row in table.as_array().unwrap() {
        let dir = out.join(row["branch"].as_str().unwrap());
        assert_eq!(
            row["perplexity"],
            json(&dir.join("report.json"))["perplexity"]["value"]
        );
        let weights = fs::metadata(dir.join("model.safetensors")).unwrap().len();
        assert_eq!(row["bytes"], weights);
    }
    let csv = fs::read_to_string(out.join("report-table.csv")).unwrap();
    assert_eq!(csv.lines().count(), 3);
    let branch = out.join("wide");
    succeed(["report", branch.to_str().unwrap()]);
    let page = fs::read_to_string(branch.join("report.html")).unwrap();
    assert!(page.contains("left in full precision") && !page.contains(">main<"));
    in_a_browser(&out.join("report.html"), &scratch);
}

#[test]
fn a_directory_without_branches_is_refused() {
    let line = refuse(["report", "tests/data"]);
    assert!(
        line.contains("tests/data") && line.contains("report.json"),
        "{line}"
    );
}

/// Opens the page in headless Chromium, if available: no complaint on the console, and a click on a
/// heading sorts.
fn in_a_browser(page: &Path, scratch: &Scratch) {
    let found = ["chromium", "chromium-browser", "google-chrome"]
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok());
    let Some(browser) = found else {
        eprintln!("skipped: no Chromium here to open the report in");
        return;
    };
    // The branch's name is the first column; a second click reverses the order.
    let click = "<script>const b = document.querySelector('.sortable button'); b.click(); b.click();</script>";
    let clicked = scratch.path("clicked.html");
    let text = fs::read_to_string(page).unwrap();
    fs::write(
        &clicked,
        text.replace("</body>", &format!("{click}</body>")),
    )
    .unwrap();
    let dom = |page: &Path| {
        let output = Command::new(browser)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
                "--dump-dom",
            ])
            .arg(format!(
                "--user-data-dir={}",
                scratch.path("browser").display()
            ))
            .arg(page)
            .output()
            .unwrap();
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!log.contains("CONSOLE"), "{log}");
        String::from_utf8(output.stdout).unwrap()
    };
    let order = |dom: &str| {
        let at = |name: &str| dom.find(&format!("data-v=\"{name}\"")).unwrap();
        at("main") < at("wide")
    };
    assert!(order(&dom(page)));
    let sorted = dom(&clicked);
    assert!(!order(&sorted) && sorted.contains("aria-sort=\"descending\""));
}
