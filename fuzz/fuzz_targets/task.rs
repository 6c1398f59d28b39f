//! Any bytes behind a first one as a file of tasks, in the layout that the first one says, as results of
//! lm-evaluation-harness, and as `eval.json`.
#![no_main]

use gptq_eval::{TaskLayout, Task, TaskOptions, TaskResults, read_harness};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else {
        return;
    };
    let layouts = [
        ("task.jsonl", TaskLayout::Plain),
        ("ori_pqal.json", TaskLayout::PubMedQa),
        ("anatomy_test.csv", TaskLayout::Mmlu),
        ("dev.jsonl", TaskLayout::MedMcQa),
        ("test.jsonl", TaskLayout::MedQa),
    ];
    match layouts.get(usize::from(first % 7)) {
        Some((name, layout)) => gptq_fuzz::with_files(&[(name, bytes)], |dir| {
            let options = TaskOptions::new(&dir.join(name), *layout);
            if let Ok(task) = Task::read(&options) {
                for question in &task.questions {
                    assert!(question.answer < question.choices.len());
                    assert!(task.prompt(question).ends_with(&question.text));
                }
            }
        }),
        None if first % 7 == 5 => gptq_fuzz::with_files(&[("results.json", bytes)], |dir| {
            let _ = read_harness(&dir.join("results.json"));
        }),
        None => gptq_fuzz::with_files(&[("eval.json", bytes)], |dir| {
            let _ = TaskResults::read(dir);
        }),
    }
});
