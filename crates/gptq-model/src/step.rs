//! A model as a program that takes one token through all of it, where an engine has kernels for that.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use gptq_kernels::{
    Engine, StepLinear, StepNorm, StepOp, StepProgram, StepRegister, StepToken, StepWeight,
    TokenStep,
};
use gptq_spec::{Activation, Norm, NormKind, Op, Register, Rope};

use crate::attend::{joining, scores};
use crate::model::Embedding;
use crate::{Block, Head, Linear, Weight, rope};

/// A step of one token through a model.
pub(crate) struct ModelStep<B: Engine> {
    step: Box<dyn TokenStep<B>>,
    /// The embedding of each rotary table.
    ropes: Vec<Rope>,
}

impl<B: Engine> ModelStep<B> {
    /// Makes the step of a model with these parts; `None` if the engine has none for it.
    pub(crate) fn of<'a>(
        embedding: &Embedding<B>,
        blocks: impl Iterator<Item = &'a Block<B>>,
        head: &Head<B>,
    ) -> Option<Self> {
        let hidden = embedding.table.dims()[1];
        let mut described = Described {
            program: StepProgram {
                widths: vec![hidden],
                ops: vec![StepOp::Embed {
                    table: embedding.table.clone(),
                    scale: embedding.scale,
                    to: 0,
                }],
                tables: Vec::new(),
            },
            ropes: Vec::new(),
        };
        for block in blocks {
            described.block(block)?;
        }
        let to = described.register(hidden);
        described.program.ops.push(StepOp::Norm {
            weight: head.weights.clone(),
            norm: step_norm(head.norm),
            from: 0,
            to,
        });
        described.program.ops.push(StepOp::Logits {
            from: to,
            weight: head.weight.clone(),
            scale: head.ends.logits,
            cap: head.ends.softcap,
        });
        Some(ModelStep {
            step: B::step(described.program)?,
            ropes: described.ropes,
        })
    }

    /// Runs a token at a position; each block's keys and values have room for its own.
    pub(crate) fn run(
        &mut self,
        id: u32,
        position: usize,
        caches: Vec<[Tensor<B, 3>; 2]>,
    ) -> Vec<f32> {
        let tables = self.ropes.iter();
        let token = StepToken {
            id,
            position,
            tables: tables
                .map(|rope| rope::values(rope, (position, 1)).concat())
                .collect(),
        };
        self.step.run(&token, caches)
    }
}

/// A program being described.
struct Described<B: Engine> {
    program: StepProgram<B>,
    ropes: Vec<Rope>,
}

impl<B: Engine> Described<B> {
    fn register(&mut self, width: usize) -> StepRegister {
        self.program.widths.push(width);
        self.program.widths.len() - 1
    }

    /// Adds a block's operations; `None` if one of them has no counterpart.
    fn block(&mut self, block: &Block<B>) -> Option<()> {
        let spec = block.spec();
        let mut registers = BTreeMap::from([(Register::RESIDUAL, 0)]);
        for op in spec.ops() {
            let mut of = |register: Register| {
                *(registers.entry(register)).or_insert_with(|| self.register(spec.width(register)))
            };
            let op = match op {
                Op::Norm {
                    vector,
                    norm,
                    from,
                    to,
                } => StepOp::Norm {
                    weight: block.vectors[*vector].clone(),
                    norm: step_norm(*norm),
                    from: of(*from),
                    to: of(*to),
                },
                Op::Linears { from, outputs } => StepOp::Linears {
                    from: of(*from),
                    linears: outputs
                        .iter()
                        .map(|&(linear, to)| step_linear(block.linear(linear), of(to)))
                        .collect(),
                },
                Op::Split { from, to } => StepOp::Split {
                    from: of(*from),
                    to: to.iter().map(|&to| of(to)).collect(),
                },
                Op::Attend(attention) => {
                    let how = &attention.how;
                    let (qkv, to) = (attention.qkv.map(&mut of), of(attention.to));
                    let table = match &how.rope {
                        None => None,
                        Some(_) => Some(self.table(joining(how)?)),
                    };
                    StepOp::Attend {
                        qkv,
                        to,
                        heads: [attention.heads, attention.kv_heads],
                        table,
                        scores: scores(how),
                    }
                }
                Op::Gate { act, gate, up, to } => StepOp::Gate {
                    gelu: match act {
                        Activation::Silu => false,
                        Activation::GeluTanh => true,
                    },
                    gate: of(*gate),
                    up: of(*up),
                    to: of(*to),
                },
                Op::Add { from, scale } => StepOp::Add {
                    from: of(*from),
                    scale: *scale,
                },
                // Experts are chosen on the host.
                Op::Route(_) | Op::Dispatch { .. } | Op::Combine { .. } | Op::Weigh { .. } => {
                    return None;
                }
            };
            self.program.ops.push(op);
        }
        Some(())
    }

    /// The rotary table of an embedding.
    fn table(&mut self, rope: &Rope) -> usize {
        let found = self.ropes.iter().position(|it| it == rope);
        found.unwrap_or_else(|| {
            self.ropes.push(rope.clone());
            self.program.tables.push(rope.dim / 2);
            self.ropes.len() - 1
        })
    }
}

fn step_norm(norm: Norm) -> StepNorm {
    StepNorm {
        eps: norm.eps,
        offset: if norm.kind == NormKind::RmsPlusOne {
            1.0
        } else {
            0.0
        },
        rounded: norm.kind == NormKind::Rms,
        centred: norm.kind == NormKind::Layer,
    }
}

fn step_linear<B: Engine>(linear: &Linear<B>, to: StepRegister) -> StepLinear<B> {
    StepLinear {
        weight: match &linear.weight {
            Weight::Dense(weight) => StepWeight::Dense(weight.clone()),
            Weight::Packed(packed) => StepWeight::Packed(packed.clone()),
        },
        bias: linear.bias.clone(),
        to,
    }
}
