//! Properties of a family, and the settings that they give for a config.

use serde_json::{Map, Value};

use super::parts;
use super::sliding_window::SlidingWindow;
use crate::keys::Keys;
use crate::rope_scaling::KINDS;
use crate::shapes::Shapes;
use crate::spec::STEM;
use crate::{BlockSpec, LlamaCpp, NormKind};

/// A `model_type`.
pub(crate) struct Family {
    pub(crate) model_type: &'static str,
    /// Keys of the config, and their values if they are missing.
    pub(super) defaults: &'static [(&'static str, usize)],
    pub(super) norm: NormKind,
    /// Key of the norms' epsilon, which is added to the mean square, and its value if the key is missing.
    pub(crate) eps: (&'static str, f64),
    /// Key of the activation, and names of the one that is supported.
    pub(crate) activation: (&'static str, &'static [&'static str]),
    /// True if the head is the embedding when the config does not say.
    pub(super) tied: bool,
    pub(crate) rotary: Rotary,
    pub(super) sliding_window: SlidingWindow,
    /// True if its hidden states do not fit f16.
    pub(crate) wide: bool,
    /// Its tensors' names, of which a checkpoint has one kind throughout; the first is the usual one.
    pub(crate) naming: &'static [Naming],
    /// Prefixes of the names of tensors that are not run; branches keep these tensors as they are.
    pub(crate) carried: &'static [&'static str],
    /// Key of the number of blocks after those that are run, which a checkpoint may have; branches keep their tensors
    /// as they are.
    pub(super) further: Option<&'static str>,
    /// Keys of the language model's config that must be left out or `null`: Transformers passes over them.
    pub(crate) refused: &'static [&'static str],
    /// Object inside the config that holds the model that is run, if it is not the config itself.
    pub(super) inside: Option<Inside>,
    /// The family in llama.cpp; `None` if it runs there in a way not described here.
    pub(crate) llama_cpp: Option<LlamaCpp>,
    /// Describes the operations before the first block and after the last. The shapes have been checked.
    /// The error is a sentence.
    pub(crate) ends: fn(&Shapes, &Keys<'_>) -> Result<Ends, String>,
    /// Describes a block by its index. The shapes have been checked. The error is a sentence.
    pub(crate) block: fn(&Shapes, &Keys<'_>, usize) -> Result<BlockSpec, String>,
}

/// Rotation of queries and keys in a family.
pub(crate) struct Rotary {
    /// Base where no key says it.
    pub(crate) theta: f64,
    /// The share of a head that is rotated where no key says it; `None` where it is all of it, whatever keys say.
    pub(crate) partial: Option<f64>,
    /// True if neighbouring features are rotated together.
    pub(crate) interleaved: bool,
    /// Blocks with a sliding window have settings of their own: the key of their base in the old spelling, and
    /// the base where no key says it.
    pub(crate) sliding: Option<(&'static str, f64)>,
    /// Values that `rope_type` may have.
    pub(crate) kinds: &'static [&'static str],
    /// Other names of such values: the name, and the value it stands for.
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
    /// Prefix of all names but the head's.
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

/// Object inside a config that is the language model's config.
pub(super) struct Inside {
    /// Key of the object.
    pub(super) key: &'static str,
    /// Its `model_type` where it is left out.
    pub(super) model_type: &'static str,
}

/// Operations of a model before the first block and after the last.
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
    /// No change to the embedding or the logits.
    pub const PLAIN: Ends = Ends {
        embedding: 1.0,
        logits: 1.0,
        softcap: None,
    };
}

impl Family {
    /// Values of the families that do not set them otherwise.
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
        further: None,
        refused: &[],
        inside: None,
        llama_cpp: None,
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

    /// Returns the value of a key that is missing from a config.
    pub(crate) fn default(&self, key: &str) -> Option<usize> {
        let mut defaults = self.defaults.iter();
        defaults.find(|(name, _)| *name == key).map(|&(_, it)| it)
    }

    /// Returns the number of blocks that a checkpoint may have after those that are run.
    pub(crate) fn further(&self, config: &Keys<'_>) -> Result<usize, String> {
        let found = self.further.map(|key| config.nullable(key)).transpose()?;
        Ok(found.flatten().flatten().unwrap_or_default())
    }

    /// Returns the norm that all norms of a model are.
    pub(crate) fn norm(&self, eps: f64) -> crate::Norm {
        crate::Norm {
            kind: self.norm,
            eps,
        }
    }

    /// Returns true if the head is the embedding.
    pub(crate) fn tied(&self, config: &Keys<'_>) -> Result<bool, String> {
        Ok(config.found("tie_word_embeddings")?.unwrap_or(self.tied))
    }

    /// Returns the sliding window of each block in tokens; `None` where a token sees all before it.
    pub(crate) fn windows(
        &self,
        config: &Keys<'_>,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, String> {
        let default = |key: &str| self.default(key);
        self.sliding_window.windows(&default, config, layers)
    }
}
