//! The card of a committed set of reports.

use std::fs;
use std::path::Path;

use gptq_report::{CardSettings, Matrix, PromptTemplate, card, facts};

use crate::fixture::{directory, matrix_with};

fn settings() -> CardSettings {
    CardSettings {
        repo: "user/medi-tiny-GPTQ".to_owned(),
        prompt: PromptTemplate::load("chatml").unwrap(),
        base_card: None,
        base_model: None,
        dataset: None,
        license: None,
        language: None,
    }
}

#[test]
fn the_card_of_the_tiny_matrix() {
    let facts = facts(
        &matrix_with(|_| ()),
        &CardSettings {
            base_card: Some(
                "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# medi-tiny\n\nThe base's text.\n"
                    .into(),
            ),
            base_model: Some("someone/medi-tiny".to_owned()),
            dataset: Some("medalpaca/medical_meadow_wikidoc_patient_information".to_owned()),
            ..settings()
        },
    )
    .unwrap();
    assert_eq!(facts.missing(), []);
    let text = card(&facts, None).unwrap();
    let made = Path::new(env!("CARGO_TARGET_TMPDIR")).join("card.md");
    fs::write(&made, &text).unwrap();
    let expected = include_str!("card.md");
    assert!(
        text == expected,
        "tests/card.md is not what came out: {}",
        made.display()
    );
}

#[test]
fn a_card_without_a_base_card_says_what_is_missing() {
    let facts = facts(&matrix_with(|_| ()), &settings()).unwrap();
    let missing: Vec<&str> = facts.missing().iter().map(|(key, _)| *key).collect();
    assert_eq!(missing, ["base_model", "license", "language", "datasets"]);
    let text = card(&facts, None).unwrap();
    assert!(text.contains("\nlicense: \"unknown\"\n") && !text.contains("base_model:"));
}

#[test]
fn hub_names_in_the_reports_reach_the_front_matter() {
    let matrix = matrix_with(|report| {
        report.model = "epfl-llm/meditron-7b".to_owned();
        report.calibration.source = "medalpaca/medical_meadow_wikidoc".to_owned();
    });
    let text = card(&facts(&matrix, &settings()).unwrap(), None).unwrap();
    assert!(
        text.contains("\nbase_model: \"epfl-llm/meditron-7b\"\n"),
        "{text}"
    );
    assert!(
        text.contains("\ndatasets:\n- \"medalpaca/medical_meadow_wikidoc\"\n"),
        "{text}"
    );
    assert!(text.contains("# medi-tiny-GPTQ\n"));
}

/// The front matter, read as far as this card's YAML goes: keys with a JSON scalar, or a list of them.
#[test]
fn the_front_matter_is_yaml() {
    let settings = CardSettings {
        license: Some("odd: \"#licence\"".to_owned()),
        language: Some("en".to_owned()),
        ..settings()
    };
    let text = card(&facts(&matrix_with(|_| ()), &settings).unwrap(), None).unwrap();
    let front = text
        .strip_prefix("---\n")
        .unwrap()
        .split_once("\n---\n")
        .unwrap()
        .0;
    let is_scalar = |value: &str| serde_json::from_str::<serde_json::Value>(value).is_ok();
    let mut keys = Vec::new();
    for line in front.lines() {
        match line.strip_prefix("- ") {
            Some(item) => assert!(is_scalar(item), "{line}"),
            None => {
                let (key, value) = line.split_once(':').unwrap();
                assert!(value.is_empty() || is_scalar(value.trim_start()), "{line}");
                keys.push(key);
            }
        }
    }
    assert_eq!(
        keys,
        [
            "license",
            "language",
            "model_type",
            "quantized_by",
            "library_name",
            "pipeline_tag",
            "inference",
            "tags"
        ]
    );
}

#[test]
fn a_template_of_ones_own_sees_the_facts_and_its_mistakes_are_placed() {
    let facts = facts(&matrix_with(|_| ()), &settings()).unwrap();
    let own = "{{ title }}: {% for b in branches %}{{ b.name }}={{ b.size }} {% endfor %}";
    let text = card(&facts, Some(("own.md", own))).unwrap();
    assert!(text.starts_with("medi-tiny-GPTQ: main=5.46 MB "), "{text}");
    let error = card(&facts, Some(("own.md", "a\n{{ titel }}"))).unwrap_err();
    assert_eq!(error.to_string().lines().count(), 1);
    assert!(
        error.to_string().starts_with("own.md: undefined value"),
        "{error}"
    );
    assert!(error.to_string().ends_with("line 2"), "{error}");
}

#[test]
fn what_does_not_belong_together_is_refused() {
    for repo in ["medi", "user/", "a/b/c", "us er/name"] {
        let settings = CardSettings {
            repo: repo.to_owned(),
            ..settings()
        };
        let error = facts(&matrix_with(|_| ()), &settings).unwrap_err();
        assert!(error.to_string().contains("user/name"), "{error}");
    }
    let two = directory(|report| {
        if report.branch == "main" {
            report.model = "another".to_owned();
        }
    });
    let error = Matrix::read(two.path()).unwrap_err().to_string();
    assert!(
        error.contains("another") && error.contains("medi-tiny"),
        "{error}"
    );
    let twice = directory(|report| report.branch = "main".to_owned());
    let error = Matrix::read(twice.path()).unwrap_err().to_string();
    assert!(error.contains("a second branch"), "{error}");
    let error = PromptTemplate::load("nothing-like-this").unwrap_err();
    assert!(error.to_string().contains("chatml"), "{error}");
}
