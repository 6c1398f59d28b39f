//! Reports with values that no run can write: each is refused with the names of the file and the
//! field.

use std::fs;

use gptq_plan::{BlockReport, BranchReport, Share};
use gptq_report::{Matrix, html, rows};
use serde_json::{Value, json};

use crate::fixture::directory;

/// Reads the matrix with this value in the `main` branch's `file`, and renders it if that succeeds.
fn read(file: &str, field: &str, value: Value) -> Result<(), String> {
    let dir = directory(|_| ());
    let path = dir.path().join("main").join(file);
    let mut report: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    *report.pointer_mut(field).unwrap() = value;
    fs::write(&path, serde_json::to_vec(&report).unwrap()).unwrap();
    let matrix = Matrix::read(dir.path()).map_err(|e| e.to_string())?;
    rows(&matrix);
    html(&matrix).unwrap();
    Ok(())
}

#[test]
fn a_report_that_no_run_can_have_written_is_refused_by_file_and_field() {
    for (file, field, value, word) in [
        (
            "report.json",
            "/linears/1/shape",
            json!([256, 0]),
            "linears[1].shape",
        ),
        (
            "report.json",
            "/linears/1/shape",
            json!([1u64 << 40, 1u64 << 40]),
            "linears[1].shape",
        ),
        (
            "report.json",
            "/linears/0/relative_error",
            json!(1e300),
            "linears[0].relative_error",
        ),
        (
            "report.json",
            "/linears/0/rtn_error",
            json!(-1e300),
            "linears[0].rtn_error",
        ),
        (
            "report.json",
            "/linears/0/layer",
            json!(1u64 << 60),
            "linears[0].layer",
        ),
        (
            "report.json",
            "/linears/0/name",
            json!("x".repeat(600)),
            "linears[0].name",
        ),
        (
            "report.json",
            "/linears/0/group_size",
            json!(1u64 << 62),
            "linears[0].group_size",
        ),
        ("report.json", "/seconds", json!(-1.0), "seconds"),
        (
            "report.json",
            "/perplexity/value",
            json!(1e300),
            "perplexity.value",
        ),
        (
            "report.json",
            "/calibration/samples",
            json!(1u64 << 60),
            "calibration.samples",
        ),
        (
            "verify.json",
            "/blocks/0/relative_error",
            json!(1e300),
            "blocks[0].relative_error",
        ),
        (
            "verify.json",
            "/blocks/0/layer",
            json!(1u64 << 60),
            "blocks[0].layer",
        ),
        (
            "verify.json",
            "/perplexity/dense",
            json!(-1e300),
            "perplexity.dense",
        ),
        (
            "verify.json",
            "/kl_divergence",
            json!(1e300),
            "kl_divergence",
        ),
    ] {
        let line = read(file, field, value).expect_err(field);
        let named = format!("main/{file}: ");
        assert!(
            line.contains(&named) && line.contains(word),
            "{field}: {line}"
        );
        assert!(!line.contains('\n'), "{line}");
    }
}

#[test]
fn linears_that_are_each_within_bounds_are_refused_where_they_are_too_large_together() {
    let dir = directory(|report| {
        for linear in &mut report.linears {
            linear.shape = [1 << 24, 1 << 23];
        }
    });
    let line = Matrix::read(dir.path()).unwrap_err().to_string();
    assert!(
        line.contains("linears[2].shape: over 2^48 weights"),
        "{line}"
    );
}

#[test]
fn errors_however_far_apart_are_drawn() {
    for error in [0.0, 5e-324, 1e30, -1e30] {
        read("report.json", "/linears/0/relative_error", json!(error)).unwrap();
        read("verify.json", "/blocks/0/relative_error", json!(error)).unwrap();
        read("verify.json", "/perplexity/value", json!(error)).unwrap();
    }
}

#[test]
fn more_different_linears_than_a_block_has_are_refused() {
    let dir = directory(|report| {
        let first = report.linears[0].clone();
        report.linears = (0..2049).map(|_| first.clone()).collect();
        for (i, linear) in report.linears.iter_mut().enumerate() {
            linear.name = i.to_string();
        }
    });
    let line = Matrix::read(dir.path()).unwrap_err().to_string();
    assert!(line.contains("linears[2048].name: over 2048"), "{line}");
}

#[test]
fn output_errors_over_one_are_read_and_those_that_nothing_measured_is_are_refused() {
    let read = |edit: fn(&mut BranchReport)| {
        let dir = directory(edit);
        let matrix = Matrix::read(dir.path()).map_err(|e| e.to_string())?;
        html(&matrix).map_err(|e| e.to_string())
    };
    read(|report| {
        for linear in &mut report.linears {
            linear.output_error = Some(1e6);
            linear.rtn_output_error = Some(3.5);
        }
        report.blocks.push(BlockReport {
            layer: 0,
            tuning: None,
            expert_tokens: Vec::new(),
            output_error: 17.0,
        });
    })
    .unwrap();
    type Edit = fn(&mut BranchReport);
    let refused: [(Edit, &str); 4] = [
        (
            |report| report.linears[1].output_error = Some(1e31),
            "linears[1].output_error = 1e31",
        ),
        (
            |report| report.linears[0].solver_objective = Some(-1e31),
            "linears[0].solver_objective",
        ),
        (
            |report| {
                report.blocks.push(BlockReport {
                    layer: 1 << 20,
                    tuning: None,
                    expert_tokens: Vec::new(),
                    output_error: 1.0,
                });
            },
            "blocks[0].layer",
        ),
        (
            |report| {
                report.compared = Some(Share {
                    windows: 1 << 40,
                    tokens: 1,
                });
            },
            "compared.windows",
        ),
    ];
    for (edit, word) in refused {
        let line = read(edit).unwrap_err();
        assert!(line.contains(word) && !line.contains('\n'), "{line}");
    }
}
