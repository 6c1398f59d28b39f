//! `ACCURACY.md`, made from the results alone.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::models::{MODELS, Model};
use super::results::{ModelResults, Results, Text};
use super::rows::{OPTIONS, ORDERS, REFINED, SIZES};
use super::table::{Table, both, kl_divergence, measured, perplexity, seconds};

const HEAD: &str = "\
# Accuracy, option by option

Options of a recipe, alone and together, on two models. Calibrated on the first consecutive windows of 1024 tokens of WikiDoc's first
1000 rows, symmetric, damping 0.1, columns in the default order (static act order). Each text is followed by the tokenizer's end token,
and all are joined.

- **searched** (`scale_search`): each group's scale is the best of 32 ranges, mirrored towards the largest weight if positive, weighted
  by the cost of an error in a column for the sweep (`src/grid.rs`).
- **mismatch correction** (`mismatch_correction`): the weights to round are those that come closest to the dense model's output on the
  branch's own inputs, `W + (W C + (R_d - R)ᵀX) (XᵀX + λI)⁻¹` with `C = (X_d - X)ᵀX`, where `X_d` and `R_d` are the inputs and the
  residual stream of the dense model, `X` and `R` those of the branch. `W C` makes up for inputs that differ, and `(R_d - R)ᵀX`,
  in linear layers whose output is added to the residual stream, for what the blocks before have lost in it. Measured on up to 131072
  tokens (`src/target.rs`).
- **refined** (`refine`): passes of coordinate descent over the codes after the sweep (`src/refine.rs`).
- **tuned** (`tune`): once a block is solved, its codes and scales follow the gradient of the squared distance to the dense block's
  output, in the last block of the divergence of the predictions, for so many steps (`gptq-run/src/tuning.rs`).

`preset = \"autogptq\"` is plain GPTQ, `\"standard\"` is searched, and `\"best\"` (the default) is searched, with mismatch correction,
and refined once at 2 and 3 bits; `\"tuned\"` is `best`, refined at every width, then tuned in 60 steps a block.

Perplexity, and the mean KL divergence of the next token's probabilities from the dense model's, are measured on full windows of 1024
tokens, the first token of a window not scored, by `gptq verify --against`. Options are chosen by the first text, and by the second
nothing is. Equivalent runs on medi-24m are within 0.1 % of each other in perplexity, within 1 % at 2 bits. `-`: the output is not
finite.
";

/// Formats the results of every model that has any.
pub(super) fn document(results: &Results) -> String {
    let mut text = HEAD.to_owned();
    text += &provenance(results);
    for model in MODELS {
        if let Some(found) = results.models.get(model.name) {
            text += &section(model, found, &results.second_name);
        }
    }
    text
}

/// Says on what machines, when and how the rows were measured.
fn provenance(results: &Results) -> String {
    let rows = results.models.values().flat_map(|it| it.rows.values());
    let days: BTreeSet<String> = rows
        .map(|it| format!("{}, {}", it.machine, it.date))
        .collect();
    let days: Vec<String> = days.into_iter().collect();
    let texts = results.models.values().next().map(|it| &it.texts);
    let [first, second] = texts.map_or(["TEXT", "TEXT"], |[a, b]| [&a.file, &b.file]);
    format!(
        "\n{}. Measured row by row into `ACCURACY.json`, which this document is made from, by\n\n```sh\n\
         cargo xtask ablate --medi DIR --smollm2 DIR --calibration FILE --text {first} \\\n    \
         --second {second} --second-name \"{}\" --machine NAME\n```\n",
        days.join("; "),
        results.second_name
    )
}

fn section(model: &Model, found: &ModelResults, second_name: &str) -> String {
    let [first, second] = &found.texts;
    let on_first = format!(
        "400 WikiDoc texts ({}, fp16 {:.3})",
        tokens(first),
        first.dense
    );
    let on_second = format!(
        "{second_name} ({}, fp16 {:.3})",
        tokens(second),
        second.dense
    );
    let mut text = format!(
        "\n## {}\n\n{}. {} windows.\n",
        model.name, model.about, model.windows
    );
    let options = Table {
        settings: model.settings,
        rows: measured(&OPTIONS, found),
    };
    let mut lines = options.lines(|it| perplexity(it.texts[0]), Some(seconds));
    for peer in model.peers.rows {
        let cells = peer.figures.join(" | ");
        let _ = writeln!(lines, "| *{}* | {cells} | {} |", peer.name, peer.seconds);
    }
    heading(
        &mut text,
        &format!("Perplexity on {on_first}, by which options are chosen"),
    );
    text += &lines;
    let _ = writeln!(text, "\n{}", peers_note(model, second));
    heading(
        &mut text,
        &format!("KL divergence on {on_first}, nats per token"),
    );
    text += &options.lines(|it| kl_divergence(it.texts[0]), None);
    heading(
        &mut text,
        &format!("Perplexity on {on_second}, by which nothing is chosen"),
    );
    text += &options.lines(|it| perplexity(it.texts[1]), None);
    heading(
        &mut text,
        &format!("KL divergence on {on_second}, nats per token"),
    );
    text += &options.lines(|it| kl_divergence(it.texts[1]), None);
    heading(
        &mut text,
        "Mean relative error of the linear layers' outputs, against the original weights",
    );
    text += &options.lines(|it| format!("{:.3e}", it.mean_relative_error), None);
    text + &orders(model, found) + &sizes(model, found, [&on_first, &on_second])
}

/// Compares orders of columns with `best`.
fn orders(model: &Model, found: &ModelResults) -> String {
    let mut rows = measured(&ORDERS, found);
    if rows.is_empty() {
        return String::new();
    }
    if let Some(best) = found.rows.get(REFINED) {
        rows.insert(1, ("static act order (the default)", best));
    }
    let table = Table {
        settings: model.settings,
        rows,
    };
    let mut text = String::new();
    heading(
        &mut text,
        "Order of columns, `best` refined at every width: perplexity on the WikiDoc texts (KL divergence)",
    );
    text + &table.lines(|it| both(it.texts[0]), None)
}

/// Compares size budgets with one setting for all linear layers.
fn sizes(model: &Model, found: &ModelResults, texts: [&str; 2]) -> String {
    let table = Table {
        settings: model.sizes,
        rows: measured(&SIZES, found),
    };
    let mut text = String::new();
    if table.rows.is_empty() {
        return text;
    }
    for (at, on) in texts.into_iter().enumerate() {
        heading(
            &mut text,
            &format!("The same size with and without a budget: perplexity on {on} (KL divergence)"),
        );
        if at == 0 {
            text += "A size budget (`budget_bits`) gives each linear layer its own bits and group size; here it equals the \
                     bits per weight of the setting above the column, scales, zero points and `g_idx` included.\n\n";
        }
        text += &table.lines(|it| both(it.texts[at]), None);
    }
    text
}

fn heading(text: &mut String, title: &str) {
    let _ = write!(text, "\n### {title}\n\n");
}

/// Says what the peers' figures and the seconds are.
fn peers_note(model: &Model, second: &Text) -> String {
    let mut text = format!(
        "Other tools (in italics) were measured with their releases of 2026 {}. Seconds of gptq are those spent on a branch alone, the least and the most of a run with all of them; \
         the first branch bears the start.",
        model.peers.source
    );
    if let Some(dense) = model.peers.bracketed {
        let same = (second.dense / dense - 1.0).abs() < 1e-3;
        let which = match same {
            true => "the second text".to_owned(),
            false => format!(
                "WikiDoc text kept apart (fp16 {dense:.3}), which is not the second text here"
            ),
        };
        let _ = write!(text, " In brackets: their perplexity on {which}.");
    }
    text
}

fn tokens(text: &Text) -> String {
    format!("{} tokens scored", text.tokens)
}

#[cfg(test)]
mod tests {
    use super::super::models::{MEDI, SMOLLM2};
    use super::super::results::tests::{row, text};
    use super::*;

    fn results(model: &Model, rows: &[(&str, &str)]) -> String {
        let mut results = Results {
            second_name: "news".to_owned(),
            ..Results::default()
        };
        for (key, setting) in rows {
            let texts = [text("a", 12.485), text("b", 28.6)];
            let row = row(setting, Some(13.251));
            results.add(model, key, row, texts).unwrap();
        }
        document(&results)
    }

    #[test]
    fn rows_and_models_that_were_not_measured_are_left_out() {
        let text = results(&SMOLLM2, &[("best", "4-bit g64")]);
        assert!(!text.contains("## medi-24m") && !text.contains("| `standard`"));
        assert!(!text.contains("Order of columns") && !text.contains("a budget:"));
        assert!(
            text.contains("| `best` | 13.251 |  |  |  | 0.5 |"),
            "{text}"
        );
        assert!(text.contains("| `best` | 0.01325 |  |  |  |"), "{text}");
    }

    #[test]
    fn peers_stand_beside_the_first_text_alone() {
        let text = results(&SMOLLM2, &[("best", "4-bit g64")]);
        assert_eq!(text.matches("| *AutoRound").count(), 1);
        let at = |what: &str| text.find(what).expect(what);
        assert!(at("### Perplexity on 400") < at("| *AutoRound"));
        assert!(at("| *AutoRound") < at("### KL divergence"));
        assert!(text.contains("not the second text here"), "{text}");
    }

    #[test]
    fn the_default_order_stands_between_the_two_others() {
        let rows =
            ["best-act-order", "best-refined", "best-stored-order"].map(|key| (key, "4-bit g32"));
        let text = results(&MEDI, &rows);
        let table = text.split("### Order of columns").nth(1).unwrap();
        let at = |what: &str| table.find(what).expect(what);
        assert!(at("desc_act = true") < at("static act order"));
        assert!(at("static act order") < at("desc_act = false"));
    }

    #[test]
    fn size_budgets_have_their_own_columns() {
        let text = results(&MEDI, &[("best-budget", "2-bit g32")]);
        assert!(
            text.contains("| `best`, a budget |  | 13.251 (0.01325) |"),
            "{text}"
        );
    }
}
