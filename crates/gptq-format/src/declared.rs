//! Settings of formats other than AutoGPTQ's, as their configs declare them.

use crate::dynamic_rules::{Dynamic, DynamicRules, MAX_PATTERN};
use crate::{Bits, GroupSize};

/// Declarations of a config about a branch.
#[derive(Debug)]
pub(crate) struct Declared {
    /// Width and columns per group of most linear layers.
    pub(crate) bits: Bits,
    pub(crate) group_size: GroupSize,
    /// True for symmetric codes.
    pub(crate) sym: bool,
    /// Settings of the others, in the order in which they are tried.
    pub(crate) dynamic: Option<DynamicRules>,
}

impl Declared {
    /// Collects settings; `rules` are those of single linear layers.
    pub(crate) fn new(
        (bits, group_size): (Bits, GroupSize),
        sym: bool,
        rules: Vec<(String, Dynamic)>,
    ) -> Self {
        Declared {
            bits,
            group_size,
            sym,
            dynamic: (!rules.is_empty()).then(|| rules.into_iter().collect()),
        }
    }
}

/// Expressions that match these names and nothing else, several names in each.
pub(crate) fn alternatives<'a>(
    names: impl Iterator<Item = &'a String>,
) -> impl Iterator<Item = String> {
    let mut all: Vec<String> = Vec::new();
    for name in names {
        let name = fancy_regex::escape(name);
        match all.last_mut() {
            Some(last) if last.len() + name.len() + "-:(?:|)$".len() < MAX_PATTERN => {
                last.push('|');
                last.push_str(&name);
            }
            _ => all.push(name.into_owned()),
        }
    }
    all.into_iter().map(|names| format!("(?:{names})$"))
}
