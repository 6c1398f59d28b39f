//! A decoder block's linears, by name, and the points where they take their inputs.

use crate::ModelConfig;

/// The seven linears of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the projections")]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

/// Four points of a block, in order; the linears of a stage share one input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Query, key and value projections, from the first norm.
    Qkv,
    /// Output projection, from the attention.
    AttentionOut,
    /// Gate and up projections, from the second norm.
    GateUp,
    /// Down projection, from the gated activation.
    Down,
}

impl Stage {
    /// All stages, in order.
    pub const ALL: [Stage; 4] = [Stage::Qkv, Stage::AttentionOut, Stage::GateUp, Stage::Down];

    /// The linears that take this stage's input.
    pub fn projections(self) -> &'static [Projection] {
        match self {
            Stage::Qkv => &[Projection::Q, Projection::K, Projection::V],
            Stage::AttentionOut => &[Projection::O],
            Stage::GateUp => &[Projection::Gate, Projection::Up],
            Stage::Down => &[Projection::Down],
        }
    }

    /// What readers that run this stage's linears as one call it within the block.
    pub fn fused(self) -> Option<&'static str> {
        match self {
            Stage::Qkv => Some("self_attn.qkv_proj"),
            Stage::GateUp => Some("mlp.gate_up_proj"),
            Stage::AttentionOut | Stage::Down => None,
        }
    }

    /// Whether [`Block::advance`](crate::Block::advance) adds to the residual here, and leaves no
    /// activation.
    pub fn ends_in_residual(self) -> bool {
        matches!(self, Stage::AttentionOut | Stage::Down)
    }

    /// Features of the shared input.
    pub fn in_features(self, config: &ModelConfig) -> usize {
        self.projections()[0].shape(config).0
    }
}

impl Projection {
    /// All projections, in the order a block uses them.
    pub const ALL: [Projection; 7] = [
        Projection::Q,
        Projection::K,
        Projection::V,
        Projection::O,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// The module's name within its block.
    pub fn name(self) -> &'static str {
        match self {
            Projection::Q => "self_attn.q_proj",
            Projection::K => "self_attn.k_proj",
            Projection::V => "self_attn.v_proj",
            Projection::O => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::Down => "mlp.down_proj",
        }
    }

    /// The module's name in block `layer` of a checkpoint.
    pub fn module(self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.name())
    }

    /// `(in_features, out_features)`.
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let hidden = config.hidden_size;
        let (q, kv) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        match self {
            Projection::Q => (hidden, q),
            Projection::K | Projection::V => (hidden, kv),
            Projection::O => (q, hidden),
            Projection::Gate | Projection::Up => (hidden, config.intermediate_size),
            Projection::Down => (config.intermediate_size, hidden),
        }
    }

    /// Whether the model has a bias here.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Projection::Q | Projection::K | Projection::V => config.qkv_bias,
            Projection::O => config.o_bias,
            Projection::Gate | Projection::Up | Projection::Down => config.mlp_bias,
        }
    }
}
