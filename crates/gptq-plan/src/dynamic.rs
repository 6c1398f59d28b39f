//! Settings of single linear layers, as files declare them.

use std::collections::{BTreeMap, BTreeSet};

use gptq_format::{CheckpointFormat, Dynamic, DynamicRules};
use gptq_spec::ModelConfig;

use crate::Choice;

/// Maximum number of blocks in one expression: clients limit its length.
const LAYERS: usize = 128;

/// Returns the names without those that lie within another, as experts do: an expression holds for these too.
fn shortest<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<&'a str> {
    let all: BTreeSet<&str> = names.clone().collect();
    let within = |name: &&str| {
        let ends = name.match_indices('.').map(|(at, _)| &name[..at]);
        ends.clone().any(|path| all.contains(path))
    };
    names.filter(|name| !within(name)).collect()
}

/// Returns the settings of linear layers that differ from `own`, and those of matrices that are never quantized, as
/// regular expressions on names; `choice` gives those
/// of a module, or `None` where it is left in full precision. No two match the same name, as clients try them in an
/// order that JSON does not preserve. Each names blocks and linear layers, including the names of fused ones, and holds
/// for all names with that beginning: no name begins with another.
///
/// Formats other than AutoGPTQ's have settings for every linear layer of a model, and name those of parts that are not
/// run, such as a vision tower.
pub fn dynamic(
    config: &ModelConfig,
    format: CheckpointFormat,
    own: Choice,
    choice: impl Fn(&str) -> Option<Choice>,
) -> Option<DynamicRules> {
    let own = Some(own);
    let mut same: BTreeMap<(Vec<&str>, Option<Choice>), Vec<usize>> = BTreeMap::new();
    for (layer, block) in config.blocks().iter().enumerate() {
        for taps in block.settings_groups() {
            let mut settings: BTreeMap<Option<Choice>, Vec<usize>> = BTreeMap::new();
            for linear in taps.flat_map(|tap| block.linears_of(tap)) {
                let module = block.linears()[linear].module(layer);
                settings.entry(choice(&module)).or_default().push(linear);
            }
            for (choice, linears) in settings.into_iter().filter(|(it, _)| *it != own) {
                let names = linears.iter().map(|&it| &*block.linears()[it].name);
                let names = names.chain(block.fused(&linears));
                same.entry((shortest(names), choice))
                    .or_default()
                    .push(layer);
            }
        }
        // A router, and the gate of a shared expert.
        let names: Vec<&str> = block.matrices().iter().map(|it| &*it.name).collect();
        if !names.is_empty() {
            same.entry((names, None)).or_default().push(layer);
        }
    }
    // Programs have the blocks under one of these names in memory, whatever files say.
    let stems: Vec<String> = config
        .stems()
        .map(|stem| stem.replace('.', "\\."))
        .collect();
    let stem = match &*stems {
        [stem] => stem.clone(),
        _ => format!("({})", stems.join("|")),
    };
    let mut dynamic = BTreeMap::new();
    for ((names, choice), layers) in same {
        let names: Vec<String> = names.iter().map(|name| name.replace('.', "\\.")).collect();
        let names = names.join("|");
        for some in layers.chunks(LAYERS) {
            let numbers: Vec<String> = some.iter().map(usize::to_string).collect();
            let layers = match layers.len() == config.layers {
                true => "\\d+".to_owned(),
                false => format!("({})", numbers.join("|")),
            };
            let sign = if choice.is_some() { '+' } else { '-' };
            let expression = format!("{sign}:{stem}layers\\.{layers}\\.({names})");
            let settings = Dynamic {
                bits: choice.map(|it| it.bits),
                group_size: choice.map(|it| it.group_size),
            };
            dynamic.insert(expression, settings);
        }
    }
    if !format.is_autogptq() {
        for part in config.carried_parts().into_keys() {
            let part = part.trim_end_matches('.').replace('.', "\\.");
            dynamic.insert(format!("-:.*{part}\\."), Dynamic::default());
        }
    }
    (!dynamic.is_empty()).then(|| dynamic.into_iter().collect())
}
