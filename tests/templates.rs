//! Chat templates in a run: refusals, and the date.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Scratch, refused, succeed, succeeded};
use crate::resume::{QUICK, contents, killed_after_a_block, quantize};

/// Writes the date, and refuses conversations that do not begin with a user message.
const TEMPLATE: &str = "{{ strftime_now('%d %B %Y') }}\n{% if messages[0].role != 'user' %}\
                        {{ raise_exception('a user begins') }}{% endif %}\
                        {% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";

/// Writes a recipe for the bundled model with that template, on 60 conversations of which row 13
/// begins with the assistant.
fn recipe(scratch: &Scratch) -> PathBuf {
    let model = scratch.copy_model();
    fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
    let row = |i: usize| {
        let first = if i == 13 { "assistant" } else { "user" };
        let text = format!("What are the symptoms of disease number {i}, and what helps?");
        let answer = "Fever, cough and a sore throat; rest and warm tea help most people.";
        let talk =
            json!([{"role": first, "content": text}, {"role": "assistant", "content": answer}]);
        format!("{}\n", json!({"messages": talk}))
    };
    let rows = scratch.path("rows.jsonl");
    fs::write(&rows, (0..60).map(row).collect::<String>()).unwrap();
    let branches = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n";
    let recipe = scratch.recipe(&model, branches);
    let text = fs::read_to_string(&recipe).unwrap();
    let source =
        "source = \"calibration/wikidoc/wikidoc_patient_information_1000.json\"\nrows = \"0:100\"";
    let ours = format!("source = {rows:?}\nmessages = \"messages\"");
    assert!(text.contains(source));
    fs::write(&recipe, text.replace(source, &ours)).unwrap();
    recipe
}

fn manifest(branch: &Path) -> Value {
    let report = fs::read(branch.join("report.json")).unwrap();
    let report: Value = serde_json::from_slice(&report).unwrap();
    report["calibration"].clone()
}

#[test]
fn a_row_that_the_template_objects_to_is_named_or_left_out_and_counted() {
    let scratch = Scratch::new();
    let recipe = recipe(&scratch);
    let line = refused(quantize(&recipe, &QUICK).output().unwrap());
    for word in [
        "rows.jsonl: row 13: ",
        "chat_template.jinja, line 2",
        "a user begins",
    ] {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
    scratch.assert_nothing_written();
    let shown = [
        "calibration",
        "show",
        recipe.to_str().unwrap(),
        "--on-error",
        "skip",
    ];
    let text = succeed(shown.iter().chain(&["--samples", "2", "--seq-len", "128"]));
    assert!(
        text.contains("59 used of all rows, 1 skipped because the chat template refused"),
        "{text}"
    );
    let skip = [&QUICK[..], &["--on-error", "skip"]].concat();
    succeeded(quantize(&recipe, &skip).output().unwrap());
    let manifest = manifest(&scratch.out().join("a"));
    assert_eq!(manifest["objected_rows"], 1);
    assert_eq!(manifest["row_count"], 59);
}

#[test]
fn a_run_that_is_gone_on_with_another_day_tells_its_templates_the_recorded_date() {
    let long_ago = ["--on-error", "skip", "--date", "2024-07-26"];
    let today = ["--on-error", "skip"];
    let whole = Scratch::new();
    succeeded(
        quantize(&recipe(&whole), &[&QUICK[..], &long_ago].concat())
            .output()
            .unwrap(),
    );
    assert_eq!(manifest(&whole.out().join("a"))["date"], "2024-07-26");
    let expected = contents(&whole.out());

    let scratch = Scratch::new();
    let recipe = recipe(&scratch);
    killed_after_a_block(&recipe, &scratch.out(), &[&QUICK[..], &long_ago].concat());
    let said = succeeded(
        quantize(&recipe, &[&QUICK[..], &today].concat())
            .output()
            .unwrap(),
    );
    assert!(said.contains("resuming"), "{said}");
    let found = contents(&scratch.out());
    for name in ["a/model.safetensors", "a/quantize_config.json"] {
        assert!(
            found[Path::new(name)] == expected[Path::new(name)],
            "{name} differs"
        );
    }
    assert_eq!(manifest(&scratch.out().join("a"))["date"], "2024-07-26");
    // A finished branch is kept on any day.
    let before = contents(&scratch.out());
    succeeded(
        quantize(&recipe, &[&QUICK[..], &today].concat())
            .output()
            .unwrap(),
    );
    assert!(before == contents(&scratch.out()));
}
