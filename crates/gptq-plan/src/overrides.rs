//! Changes of a recipe by the command line.

use std::collections::BTreeMap;
use std::path::PathBuf;

use gptq_calibration::OnError;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::ColumnOrder;
use crate::recipe_file::{EvaluationTable, RecipeFile, default_window};

/// Command-line values that replace those of the recipe.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RecipeOverrides {
    /// Only these branches; all if empty.
    pub branches: Vec<String>,
    /// Model source, in place of the recipe's source and revision.
    #[serde(default)]
    pub model: Option<String>,
    /// Calibration source: other data, so the recipe's `rows`, `files` and `revision` do not apply.
    pub calibration: Option<String>,
    /// Conversion of its rows to documents, in place of the recipe's.
    pub rendering: Option<RenderingOverride>,
    /// Range of rows.
    pub rows: Option<String>,
    /// Action for a row that its chat template refuses.
    #[serde(default)]
    pub on_error: Option<OnError>,
    /// Date seen by chat templates.
    #[serde(default)]
    pub date: Option<String>,
    /// Output directory.
    pub output: Option<PathBuf>,
    /// Number of windows.
    pub samples: Option<usize>,
    /// Tokens per window.
    pub seq_len: Option<usize>,
    /// Seed of the draw.
    pub seed: Option<u64>,
    /// Text for measuring the perplexity of each finished branch.
    pub evaluation: Option<PathBuf>,
    /// Solving order by branch if the recipe leaves it to the default: that of an existing branch,
    /// whose default may have been another.
    #[serde(default)]
    pub orders: BTreeMap<String, ColumnOrder>,
}

/// Conversion of a row to a document; the values are the recipe's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenderingOverride {
    /// `template = "..."`.
    Template(String),
    /// `column = "..."`.
    Column(String),
    /// `messages = "..."`.
    Messages(String),
    /// `tokens = "..."`.
    Tokens(String),
}

impl RecipeOverrides {
    /// Replaces the values in `file`.
    pub(crate) fn replace(self, file: &mut RecipeFile) {
        let overrides = self;
        if !overrides.branches.is_empty() {
            file.branch
                .retain(|b| overrides.branches.contains(b.get_ref().name.get_ref()));
        }
        let defaults = &file.defaults;
        if defaults.desc_act.is_none() && defaults.static_groups.is_none() {
            for branch in &mut file.branch {
                let branch = branch.get_mut();
                if let (None, None) = (branch.desc_act, branch.static_groups)
                    && let Some(order) = overrides.orders.get(branch.name.get_ref())
                {
                    branch.desc_act = Some(order.desc_act);
                    branch.static_groups = Some(order.static_groups);
                }
            }
        }
        let set = |value: Option<usize>, slot: &mut Spanned<usize>| {
            if let Some(value) = value {
                *slot.get_mut() = value;
            }
        };
        set(overrides.samples, &mut file.calibration.samples);
        set(overrides.seq_len, &mut file.calibration.seq_len);
        let calibration = &mut file.calibration;
        if let Some(source) = overrides.calibration {
            *calibration.source.get_mut() = source;
            *calibration.rows.get_mut() = "0:".to_owned();
            (calibration.files, calibration.revision) = (None, None);
        }
        if let Some(rows) = overrides.rows {
            *calibration.rows.get_mut() = rows;
        }
        if let Some(on_error) = overrides.on_error {
            calibration.on_error = on_error;
        }
        if let Some(date) = overrides.date {
            calibration.date = Some(Spanned::new(0..0, date));
        }
        if let Some(rendering) = overrides.rendering {
            (calibration.template, calibration.column) = (None, None);
            (calibration.messages, calibration.tokens) = (None, None);
            let (slot, value) = match rendering {
                RenderingOverride::Template(value) => (&mut calibration.template, value),
                RenderingOverride::Column(value) => (&mut calibration.column, value),
                RenderingOverride::Messages(value) => (&mut calibration.messages, value),
                RenderingOverride::Tokens(value) => (&mut calibration.tokens, value),
            };
            *slot = Some(Spanned::new(0..0, value));
        }
        if let Some(seed) = overrides.seed {
            file.calibration.seed = seed;
        }
        if let Some(source) = overrides.model {
            *file.model.source.get_mut() = source;
            file.model.revision = None;
        }
        if let Some(dir) = overrides.output {
            *file.output.dir.get_mut() = dir;
        }
        if let Some(text) = overrides.evaluation {
            let before = file.evaluation.take();
            let window = before.map_or_else(default_window, |e| e.window);
            let text = Spanned::new(0..0, text);
            file.evaluation = Some(EvaluationTable { text, window });
        }
    }
}
