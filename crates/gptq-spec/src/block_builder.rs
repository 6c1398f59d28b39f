//! Describing a block, operation by operation.

use crate::spec::{
    Activation, Attending, Attention, BlockSpec, LinearSpec, Norm, Op, Register, STEM, Tap,
    VectorSpec,
};

/// Adds operations to a block in the order in which they run. Each gives the register that it writes.
///
/// ```
/// use gptq_spec::{Activation, BlockBuilder, Norm, NormKind, Register};
///
/// // A feed-forward of 64 features on 32: residual += down(silu(gate(x)) * up(x)), x = norm(residual).
/// let mut block = BlockBuilder::new(32);
/// let norm = Norm { kind: NormKind::Rms, eps: 1e-6 };
/// let x = block.norm("norm", 32, norm, Register::RESIDUAL);
/// let fused = Some("mlp.gate_up_proj");
/// let [gate, up] = block.linears(x, fused, [("mlp.gate_proj", 64, false), ("mlp.up_proj", 64, false)]);
/// let gated = block.gate(Activation::Silu, gate, up);
/// let [down] = block.linears(gated, None, [("mlp.down_proj", 32, false)]);
/// block.add(down, 1.0);
/// let block = block.build();
/// assert_eq!((block.taps(), block.in_features(1), block.tap_name(0)), (0..2, 64, "gate_up"));
/// ```
#[derive(Debug)]
pub struct BlockBuilder {
    spec: BlockSpec,
}

impl BlockBuilder {
    /// An empty block on a residual stream of `hidden` features.
    pub fn new(hidden: usize) -> Self {
        BlockBuilder {
            spec: BlockSpec {
                ops: Vec::new(),
                linears: Vec::new(),
                vectors: Vec::new(),
                taps: Vec::new(),
                widths: vec![hidden],
            },
        }
    }

    /// A norm with `len` weights over each run of `len` features of `from`.
    pub fn norm(&mut self, name: &str, len: usize, norm: Norm, from: Register) -> Register {
        let width = self.width(from);
        assert!(width.is_multiple_of(len), "{name}: whole runs of features");
        let to = self.register(width);
        self.spec.ops.push(Op::Norm {
            vector: self.spec.vectors.len(),
            norm,
            from,
            to,
        });
        self.spec.vectors.push(VectorSpec {
            stem: STEM,
            name: name.to_owned(),
            len,
        });
        to
    }

    /// A tap: linears, by name, outputs and whether they have a bias, that all take `from`; readers fuse
    /// them as `fused_as`.
    pub fn linears<const N: usize>(
        &mut self,
        from: Register,
        fused_as: Option<&str>,
        linears: [(&str, usize, bool); N],
    ) -> [Register; N] {
        let (first, tap) = (self.spec.linears.len(), self.spec.taps.len());
        let in_features = self.width(from);
        let outputs = linears.map(|(name, out_features, bias)| {
            self.spec.linears.push(LinearSpec {
                stem: STEM,
                name: name.to_owned(),
                in_features,
                out_features,
                bias,
                tap,
                fused_as: fused_as.map(str::to_owned),
            });
            self.register(out_features)
        });
        let at = self.spec.ops.len();
        // The cut stands before the norms that the input comes from; the first is the block's beginning.
        let norms = self.spec.ops.iter().rev();
        let norms = norms.take_while(|op| matches!(op, Op::Norm { .. })).count();
        self.spec.taps.push(Tap {
            start: if tap == 0 { 0 } else { at - norms },
            at,
            from,
            linears: first..first + N,
        });
        self.spec.ops.push(Op::Linears {
            from,
            outputs: (first..).zip(outputs).collect(),
        });
        outputs
    }

    /// Consecutive features of `from`, parts of these widths, which make up all of it.
    pub fn split<const N: usize>(&mut self, from: Register, widths: [usize; N]) -> [Register; N] {
        let all: usize = widths.iter().sum();
        assert_eq!(all, self.width(from), "the parts make up the whole");
        let to = widths.map(|width| self.register(width));
        self.spec.ops.push(Op::Split {
            from,
            to: to.to_vec(),
        });
        to
    }

    /// Causal attention of queries over keys and values.
    pub fn attend(&mut self, qkv: [Register; 3], how: Attending) -> Register {
        let [heads, kv_heads, values] = qkv.map(|register| self.width(register) / how.head_dim);
        assert_eq!(kv_heads, values, "keys and values pair up");
        let to = self.register(heads * how.head_dim);
        self.spec.ops.push(Op::Attend(Attention {
            qkv,
            to,
            heads,
            kv_heads,
            how,
        }));
        to
    }

    /// `act(gate) * up`.
    pub fn gate(&mut self, act: Activation, gate: Register, up: Register) -> Register {
        let to = self.register(self.width(up));
        self.spec.ops.push(Op::Gate { act, gate, up, to });
        to
    }

    /// Adds `from`, times `scale`, to the residual stream.
    pub fn add(&mut self, from: Register, scale: f64) {
        let hidden = self.width(Register::RESIDUAL);
        assert_eq!(self.width(from), hidden, "the residual stream's width");
        self.spec.ops.push(Op::Add { from, scale });
    }

    /// The block.
    pub fn build(self) -> BlockSpec {
        self.spec
    }

    fn register(&mut self, width: usize) -> Register {
        self.spec.widths.push(width);
        Register(self.spec.widths.len() - 1)
    }

    fn width(&self, register: Register) -> usize {
        self.spec.widths[register.0]
    }
}
