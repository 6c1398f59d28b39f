//! A family in llama.cpp: its architecture's name, and properties that llama.cpp takes for granted.

/// A family in llama.cpp.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LlamaCpp {
    /// Name of the architecture.
    pub(crate) architecture: &'static str,
    /// True if it rotates neighbouring features together, so that the rows of queries and keys are paired.
    pub(crate) paired: bool,
    /// Blocks that it runs over a sliding window.
    pub(crate) windows: SlidingBlocks,
    /// The last of so many blocks does not rotate.
    pub(crate) unrotated: Option<usize>,
    /// True if it multiplies the embedding by the root of its width.
    pub(crate) embedding_root: bool,
    /// Number of blocks at which its scores' factor is that of `hidden / heads` features.
    pub(crate) wide_scores_at: Option<usize>,
    /// True if it reads factors of embedding, scores, what is added, and logits.
    pub(crate) factors: bool,
    /// True if it needs a head of its own beside the embedding.
    pub(crate) own_head: bool,
    /// Experts, which every block has then.
    pub(crate) experts: Option<LlamaCppExperts>,
}

/// Experts of an architecture, which it weighs by a softmax over all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LlamaCppExperts {
    /// True if it divides the weights of a token's experts by their sum.
    pub(crate) renormalizes: bool,
    /// True if a key has the width of an expert, which is that of the feed-forward otherwise.
    pub(crate) told_width: bool,
    /// True if all heads together must be as wide as the model.
    pub(crate) square: bool,
    /// True if those of the keys must be too.
    pub(crate) square_keys: bool,
}

/// Blocks of an architecture with a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SlidingBlocks {
    /// None.
    Never,
    /// All but the last of so many.
    AllBut(usize),
}

impl LlamaCpp {
    /// Values of the architectures that do not set them otherwise.
    pub(crate) const PLAIN: LlamaCpp = LlamaCpp {
        architecture: "",
        paired: false,
        windows: SlidingBlocks::Never,
        unrotated: None,
        embedding_root: false,
        wide_scores_at: None,
        factors: false,
        own_head: false,
        experts: None,
    };
}
