//! The models that options are measured on, and the settings that each is measured at.

use super::peers::{self, Peers};

/// A model, its calibration and the columns of its tables.
pub(super) struct Model {
    /// Name in the tables, and key in the results.
    pub(super) name: &'static str,
    /// Description for the document.
    pub(super) about: &'static str,
    /// Calibration windows of [`WINDOW`] tokens.
    pub(super) windows: usize,
    /// Columns of the options' tables.
    pub(super) settings: &'static [Setting],
    /// Columns of the tables of size budgets; empty if none are measured.
    pub(super) sizes: &'static [Setting],
    /// Figures of other tools on this model.
    pub(super) peers: &'static Peers,
}

/// Bits and group size of a column.
pub(super) struct Setting {
    /// Heading, and key in the results.
    pub(super) name: &'static str,
    pub(super) bits: u32,
    pub(super) group_size: u32,
    /// Bits per weight as stored with this setting, of the settings that a size budget is compared with.
    pub(super) stored: Option<f64>,
}

/// Tokens of a calibration window.
pub(super) const WINDOW: usize = 1024;

/// A model of 24 million parameters, whose tokenizer puts `<s>` in front of each text.
pub(super) const MEDI: Model = Model {
    name: "medi-24m",
    about: "23.5 million parameters, Llama architecture, trained on WikiDoc; groups of up to 128 fit",
    windows: 128,
    settings: &[
        setting("4-bit g128", 4, 128),
        setting("4-bit g32", 4, 32),
        setting("3-bit g128", 3, 128),
        setting("2-bit g64", 2, 64),
        setting("8-bit g128", 8, 128),
    ],
    sizes: &[
        size("2-bit g64", 2, 64, 2.342),
        size("2-bit g32", 2, 32, 2.638),
        size("3-bit g64", 3, 64, 3.342),
        size("3-bit g32", 3, 32, 3.638),
        size("4-bit g128", 4, 128, 4.201),
    ],
    peers: &peers::MEDI,
};

/// A public model, whose tokenizer puts nothing in front of a text. The first 1000 rows fill 127 windows.
pub(super) const SMOLLM2: Model = Model {
    name: "SmolLM2-135M",
    about: "SmolLM2-135M-Instruct, a public model of 135 million parameters, Llama architecture; fp16 weights from its \
            Q4_1 GGUF file; groups of 64 and 32 fit",
    windows: 127,
    settings: &[
        setting("4-bit g64", 4, 64),
        setting("4-bit g32", 4, 32),
        setting("3-bit g64", 3, 64),
        setting("2-bit g64", 2, 64),
    ],
    sizes: &[],
    peers: &peers::SMOLLM2,
};

/// All models, in the document's order.
pub(super) const MODELS: [&Model; 2] = [&MEDI, &SMOLLM2];

const fn setting(name: &'static str, bits: u32, group_size: u32) -> Setting {
    Setting {
        name,
        bits,
        group_size,
        stored: None,
    }
}

const fn size(name: &'static str, bits: u32, group_size: u32, stored: f64) -> Setting {
    Setting {
        name,
        bits,
        group_size,
        stored: Some(stored),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_peer_has_a_figure_or_a_blank_for_each_setting() {
        for model in MODELS {
            for peer in model.peers.rows {
                assert_eq!(peer.figures.len(), model.settings.len(), "{}", peer.name);
            }
        }
    }

    #[test]
    fn a_size_budget_has_settings_of_known_size() {
        for model in MODELS {
            assert!(model.sizes.iter().all(|size| size.stored.is_some()));
        }
    }
}
