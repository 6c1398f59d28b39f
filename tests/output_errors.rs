//! Output errors in a report: a better branch has lower ones, whatever its method.

use std::fs;

use serde_json::Value;

use crate::harness::{Scratch, medi_tiny, succeed};

/// Two presets at 3 bits.
const BRANCHES: &str = "[defaults]\nbits = 3\ngroup_size = 64\n\
                        [[branch]]\nname = \"standard\"\npreset = \"standard\"\n\
                        [[branch]]\nname = \"best\"\npreset = \"best\"\n";
const FLAGS: [&str; 4] = ["--samples", "64", "--device", "cpu"];

fn report(scratch: &Scratch, branch: &str) -> Value {
    let path = scratch.out().join(branch).join("report.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Returns a number of every linear layer.
fn all(report: &Value, key: &str) -> Vec<f64> {
    let linears = report["linears"].as_array().unwrap();
    let number = |linear: &Value| linear[key].as_f64().unwrap();
    linears.iter().map(number).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn best_reads_better_than_standard_and_both_better_than_rounding_in_every_output() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), BRANCHES);
    let log = scratch.path("run.log");
    let logged = ["--log-file", log.to_str().unwrap()];
    let args = ["quantize", recipe.to_str().unwrap()];
    let said = succeed(args.iter().chain(&FLAGS).chain(&logged));
    let [standard, best] = ["standard", "best"].map(|branch| report(&scratch, branch));

    // Against the original weights the better branch looks far worse than rounding.
    let [near, far] = [&standard, &best].map(|it| mean(&all(it, "relative_error")));
    assert!(far > 1.1 * near, "{far} {near}");
    // Against the dense model's outputs it is better.
    let [plain, better] = [&standard, &best].map(|it| mean(&all(it, "output_error")));
    assert!(better < 0.95 * plain, "{better} {plain}");
    for report in [&standard, &best] {
        let rounded = mean(&all(report, "rtn_output_error"));
        assert!(mean(&all(report, "output_error")) < rounded, "{report}");
        // The solver's objective is far below the rounding loss of the same weights.
        let objective = mean(&all(report, "solver_objective"));
        assert!(objective < mean(&all(report, "rtn_error")), "{report}");
        // 64 windows of 256: one of them, whole.
        assert_eq!(report["compared"]["windows"], 1);
        assert_eq!(report["compared"]["tokens"], 256);
    }
    // Without a correction the original weights are rounded.
    assert_eq!(
        all(&standard, "solver_objective"),
        all(&standard, "relative_error")
    );
    // The model's first input equals the dense model's: only the weights differ, on 256 tokens of
    // 16384.
    for linear in standard["linears"].as_array().unwrap().iter().take(3) {
        let ratio =
            linear["output_error"].as_f64().unwrap() / linear["relative_error"].as_f64().unwrap();
        assert!((0.8..1.25).contains(&ratio), "{linear}");
    }

    // The accumulated error grows, and the better branch has less.
    let blocks = |report: &Value| -> Vec<f64> {
        let blocks = report["blocks"].as_array().unwrap();
        let layers: Vec<u64> = blocks
            .iter()
            .map(|b| b["layer"].as_u64().unwrap())
            .collect();
        assert_eq!(layers, [0, 1, 2]);
        let error = |block: &Value| block["output_error"].as_f64().unwrap();
        blocks.iter().map(error).collect()
    };
    let [plain, better] = [blocks(&standard), blocks(&best)];
    assert!(plain[0] < plain[1] && plain[1] < plain[2], "{plain:?}");
    assert!(better[2] < plain[2], "{better:?} {plain:?}");

    // Table, log, CSV and page agree.
    let row = |branch: &str| -> Vec<f64> {
        let rows = said.lines().skip_while(|line| !line.starts_with("branch "));
        let mut rows = rows.filter(|line| line.starts_with(&format!("{branch} ")));
        let cells = rows.next().unwrap().split_whitespace();
        cells.filter_map(|cell| cell.parse().ok()).collect()
    };
    assert!(
        said.contains("output error") && !said.contains("weight error"),
        "{said}"
    );
    // Size, output error, worst, of rtn, last block, seconds.
    let [plain, better] = [row("standard"), row("best")];
    for (column, what) in [(1, "output error"), (3, "of rtn"), (4, "last block")] {
        assert!(better[column] < plain[column], "{what}: {said}");
        assert!(plain[column] < 1.0, "{what}: {said}");
    }
    let text = fs::read_to_string(&log).unwrap();
    for part in [
        " output_error=",
        "rtn_output_error=",
        "solver_objective=",
        "last_block_error=",
        ": block branch=\"best\" layer=2 output_error=",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("worse than round-to-nearest"), "{text}");
    let csv = fs::read_to_string(scratch.out().join("best/report.csv")).unwrap();
    let column = |name: &str| -> Vec<f64> {
        let mut names = csv.lines().next().unwrap().split(',');
        let at = names.position(|it| it == name).unwrap();
        let rows = csv.lines().skip(1);
        rows.map(|row| row.split(',').nth(at).unwrap().parse().unwrap())
            .collect()
    };
    for key in ["output_error", "rtn_output_error", "solver_objective"] {
        let (found, expected) = (column(key), all(&best, key));
        assert_eq!(found.len(), expected.len());
        let same = |(a, b): (&f64, &f64)| printed(*a, *b);
        assert!(found.iter().zip(&expected).all(same), "{key}: {csv}");
    }
    assert!(printed(column("block_output_error")[20], last_block(&best)));
    let table = succeed(["report", scratch.out().to_str().unwrap(), "--json"]);
    let table: Value = serde_json::from_str(&table).unwrap();
    for row in table.as_array().unwrap() {
        let report = report(&scratch, row["branch"].as_str().unwrap());
        let number = |key: &str| row[key].as_f64().unwrap();
        let outputs = mean(&all(&report, "output_error"));
        assert!(printed(number("mean_output_error"), outputs), "{row}");
        assert!(
            printed(number("last_block_error"), last_block(&report)),
            "{row}"
        );
    }
    let page = fs::read_to_string(scratch.out().join("report.html")).unwrap();
    assert!(page.contains(">Output error<") && page.contains("block output"));

    // A branch's errors do not depend on other branches in the run.
    let alone = Scratch::new();
    let recipe = alone.recipe(&medi_tiny(), BRANCHES);
    let args = ["quantize", recipe.to_str().unwrap(), "--branch", "standard"];
    succeed(args.iter().chain(&FLAGS));
    for key in ["output_error", "rtn_output_error", "solver_objective"] {
        let alone = report(&alone, "standard");
        assert_eq!(all(&alone, key), all(&standard, key), "{key}");
        assert_eq!(alone["blocks"], standard["blocks"]);
    }
}

/// Returns true if the numbers are equal up to the last bit, after printing in decimal and reading
/// back.
fn printed(found: f64, expected: f64) -> bool {
    (found / expected - 1.0).abs() < 1e-12
}

fn last_block(report: &Value) -> f64 {
    report["blocks"][2]["output_error"].as_f64().unwrap()
}

#[test]
fn calibrated_on_dense_states_a_branch_is_still_compared_on_its_own() {
    let scratch = Scratch::new();
    let branches = "[[branch]]\nname = \"a\"\nbits = 2\ngroup_size = 64\n";
    let recipe = scratch.recipe_with(&medi_tiny(), "propagate = \"dense\"", "", branches);
    succeed(["quantize", recipe.to_str().unwrap(), "--device", "cpu"]);
    let report = report(&scratch, "a");
    // Its inputs include the errors of earlier blocks, which weight errors do not show.
    let [output, weights] = ["output_error", "relative_error"].map(|key| all(&report, key));
    assert!(
        mean(&output[14..]) > 1.5 * mean(&weights[14..]),
        "{output:?} {weights:?}"
    );
    assert!(last_block(&report) > 0.0);
}

#[test]
fn lines_of_progress_tell_the_time_that_is_left_until_there_is_none() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), "[[branch]]\nname = \"a\"\nbits = 4\n");
    let said = succeed(["quantize", recipe.to_str().unwrap(), "--device", "cpu"]);
    let line = |layer: &str| said.lines().find(|line| line.starts_with(layer)).unwrap();
    for layer in ["a: layer 1/3, output error ", "a: layer 2/3, output error "] {
        let left = line(layer).rsplit_once(", about ").unwrap().1;
        assert!(left.ends_with(" left"), "{said}");
    }
    assert!(!line("a: layer 3/3").contains("left"), "{said}");
}
