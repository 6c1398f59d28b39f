//! The order in which a branch's columns are solved.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Solving order of a branch's columns, and whether its groups follow the original column order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColumnOrder {
    /// Act order: columns by descending energy of their inputs.
    pub desc_act: bool,
    /// Group parameters from the original weights, of contiguous columns.
    pub static_groups: bool,
}

impl ColumnOrder {
    /// Default if a recipe sets neither key: act order for its accuracy, and groups that every
    /// client loads.
    pub const DEFAULT: ColumnOrder = ColumnOrder {
        desc_act: true,
        static_groups: true,
    };

    /// Resolves the two keys of a recipe. If only one is set, the other defaults as in AutoGPTQ:
    /// static groups off, act order on.
    pub(crate) fn of(desc_act: Option<bool>, static_groups: Option<bool>) -> Self {
        match (desc_act, static_groups) {
            (None, None) => ColumnOrder::DEFAULT,
            _ => ColumnOrder {
                desc_act: desc_act.unwrap_or(true),
                static_groups: static_groups.unwrap_or(false),
            },
        }
    }
}

impl fmt::Display for ColumnOrder {
    /// Formats the order within a one-line summary of settings.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.desc_act, self.static_groups) {
            (true, false) => "act order",
            (true, true) => "act order with static groups",
            (false, true) => "no act order, static groups",
            (false, false) => "no act order",
        })
    }
}

impl ColumnOrder {
    /// Formats the order for a column headed "act order".
    pub fn cell(self) -> &'static str {
        match (self.desc_act, self.static_groups) {
            (true, false) => "yes",
            (true, true) => "static",
            (false, _) => "no",
        }
    }
}
