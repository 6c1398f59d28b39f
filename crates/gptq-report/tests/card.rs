//! The card of a committed set of reports.

use std::fs;
use std::path::Path;

use gptq_report::{CardSettings, Matrix, PromptTemplate, card, facts};

use crate::fixture::{directory, matrix_with};

fn settings() -> CardSettings {
    CardSettings {
        repo: "user/medi-tiny-GPTQ".to_owned(),
        prompt: PromptTemplate::load("chatml", Path::new(".")).unwrap(),
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

/// Parses the front matter as far as this card's YAML goes: keys with a JSON scalar or a list of
/// them.
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
    let error = PromptTemplate::load("nothing-like-this", Path::new(".")).unwrap_err();
    assert!(error.to_string().contains("chatml"), "{error}");
}

/// Makes a branch directory with the given chat template.
fn with_template(template: &str) -> (tempfile::TempDir, Matrix) {
    let target = directory(|_| ());
    let config = r#"{"eos_token": "<|im_end|>"}"#;
    fs::write(target.path().join("main/tokenizer_config.json"), config).unwrap();
    fs::write(target.path().join("main/chat_template.jinja"), template).unwrap();
    let matrix = Matrix::read(target.path()).unwrap();
    (target, matrix)
}

#[test]
fn the_tokenizers_own_template_is_shown_and_applied_by_its_name() {
    let chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}\
                  {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let (_target, matrix) = with_template(chatml);
    for prompt in [
        PromptTemplate::of(matrix.dir()).unwrap(),
        PromptTemplate::load("own", matrix.dir()).unwrap(),
    ] {
        let settings = CardSettings {
            prompt,
            ..settings()
        };
        let text = card(&facts(&matrix, &settings).unwrap(), None).unwrap();
        assert!(
            text.contains("```\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n```"),
            "{text}"
        );
        assert!(text.contains("tokenizer.apply_chat_template("), "{text}");
        assert!(!text.contains("template = ") && !text.contains("{system_message}"));
    }
    // Without a template there is nothing to apply.
    let plain = matrix_with(|_| ());
    let name = PromptTemplate::of(plain.dir()).unwrap().name;
    assert_eq!(name, "plain");
    let line = PromptTemplate::load("own", plain.dir()).unwrap_err();
    assert!(line.to_string().contains("--prompt-template"), "{line}");
    let (_target, broken) = with_template("{{ raise_exception('no') }}");
    let line = PromptTemplate::of(broken.dir()).unwrap_err().to_string();
    assert!(
        line.contains("no") && line.contains("--prompt-template"),
        "{line}"
    );
}

#[test]
fn no_known_template_leaves_more_than_the_prompt_open() {
    for name in ["chatml", "llama-2", "alpaca", "plain"] {
        let template = PromptTemplate::load(name, Path::new(".")).unwrap();
        assert_eq!(template.text.matches(['{', '}']).count(), 2, "{name}");
        assert_eq!(template.text.matches("{prompt}").count(), 1, "{name}");
    }
}

#[test]
fn branches_that_differ_by_preset_alone_are_described_differently() {
    let matrix = matrix_with(|report| {
        if report.branch.ends_with("64g-actorder_True") {
            report.quantize_config = report.quantize_config.clone();
            report.preset = gptq_plan::Preset::Autogptq;
        }
    });
    let text = card(&facts(&matrix, &settings()).unwrap(), None).unwrap();
    assert_eq!(
        text.matches("act order, preset autogptq.").count(),
        1,
        "{text}"
    );
}

#[test]
fn perplexities_on_different_windows_have_columns_of_their_own() {
    let matrix = matrix_with(|report| {
        if report.branch == "main" {
            // The verification report measured windows of 1024; the run measured other windows.
            let measured = report.perplexity.as_mut().unwrap();
            (measured.window, measured.tokens, measured.value) = (512, 4088, 22.75);
            measured.dense = Some(21.0);
        }
    });
    let text = card(&facts(&matrix, &settings()).unwrap(), None).unwrap();
    let row = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
    let heading = row("| Branch | Bits");
    assert!(
        heading.contains(
            "| Perplexity, eval_wikidoc_40.json, windows of 1024 \
             | Perplexity, eval_wikidoc_40.json, windows of 512 |"
        ),
        "{heading}"
    );
    let main = row("| [main]");
    assert!(
        main.contains("| 21.500 (+6.17 %) | 22.750 (+8.33 %) |"),
        "{main}"
    );
    let other = row("| [gptq-4bit-64g");
    assert!(other.contains("| 21.135 | not measured |"), "{other}");
}

#[test]
fn a_failed_verification_is_on_the_card() {
    let target = directory(|_| ());
    let receipt = target.path().join("main/verify.json");
    let text = fs::read_to_string(&receipt).unwrap();
    let failed = r#""pass": false, "checks": [{"name": "KL divergence", "pass": false, "detail": "0.2 | much"}]"#;
    fs::write(&receipt, text.replace("\"pass\": true", failed)).unwrap();
    let facts = facts(&Matrix::read(target.path()).unwrap(), &settings()).unwrap();
    assert_eq!(facts.failures(), [("main", "KL divergence: 0.2 \\| much")]);
    let text = card(&facts, None).unwrap();
    let row = text
        .lines()
        .find(|line| line.starts_with("| [main]"))
        .unwrap();
    assert!(
        row.contains("**Failed verification** (KL divergence: 0.2 \\| much)"),
        "{row}"
    );
}
