//! Shapes and constants from which a family describes the blocks of a model.

use crate::ops::{Attending, Norm, Rope};

/// Shapes and constants that the blocks of a model have in common.
pub(crate) struct Shapes {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) norm: Norm,
    /// The rotary embedding of blocks in which tokens see all before them.
    pub(crate) rope: Rope,
    /// The rotary embedding of blocks with a sliding window.
    pub(crate) sliding_rope: Rope,
    /// Sliding window of each layer in tokens, the token itself included; `None` where a token sees all
    /// before it.
    pub(crate) windows: Vec<Option<usize>>,
}

impl Shapes {
    /// Returns the attention parameters of block `layer`, as most families have them.
    pub(crate) fn attending(&self, layer: usize) -> Attending {
        let window = self.windows[layer];
        Attending {
            head_dim: self.head_dim,
            rope: Some(match window {
                Some(_) => self.sliding_rope.clone(),
                None => self.rope.clone(),
            }),
            scale: None,
            softcap: None,
            window,
        }
    }
}
