//! What a family says of itself, and what that makes of a config.

use serde_json::{Map, Value};

use super::parts;
use super::sliding_window::SlidingWindow;
use crate::keys::Keys;
use crate::rope_scaling::KINDS;
use crate::shapes::Shapes;
use crate::spec::STEM;
use crate::{BlockSpec, NormKind};

/// A `model_type`.
pub(crate) struct Family {
    pub(crate) model_type: &'static str,
    /// Keys of the config, and what they are where they are left out.
    pub(super) defaults: &'static [(&'static str, usize)],
    pub(super) norm: NormKind,
    /// The key of what its norms add to the mean square, and what that is where it is left out.
    pub(crate) eps: (&'static str, f64),
    /// The key of the activation, and names of the one that there is.
    pub(crate) activation: (&'static str, &'static [&'static str]),
    /// Whether the head is the embedding where the config does not say.
    pub(super) tied: bool,
    pub(crate) rotary: Rotary,
    pub(super) sliding_window: SlidingWindow,
    /// Whether its hidden states do not fit f16.
    pub(crate) wide: bool,
    /// Its tensors' names, of which a checkpoint has one kind throughout; the first is the usual one.
    pub(crate) naming: &'static [Naming],
    /// What names of tensors begin with that are no part of what is run, and that branches keep as they are.
    pub(crate) carried: &'static [&'static str],
    /// The model that is run is that of an object inside the config.
    pub(super) inside: Option<Inside>,
    /// What is done at either end of the blocks. As for `block`.
    pub(crate) ends: fn(&Shapes, &Keys<'_>) -> Result<Ends, String>,
    /// Describes a block by its index. The shapes have been checked. The error is a sentence.
    pub(crate) block: fn(&Shapes, &Keys<'_>, usize) -> Result<BlockSpec, String>,
}

/// How a family rotates queries and keys.
pub(crate) struct Rotary {
    /// Base where no key says it.
    pub(crate) theta: f64,
    /// The share of a head that is rotated where no key says it; `None` where it is all of it, whatever keys say.
    pub(crate) partial: Option<f64>,
    /// Whether neighbouring features are rotated together.
    pub(crate) interleaved: bool,
    /// Blocks with a sliding window have settings of their own: the key of their base in the old spelling, and
    /// the base where no key says it.
    pub(crate) sliding: Option<(&'static str, f64)>,
    /// Values that `rope_type` may have.
    pub(crate) kinds: &'static [&'static str],
    /// Values that mean another one.
    pub(crate) renamed: &'static [(&'static str, &'static str)],
}

impl Rotary {
    pub(super) const PLAIN: Rotary = Rotary {
        theta: 10_000.0,
        partial: None,
        interleaved: false,
        sliding: None,
        kinds: KINDS,
        renamed: &[],
    };
}

/// Names of the tensors outside the blocks, and of the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Naming {
    /// What all but the head begin with.
    pub stem: &'static str,
    /// The output projection.
    pub head: &'static str,
}

impl Naming {
    /// The input embedding.
    pub fn embedding(self) -> String {
        format!("{}embed_tokens.weight", self.stem)
    }

    /// The final norm.
    pub fn norm(self) -> String {
        format!("{}norm.weight", self.stem)
    }
}

/// A config with that of the language model inside.
pub(super) struct Inside {
    /// Key of the object.
    pub(super) key: &'static str,
    /// Its `model_type` where it is left out.
    pub(super) model_type: &'static str,
}

/// What a model does before the first block and after the last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ends {
    /// Factor of the embedding.
    pub embedding: f64,
    /// Factor of the logits.
    pub logits: f64,
    /// Bound `c` of the logits, which become `c tanh(logit / c)`.
    pub softcap: Option<f64>,
}

impl Ends {
    /// Nothing.
    pub const PLAIN: Ends = Ends {
        embedding: 1.0,
        logits: 1.0,
        softcap: None,
    };
}

impl Family {
    /// What families have that say nothing else.
    pub(super) const PLAIN: Family = Family {
        model_type: "",
        defaults: &[],
        norm: NormKind::Rms,
        eps: ("rms_norm_eps", 1e-6),
        activation: ("hidden_act", &["silu", "swish"]),
        tied: false,
        rotary: Rotary::PLAIN,
        sliding_window: SlidingWindow::Never,
        wide: false,
        naming: &[Naming {
            stem: STEM,
            head: "lm_head.weight",
        }],
        carried: &["mtp."],
        inside: None,
        ends: |_, _| Ok(Ends::PLAIN),
        block: parts::block,
    };

    /// The object with the language model's settings.
    pub(crate) fn text_mut<'a>(
        &self,
        config: &'a mut Map<String, Value>,
    ) -> Option<&'a mut Map<String, Value>> {
        match &self.inside {
            None => Some(config),
            Some(Inside { key, .. }) => config.get_mut(*key)?.as_object_mut(),
        }
    }

    /// What a key is where it is left out.
    pub(crate) fn default(&self, key: &str) -> Option<usize> {
        let mut defaults = self.defaults.iter();
        defaults.find(|(name, _)| *name == key).map(|&(_, it)| it)
    }

    /// The norm that all of a model's are.
    pub(crate) fn norm(&self, eps: f64) -> crate::Norm {
        crate::Norm {
            kind: self.norm,
            eps,
        }
    }

    /// Whether the head is the embedding.
    pub(crate) fn tied(&self, config: &Keys<'_>) -> Result<bool, String> {
        Ok(config.found("tie_word_embeddings")?.unwrap_or(self.tied))
    }

    /// How many tokens one sees in each block, where that is not all.
    pub(crate) fn windows(
        &self,
        config: &Keys<'_>,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, String> {
        let default = |key: &str| self.default(key);
        self.sliding_window.windows(&default, config, layers)
    }
}
