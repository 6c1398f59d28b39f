//! Attention scores that differ from plain causal attention.

/// Steps from the product of a query and a key to the key's weight: `score = scale q·k`, then
/// `softcap tanh(score / softcap)`, then the mask, then the softmax. The default is plain causal attention.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scores {
    /// Factor of the product; `1 / sqrt(head_dim)` where none is given.
    pub scale: Option<f64>,
    /// Bound that scores approach.
    pub softcap: Option<f64>,
    /// Tokens that a query sees, its own included; all before it where none is given.
    pub window: Option<usize>,
}

impl Scores {
    /// The factor for heads of `dim` features.
    pub(crate) fn scale(&self, dim: usize) -> f64 {
        self.scale.unwrap_or(1.0 / (dim as f64).sqrt())
    }

    /// The first key that the query at position `at` sees.
    pub(crate) fn first_key(&self, at: usize) -> usize {
        self.window
            .map_or(0, |window| (at + 1).saturating_sub(window))
    }
}
