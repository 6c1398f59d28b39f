//! Describing a block, operation by operation.

use crate::experts::{MatrixSpec, Route, Routing};
use crate::ops::{Activation, Attending, Attention, Norm, Op};
use crate::register::Register;
use crate::spec::{BlockSpec, LinearSpec, STEM, Tap, VectorSpec};

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
                matrices: Vec::new(),
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
        self.tap(from, first);
        self.spec.ops.push(Op::Linears {
            from,
            outputs: (first..).zip(outputs).collect(),
        });
        outputs
    }

    /// A choice of experts for `from` by the router `name`, which may have a `correction`.
    pub fn route(
        &mut self,
        name: &str,
        correction: bool,
        how: Routing,
        from: Register,
    ) -> Register {
        let shape = [how.experts, self.width(from)];
        let router = self.matrix(name, shape, correction);
        // In 16-bit numbers.
        let to = self.register(4 * how.top_k);
        self.spec.ops.push(Op::Route(Route {
            router,
            from,
            to,
            how,
        }));
        to
    }

    /// A tap of experts: for expert `E`, linears `path.E.NAME` of `out_features` that take `from` of the tokens that
    /// `routing` gives it. Each output has a slot of `out_features` for each expert of a token.
    pub fn dispatch<const N: usize>(
        &mut self,
        from: Register,
        routing: Register,
        path: &str,
        names: [&str; N],
        out_features: usize,
    ) -> [Register; N] {
        let how = self.routing(routing);
        let first = self.spec.linears.len();
        let shape = (self.width(from), out_features);
        self.expert_linears(how.experts, path, &names, shape);
        let to = names.map(|_| self.register(how.top_k * out_features));
        self.tap(from, first);
        self.spec.ops.push(Op::Dispatch {
            from,
            routing,
            linears: first..self.spec.linears.len(),
            to: to.to_vec(),
        });
        to
    }

    /// A tap of experts: a linear `path.E.name` for each on the slots `from`, which they made of `x`, summed for each
    /// token, which gives `out_features`.
    pub fn combine(
        &mut self,
        [from, x]: [Register; 2],
        routing: Register,
        path: &str,
        name: &str,
        out_features: usize,
    ) -> Register {
        let x = self.again(x);
        let how = self.routing(routing);
        let first = self.spec.linears.len();
        let shape = (self.width(from) / how.top_k, out_features);
        self.expert_linears(how.experts, path, &[name], shape);
        let to = self.register(out_features);
        self.tap(from, first);
        self.spec.ops.push(Op::Combine {
            from,
            x,
            routing,
            linears: first..self.spec.linears.len(),
            to,
        });
        to
    }

    /// `from` times the sigmoid of the projection of `x` by the matrix `name`, of one output.
    pub fn weigh(&mut self, from: Register, x: Register, name: &str) -> Register {
        let shape = [1, self.width(x)];
        let matrix = self.matrix(name, shape, false);
        let to = self.register(self.width(from));
        self.spec.ops.push(Op::Weigh {
            from,
            x,
            matrix,
            to,
        });
        to
    }

    /// `x` itself, or, if it is a norm of the residual stream, which has stayed the same, the same norm again: to run it
    /// costs less than to keep what came of it.
    fn again(&mut self, x: Register) -> Register {
        let ops = &self.spec.ops;
        let at = ops.iter().rposition(|op| op.writes(x));
        let since = at.map_or(&ops[..], |at| &ops[at..]);
        let changed = since.iter().any(|op| matches!(op, Op::Add { .. }));
        let Some(&Op::Norm {
            vector,
            norm,
            from: Register::RESIDUAL,
            ..
        }) = since.first().filter(|_| !changed)
        else {
            return x;
        };
        let to = self.register(self.width(x));
        self.spec.ops.push(Op::Norm {
            vector,
            norm,
            from: Register::RESIDUAL,
            to,
        });
        to
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2], correction: bool) -> usize {
        self.spec.matrices.push(MatrixSpec {
            stem: STEM,
            name: name.to_owned(),
            shape,
            correction,
        });
        self.spec.matrices.len() - 1
    }

    fn routing(&self, routing: Register) -> Routing {
        let route = self.spec.route(routing);
        route.expect("an earlier operation chose the experts").how
    }

    /// Linears `path.E.NAME` of all experts, expert by expert.
    fn expert_linears(
        &mut self,
        experts: usize,
        path: &str,
        names: &[&str],
        (in_features, out_features): (usize, usize),
    ) {
        let tap = self.spec.taps.len();
        for expert in 0..experts {
            let linears = names.iter().map(|name| LinearSpec {
                stem: STEM,
                name: format!("{path}.{expert}.{name}"),
                in_features,
                out_features,
                bias: false,
                tap,
                fused_as: Some(path.to_owned()),
            });
            self.spec.linears.extend(linears);
        }
    }

    /// A tap at the operation that comes next, with the linears from `first` on.
    fn tap(&mut self, from: Register, first: usize) {
        let at = self.spec.ops.len();
        // The cut stands before the norms that the input comes from, and before the choice of experts; the first is
        // the block's beginning.
        let ops = self.spec.ops.iter().rev();
        let cheap = ops.take_while(|op| matches!(op, Op::Norm { .. } | Op::Route(_)));
        let start = at - cheap.count();
        self.spec.taps.push(Tap {
            start: if self.spec.taps.is_empty() { 0 } else { start },
            at,
            from,
            linears: first..self.spec.linears.len(),
        });
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
