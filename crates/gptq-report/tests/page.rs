//! The page shows the numbers of the reports.

use gptq_plan::{BlockReport, Measure, Share, Tuning, TuningLoss};
use gptq_report::{csv, html, rows};

use crate::fixture::matrix_with;

/// Returns the text between the first `from` in `text` and the next `to`.
fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let rest = text
        .split_once(from)
        .unwrap_or_else(|| panic!("no {from}"))
        .1;
    rest.split_once(to).unwrap_or_else(|| panic!("no {to}")).0
}

/// Returns a branch's section.
fn section(page: &str, index: usize) -> &str {
    between(
        page,
        &format!("<section id=\"branch-{}\"", index + 1),
        "</section>",
    )
}

#[test]
fn every_cell_of_a_heat_map_is_its_linears_relative_error() {
    let matrix = matrix_with(|_| ());
    let page = html(&matrix).unwrap();
    for (i, branch) in matrix.branches.iter().enumerate() {
        let body = between(section(&page, i), "<table class=\"heat\">", "</table>");
        let cells: Vec<&str> = body.split("<td").skip(1).collect();
        assert_eq!(cells.len(), branch.report.linears.len());
        for (cell, linear) in cells.iter().zip(&branch.report.linears) {
            assert_eq!(
                between(cell, "\">", "</td>").parse::<f64>().unwrap(),
                format!("{:.1e}", linear.relative_error)
                    .parse::<f64>()
                    .unwrap()
            );
            let title = between(cell, "title=\"", "\"");
            let shown = between(title, "weight error ", ",");
            assert_eq!(shown, format!("{:.3e}", linear.relative_error));
            assert!(title.starts_with(&linear.name), "{title}");
        }
    }
}

#[test]
fn the_table_holds_the_reports_own_numbers() {
    let matrix = matrix_with(|_| ());
    let page = html(&matrix).unwrap();
    let body = between(&page, "<tbody>", "</tbody>");
    let shown = body.split("<tr>").skip(1);
    for (row, branch) in shown.zip(&matrix.branches) {
        let cells: Vec<&str> = row.split("data-v=\"").skip(1).collect();
        let value = |i: usize| cells[i].split('"').next().unwrap();
        let number = |i: usize| value(i).parse::<f64>().unwrap();
        let summary = branch.report.summary(Measure::Weights);
        assert_eq!(value(0), branch.report.branch);
        assert_eq!(Some(number(3)), branch.bits_per_weight());
        assert_eq!(number(6), branch.report.bytes as f64);
        assert_eq!(number(7), summary.mean_error);
        assert_eq!(number(8), summary.worst_error);
        assert_eq!(number(9), summary.mean_ratio);
        match branch.measured().first() {
            Some(measured) => assert_eq!(number(10), measured.perplexity),
            None => assert_eq!(value(10), ""),
        }
        assert_eq!(number(15), branch.report.seconds);
    }
    let table = csv(&rows(&matrix));
    for (line, branch) in table.lines().skip(1).zip(&matrix.branches) {
        let fields: Vec<&str> = line.split(',').collect();
        assert_eq!(
            fields.len(),
            table.lines().next().unwrap().split(',').count()
        );
        assert_eq!(fields[0], branch.report.branch);
        let mut names = table.lines().next().unwrap().split(',');
        let mean_error = names.position(|name| name == "mean_error");
        let value = fields[mean_error.unwrap()];
        let summary = branch.report.summary(Measure::Weights);
        assert_eq!(value.parse(), Ok(summary.mean_error));
    }
}

/// Makes a report like those of current runs: output errors against the dense model, and weights
/// far from the original on purpose.
fn compared(report: &mut gptq_plan::BranchReport) {
    report.compared = Some(Share {
        windows: 2,
        tokens: 512,
    });
    for (i, linear) in report.linears.iter_mut().enumerate() {
        linear.relative_error = 8.4e-1;
        linear.ratio = linear.relative_error / linear.rtn_error;
        linear.output_error = Some(1.5e-3 * (i + 1) as f64);
        linear.rtn_output_error = Some(6e-3 * (i + 1) as f64);
        linear.solver_objective = Some(7.5e-4);
    }
    report.method = Some(gptq_plan::Preset::Tuned.method(gptq_format::Bits::Four));
    report.blocks = (0..3)
        .map(|layer| BlockReport {
            layer,
            tuning: Some(Tuning {
                loss: match layer {
                    2 => TuningLoss::Predictions,
                    _ => TuningLoss::Output,
                },
                before: 2e-2,
                after: 1.5e-2,
                curve: vec![2e-2, 1.8e-2, 1.6e-2],
            }),
            output_error: 1e-2 * (layer + 1) as f64,
            expert_tokens: Vec::new(),
        })
        .collect();
}

#[test]
fn a_page_goes_by_the_dense_models_output_where_every_report_has_it() {
    let page = html(&matrix_with(compared)).unwrap();
    let heading = between(&page, "<thead>", "</thead>");
    assert!(heading.contains(">Output error<") && heading.contains(">Last block<"));
    assert!(!heading.contains(">Weight error<"), "{heading}");
    let main = section(&page, 0);
    assert!(main.contains("<caption>Output error, layer by linear</caption>"));
    assert!(main.contains(">1.5e-3</td>") && !main.contains(">8.4e-1</td>"));
    assert!(main.contains("output error 1.500e-3, round-to-nearest 6.000e-3 (ratio 0.250)"));
    assert!(main.contains("solver&#x27;s objective 7.500e-4"), "{main}");
    assert!(main.contains("<title>block 2: 3.000e-2</title>"));
    assert!(main.contains("first 512 tokens of 2 calibration windows"));
    assert!(
        main.contains("Tuning of 3 blocks in 60 steps each"),
        "{main}"
    );
    let fell = "fell from 2.000e-2 to 1.500e-2 of what the dense block adds";
    assert!(main.contains(fell), "{main}");
    assert!(main.contains("fell from 2.000e-2 to 1.500e-2 nats a token"));
    assert!(main.contains("<title>block 1, step 20: 0.900</title>"));
    // Weights that were changed on purpose are not flagged.
    assert!(!main.contains("<strong>0.250</strong>") && main.contains("<td>0.250</td>"));

    // With one older report, the table has only the columns that all reports have.
    let mixed = matrix_with(|report| {
        if report.branch == "main" {
            compared(report);
        }
    });
    let page = html(&mixed).unwrap();
    let heading = between(&page, "<thead>", "</thead>");
    assert!(heading.contains(">Weight error<") && !heading.contains(">Output error<"));
    assert!(heading.contains(">Last block<"));
    let rows = rows(&mixed);
    let table = csv(&rows);
    let names: Vec<&str> = table.lines().next().unwrap().split(',').collect();
    let at = names.iter().position(|&name| name == "mean_output_error");
    let cells: Vec<&str> = (table.lines().skip(1))
        .map(|line| line.split(',').nth(at.unwrap()).unwrap())
        .collect();
    assert!(cells[0].parse::<f64>().unwrap() > 0.0, "main is first");
    assert!(cells[1..].iter().all(|cell| cell.is_empty()), "{cells:?}");
}

#[test]
fn a_receipt_counts_before_the_runs_own_measurement() {
    let matrix = matrix_with(|_| ());
    let page = html(&matrix).unwrap();
    let row = between(&page, "data-v=\"main\"", "</tr>");
    assert!(
        row.contains(">21.500<") && row.contains(">+6.17 %<"),
        "{row}"
    );
    assert!(row.contains("passed") && row.contains(">91.27 %<"), "{row}");
    assert!(section(&page, 0).contains("block output on fresh text"));
}

#[test]
fn perplexities_on_different_windows_never_share_a_column() {
    let matrix = matrix_with(|report| {
        let Some(measured) = &mut report.perplexity else {
            return;
        };
        match report.branch.as_str() {
            "main" => (measured.window, measured.value) = (512, 22.75),
            // The same name and window, and another text.
            "gptq-4bit-32g-actorder_True" => measured.text_sha256 = Some("b".repeat(64)),
            _ => measured.text_sha256 = Some("a".repeat(64)),
        }
    });
    let page = html(&matrix).unwrap();
    let heading = between(&page, "<thead>", "</thead>");
    for name in [
        "Perplexity, eval_wikidoc_40.json, windows of 1024<",
        "Perplexity, eval_wikidoc_40.json (SHA-256 aaaaaaaa), windows of 1024<",
        "Perplexity, eval_wikidoc_40.json (SHA-256 bbbbbbbb), windows of 1024<",
        "Perplexity, eval_wikidoc_40.json, windows of 512<",
    ] {
        assert!(heading.contains(name), "{name}: {heading}");
    }
    let rows = rows(&matrix);
    let of = |name: &str| {
        rows.iter()
            .find(|row| row.branch.starts_with(name))
            .unwrap()
    };
    let (main, other) = (of("main"), of("gptq-4bit-32g"));
    assert_eq!((main.perplexity, main.window), (Some(21.5), Some(1024)));
    assert_eq!(main.on_other_windows[0].perplexity, 22.75);
    assert_eq!(other.perplexity, None);
    assert_eq!(other.on_other_windows.len(), 1);
    let table = csv(&rows);
    assert!(
        table.contains("\"22.75 (eval_wikidoc_40.json, windows of 512)\""),
        "{table}"
    );
}

#[test]
fn a_block_without_a_relative_error_is_left_out_of_the_plot() {
    let target = crate::fixture::directory(|_| ());
    let receipt = target.path().join("main/verify.json");
    let text = std::fs::read_to_string(&receipt).unwrap();
    for without in [
        "\"relative_error\": null",
        "\"reason\": \"it adds nothing\"",
    ] {
        std::fs::write(
            &receipt,
            text.replace("\"relative_error\": 0.0048", without),
        )
        .unwrap();
        let matrix = gptq_report::Matrix::read(target.path()).unwrap();
        assert_eq!(
            matrix.branches[0].receipt.as_ref().unwrap().blocks[1].relative_error,
            None
        );
        let page = html(&matrix).unwrap();
        let main = section(&page, 0);
        assert!(
            main.contains("layer 0: 5.100e-3") && !main.contains("layer 1: 4.8"),
            "{main}"
        );
    }
}

#[test]
fn unusual_damping_and_dead_columns_are_named() {
    let page = html(&matrix_with(|_| ())).unwrap();
    let main = section(&page, 0);
    assert!(main.contains("out of the ordinary in 1 linear<"), "{main}");
    assert!(main.contains("<strong>0.4</strong>") && main.contains("<strong>3</strong>"));
    assert!(section(&page, 1).contains("Damping was 0.1 everywhere"));
}

#[test]
fn a_linear_that_is_worse_than_round_to_nearest_is_named() {
    let page = html(&matrix_with(|report| {
        let linear = &mut report.linears[1];
        linear.relative_error = 1.25 * linear.rtn_error;
        linear.ratio = 1.25;
    }))
    .unwrap();
    for branch in [0, 1] {
        let section = section(&page, branch);
        assert!(section.contains("<strong>1.250</strong>"), "{section}");
        assert!(!section.contains("Damping was 0.1 everywhere"));
    }
}

#[test]
fn what_each_option_gained_is_shown_where_it_was_used() {
    let page = html(&matrix_with(|report| {
        if report.branch == "main" {
            let count = report.linears.len() as f64;
            for (i, linear) in report.linears.iter_mut().enumerate() {
                linear.gains.scale_search = Some(1e-3 * (i + 1) as f64 / count);
            }
            report.linears[0].gains.refine = Some(2.5e-4);
        }
    }))
    .unwrap();
    let table = between(section(&page, 0), "What each option gained", "</table>");
    assert!(
        table.contains(">scale search<") && table.contains(">refine<"),
        "{table}"
    );
    // Only one linear layer used it, so the mean over its kind is its own value.
    assert_eq!(table.matches(">2.500e-4<").count(), 1, "{table}");
    let heat = between(section(&page, 0), "<table class=\"heat\">", "</table>");
    assert_eq!(heat.matches("refine gained 2.500e-4").count(), 1);
    assert_eq!(heat.matches("scale search gained 1.000e-3").count(), 1);
    assert!(!section(&page, 1).contains("What each option gained"));
}

#[test]
fn nothing_from_a_file_is_read_as_markup() {
    let bad = "\"><script>alert(1)</script>";
    let page = html(&matrix_with(|report| {
        report.branch += bad;
        report.model += bad;
        report.recipe += bad;
        report.command = Some(bad.to_owned());
        report.calibration.source = bad.to_owned();
        report.linears[0].name += bad;
        if let Some(measured) = &mut report.perplexity {
            measured.text = bad.to_owned();
        }
    }))
    .unwrap();
    assert!(!page.contains("<script>alert"));
    assert_eq!(page.matches("<script>").count(), 1);
}

#[test]
fn six_branches_of_a_7b_model_stay_under_a_megabyte_and_fetch_nothing() {
    let page = html(&matrix_with(|report| {
        compared(report);
        let block: Vec<_> = report.linears.drain(..).take(7).collect();
        for layer in 0..32 {
            report.linears.extend(block.iter().map(|linear| {
                let mut linear = linear.clone();
                linear.layer = layer;
                linear.name = linear.name.replace(".0.", &format!(".{layer}."));
                // Worst case: every row of every table is shown.
                linear.dead_columns = 1;
                linear
            }));
        }
    }))
    .unwrap();
    assert!(page.len() < 1_000_000, "{} bytes", page.len());
    assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("src="));
}

#[test]
fn a_page_on_128_experts_in_each_of_94_blocks_has_less_than_two_megabytes() {
    let matrix = matrix_with(|report| {
        if report.branch != "main" {
            return;
        }
        let linear = report.linears[0].clone();
        report.linears.clear();
        report.blocks.clear();
        for layer in 0..94 {
            let attention = ["q", "k", "v", "o"].map(|it| format!("self_attn.{it}_proj"));
            let experts = (0..128).flat_map(|expert| {
                let names = ["gate", "up", "down"];
                names.map(|it| format!("mlp.experts.{expert}.{it}_proj"))
            });
            for (at, name) in attention.into_iter().chain(experts).enumerate() {
                let error = 1e-4 * (1 + (at * 7919 + layer * 104_729) % 1000) as f64;
                report.linears.push(gptq_plan::LinearReport {
                    layer,
                    name: format!("model.layers.{layer}.{name}"),
                    relative_error: error,
                    output_error: Some(1.1 * error),
                    ..linear.clone()
                });
            }
            report.blocks.push(BlockReport {
                layer,
                output_error: 0.01,
                tuning: None,
                expert_tokens: (0..128).map(|it| it * 97 % 4000).collect(),
            });
        }
    });
    let page = html(&matrix).unwrap();
    assert!(page.contains("128 experts") && page.contains("The 500 with the largest ratios"));
    assert!(page.len() < 2_000_000, "{} bytes", page.len());
}
