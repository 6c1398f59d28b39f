//! Layouts, prompts and refusals.

use std::fs;

use super::*;

fn pubmedqa() -> TaskOptions {
    let data = [
        env!("CARGO_MANIFEST_DIR"),
        "../../tests/data/pubmedqa/ori_pqal.json",
    ];
    TaskOptions::new(&data.iter().collect::<PathBuf>(), TaskLayout::PubMedQa)
}

/// Reads a task in a file of this name and text.
fn read(name: &str, text: &str, layout: TaskLayout) -> Result<Task, String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(name);
    fs::write(&file, text).unwrap();
    Task::read(&TaskOptions::new(&file, layout)).map_err(|error| error.to_string())
}

#[test]
fn pubmedqa_s_test_questions_are_asked_and_the_others_are_shots() {
    let task = Task::read(&pubmedqa()).unwrap();
    assert_eq!((task.questions.len(), task.available), (100, 100));
    assert_eq!(task.name, "pubmedqa");
    assert_eq!(task.answers(), BTreeMap::from([(0, 55), (1, 28), (2, 17)]));
    let first = &task.questions[0];
    assert!(first.place.starts_with("key "), "{}", first.place);
    let prompt = task.prompt(first);
    assert!(
        prompt.starts_with("Abstract: ") && prompt.ends_with("\nAnswer:"),
        "{prompt}"
    );
    let shots = Task::read(&TaskOptions {
        shots: 3,
        limit: Some(7),
        ..pubmedqa()
    });
    let shots = shots.unwrap();
    assert_eq!(shots.questions.len(), 7);
    let prompt = shots.prompt(&shots.questions[0]);
    assert_eq!(prompt.matches("\nAnswer: ").count(), 3);
    assert!(prompt.ends_with(&task.prompt(first)));
    // From the same file by name, shots are the same.
    let named = TaskOptions {
        shots_from: Some(pubmedqa().file),
        shots: 3,
        ..pubmedqa()
    };
    let named = Task::read(&named).unwrap();
    assert_eq!(named.prompt(&named.questions[0]), prompt);
    let many = TaskOptions {
        shots: 6,
        ..pubmedqa()
    };
    let error = Task::read(&many).unwrap_err().to_string();
    assert!(
        error.contains("6 shots") && error.contains("has 5"),
        "{error}"
    );
}

#[test]
fn mmlu_s_rows_get_the_harness_s_prompt_with_the_subject_before_it() {
    let text = "\" What, is \"\"it\"\"? \",one,two,three,four,C\n5,6,7,8,9,A\n";
    let task = read("college_biology_test.csv", text, TaskLayout::Mmlu).unwrap();
    assert_eq!(task.name, "mmlu_college_biology");
    let prompt = "The following are multiple choice questions (with answers) about college biology.\n\n\
                  What, is \"it\"?\nA. one\nB. two\nC. three\nD. four\nAnswer:";
    assert_eq!(task.prompt(&task.questions[0]), prompt);
    assert_eq!(task.questions[0].choices, ["A", "B", "C", "D"]);
    assert_eq!([task.questions[0].answer, task.questions[1].answer], [2, 0]);
    for (text, words) in [
        ("a,b,c,d,e,F\n", ["row 0", "\"answer\"", "\"F\""]),
        (
            "1,2,3,4,5,A\na,b,c,d,A\n",
            ["row 1", "\"record\"", "5 columns"],
        ),
        ("", ["a_test.csv", "no rows", ""]),
    ] {
        let error = read("a_test.csv", text, TaskLayout::Mmlu).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn medmcqa_counts_its_options_from_1_or_from_0_and_one_file_says_which() {
    let row = |cop: u32| {
        format!(
            r#"{{"question":"Q","opa":"a","opb":"b","opc":"c","opd":"d","cop":{cop},"id":"x"}}"#
        )
    };
    let rows = |cops: &[u32]| cops.iter().map(|it| row(*it) + "\n").collect::<String>();
    let answers = |cops: &[u32]| {
        let task = read("dev.json", &rows(cops), TaskLayout::MedMcQa)?;
        let answers = task.questions.iter().map(|it| it.answer);
        Ok::<Vec<usize>, String>(answers.collect())
    };
    assert_eq!(answers(&[1, 4, 2]), Ok(vec![0, 3, 1]));
    assert_eq!(answers(&[1, 0, 3]), Ok(vec![1, 0, 3]));
    for (cops, word) in [
        (&[0, 4][..], "neither"),
        (&[1, 2], "add a row"),
        (&[1, 5], "row 1, \"cop\": 5"),
    ] {
        let error = answers(cops).unwrap_err();
        assert!(error.contains(word), "{error}");
    }
    let task = read("dev.jsonl", &rows(&[4]), TaskLayout::MedMcQa).unwrap();
    let prompt = "Question: Q\nChoices:\nA. a\nB. b\nC. c\nD. d\nAnswer:";
    assert_eq!(task.prompt(&task.questions[0]), prompt);
}

#[test]
fn medqa_has_four_options_or_five() {
    let row = |options: &str, right: &str| {
        format!(
            r#"{{"question":"Q","answer":"b","options":{{{options}}},"answer_idx":"{right}","meta_info":"step1"}}"#
        )
    };
    let five = row(r#""A":"a","B":"b","C":"c","D":"d","E":"e""#, "E");
    let task = read("test.jsonl", &five, TaskLayout::MedQa).unwrap();
    let prompt = "Question: Q\nA. a\nB. b\nC. c\nD. d\nE. e\nAnswer:";
    assert_eq!(task.prompt(&task.questions[0]), prompt);
    assert_eq!(
        (task.questions[0].answer, task.questions[0].choices.len()),
        (4, 5)
    );
    for (row, words) in [
        (row(r#""A":"a","B":"b""#, "C"), ["\"answer_idx\"", "\"C\""]),
        (
            row(r#""B":"b","A":"a""#, "A"),
            ["\"options\"", "in this order"],
        ),
        (row(r#""A":"a","B":1"#, "A"), ["\"options\"", "row 0"]),
    ] {
        let error = read("test.jsonl", &row, TaskLayout::MedQa).unwrap_err();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn a_bad_row_is_named_by_file_row_and_key() {
    let good = r#"{"question": "Q", "choices": ["a", "b"], "answer": "A"}"#;
    for (row, words) in [
        (
            r#"{"choices": ["a", "b"], "answer": 0}"#,
            ["\"prompt\"", "missing"],
        ),
        (
            r#"{"prompt": 3, "choices": ["a", "b"], "answer": 0}"#,
            ["\"prompt\"", "3 is not a text"],
        ),
        (
            r#"{"prompt": "p", "choices": "ab", "answer": 0}"#,
            ["\"choices\"", "not a list of texts"],
        ),
        (
            r#"{"prompt": "p", "choices": ["a"], "answer": 0}"#,
            ["\"choices\"", "at least 2"],
        ),
        (
            r#"{"prompt": "p", "choices": ["a", "b"]}"#,
            ["\"answer\"", "the row has prompt, choices"],
        ),
        (
            r#"{"prompt": "p", "choices": ["a", "b"], "answer": "C"}"#,
            ["\"answer\"", "\"C\""],
        ),
        (
            r#"{"prompt": "p", "choices": ["a", "b"], "answer": 2}"#,
            ["\"answer\"", "numbered from 0"],
        ),
    ] {
        let error = read("task.jsonl", &format!("{good}\n{row}\n"), TaskLayout::Plain).unwrap_err();
        let place = ["task.jsonl: row 1, "];
        let all = words.iter().chain(&place);
        assert!(all.clone().all(|word| error.contains(word)), "{error}");
    }
    let error = read("task.jsonl", &format!("{good}\n{{"), TaskLayout::Plain).unwrap_err();
    assert!(
        error.contains("task.jsonl") && error.contains("line 2"),
        "{error}"
    );
    let truth = r#"{"1": {"QUESTION": "Q", "CONTEXTS": ["c"], "final_decision": "perhaps"}}"#;
    let error = read("ori_pqal.json", truth, TaskLayout::PubMedQa).unwrap_err();
    let words = [
        "ori_pqal.json",
        "key 1",
        "\"final_decision\"",
        "\"perhaps\"",
    ];
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
}

#[test]
fn a_template_may_use_any_key_and_letters_stand_for_choices() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("mine.jsonl");
    let row = r#"{"stem": " Which? ", "question": "", "choices": ["one", "two"], "answer": "two"}"#;
    fs::write(&file, row).unwrap();
    let options = TaskOptions {
        template: Some("{{ stem.strip() }}\nA. {{ choices[0] }}\nB. {{ choices[1] }}\n".to_owned()),
        letters: true,
        ..TaskOptions::new(&file, TaskLayout::Plain)
    };
    let task = Task::read(&options).unwrap();
    assert_eq!(task.prompt(&task.questions[0]), "Which?\nA. one\nB. two\n");
    assert_eq!(task.questions[0].choices, ["A", "B"]);
    assert_eq!((task.questions[0].answer, task.name.as_str()), (1, "mine"));
    let error = |template: &str| {
        let options = TaskOptions {
            template: Some(template.to_owned()),
            ..options.clone()
        };
        Task::read(&options).unwrap_err().to_string()
    };
    let missing = error("{{ stam }}");
    assert!(
        missing.contains("row 0") && missing.contains("undefined"),
        "{missing}"
    );
    let broken = error("{{ stem");
    assert!(broken.contains("does not parse"), "{broken}");
    let shots = TaskOptions {
        shots: 1,
        ..options.clone()
    };
    let none = Task::read(&shots).unwrap_err().to_string();
    assert!(none.contains("--shots-from"), "{none}");
    // A question is not a shot of itself.
    let own = TaskOptions {
        shots_from: Some(file.clone()),
        ..shots
    };
    let none = Task::read(&own).unwrap_err().to_string();
    assert!(none.contains("has 0"), "{none}");
}
