//! From the operations of a step to launches: neighbours are folded into products where nobody else reads what comes
//! between.
//!
//! Longer than most: a case for each operation.

use burn::tensor::{DType, Int, Tensor};

use super::{
    Cuda,
    buffer::{self, Buffer},
    error::Error,
    kernel_cache::compute_capability,
    step_launch::{
        ENDED, INPUTS, NormAt, PartAt, ProductKind, SCRATCH, SPLITS, StepAt, StepLaunch, depth,
    },
};
use crate::{PackedLayout, StepLinear, StepNorm, StepOp, StepProgram, StepRegister, StepWeight};

/// Registers begin at multiples of so many features.
const ALIGNED: usize = 64;
/// Features that a thread of a kernel takes at once.
const EIGHT: usize = 8;
/// Linears of a launch.
const PARTS: usize = 3;

/// The launches of a program, and all that they touch but caches.
pub(super) struct StepPlan {
    pub(super) dtype: DType,
    pub(super) buffers: Vec<Buffer>,
    pub(super) launches: Vec<StepLaunch>,
    /// The logits' buffer.
    pub(super) logits: usize,
}

/// A plan being made.
struct Planner {
    plan: StepPlan,
    widths: Vec<usize>,
    /// The place of each register by now.
    places: Vec<StepAt>,
    /// The place of each rotary table, and its frequencies.
    tables: Vec<(StepAt, usize)>,
    caches: usize,
}

/// A norm that comes before a product and is folded into it.
#[derive(Clone, Copy)]
struct Folded {
    to: StepRegister,
    from: StepRegister,
    norm: NormAt,
}

/// A linear's weight as a launch takes it.
struct Weighed {
    kind: ProductKind,
    order: Option<Vec<i32>>,
    codes: Buffer,
    grid: Option<Buffer>,
    rows: usize,
}

/// Plans a program; `None` if it has something that no kernel here does.
///
/// # Errors
/// A failure of the device, or tensors of other dtypes than the embedding's.
pub(super) fn plan(program: StepProgram<Cuda>) -> Result<Option<StepPlan>, Error> {
    let Some(StepOp::Embed { table, .. }) = program.ops.first() else {
        return Ok(None);
    };
    let table = buffer::half("step", "table", table.clone())?;
    if compute_capability(table.device.index)?.0 < 8 {
        return Ok(None);
    }
    // The token and its position, then the tables.
    let mut words = 4;
    let tables = program.tables.iter().map(|&frequencies| {
        let at = words;
        words += (2 * frequencies).next_multiple_of(4);
        let at = StepAt {
            buffer: INPUTS,
            offset: 4 * at as u64,
        };
        (at, frequencies)
    });
    let tables = tables.collect();
    let inputs = buffer::empty(&table, [words], DType::I32);
    let attends = program.ops.iter().filter_map(|op| match op {
        StepOp::Attend { to, heads, .. } => Some((heads[0], program.widths[*to] / heads[0])),
        _ => None,
    });
    let attends: Vec<_> = attends.collect();
    let scratch = attends
        .iter()
        .map(|(heads, dim)| heads * SPLITS * (dim + 2));
    let scratch = buffer::empty(&table, [scratch.max().unwrap_or(1)], DType::F32);
    let most = attends.iter().map(|it| it.0).max().unwrap_or(1);
    let ended = buffer::upload(&table, &vec![0_i32; most], DType::I32);
    let mut planner = Planner {
        plan: StepPlan {
            dtype: table.dtype,
            buffers: vec![inputs, scratch, ended],
            launches: Vec::new(),
            logits: 0,
        },
        places: Vec::new(),
        widths: program.widths,
        tables,
        caches: 0,
    };
    debug_assert_eq!([INPUTS, SCRATCH, ENDED], [0, 1, 2]);
    let mut features = 0;
    let starts = planner.widths.iter().map(|width| {
        let start = features;
        features += width.next_multiple_of(ALIGNED);
        start
    });
    let starts: Vec<usize> = starts.collect();
    let registers = buffer::empty(&table, [features], planner.plan.dtype);
    let registers = planner.held(registers);
    planner.places = (starts.iter())
        .map(|&start| registers.later(2 * start))
        .collect();
    let done = planner.ops(program.ops)?;
    Ok(done.then_some(planner.plan))
}

/// The next reader of a register after the operation `at`, if it is the only one.
fn only_reader(ops: &[StepOp<Cuda>], at: usize, register: StepRegister) -> Option<usize> {
    let mut found = None;
    for (i, op) in ops.iter().enumerate().skip(at + 1) {
        if op.reads(register) && found.replace(i).is_some() {
            return None;
        }
        if op.writes(register) {
            break;
        }
    }
    found
}

impl Planner {
    fn held(&mut self, buffer: Buffer) -> StepAt {
        self.plan.buffers.push(buffer);
        StepAt::start(self.plan.buffers.len() - 1)
    }

    /// Keeps a tensor of the program's dtype.
    fn weight<const D: usize>(
        &mut self,
        name: &'static str,
        x: Tensor<Cuda, D>,
    ) -> Result<StepAt, Error> {
        let buffer = buffer::float("step", name, x, self.plan.dtype)?;
        Ok(self.held(buffer))
    }

    fn norm(&mut self, weight: Tensor<Cuda, 1>, norm: StepNorm) -> Result<NormAt, Error> {
        let kind = match norm {
            StepNorm { centred: true, .. } => 3,
            StepNorm { rounded: true, .. } => 1,
            _ => 2,
        };
        Ok(NormAt {
            weight: self.weight("weights of a norm", weight)?,
            kind,
            eps: norm.eps as f32,
            offset: norm.offset as f32,
        })
    }

    /// Plans all operations; false if one of them cannot be done.
    fn ops(&mut self, ops: Vec<StepOp<Cuda>>) -> Result<bool, Error> {
        let mut folded: Option<Folded> = None;
        let mut at = 0;
        while let Some(op) = ops.get(at) {
            let next = ops.get(at + 1);
            let only = |register| only_reader(&ops, at, register) == Some(at + 1);
            let mut taken = 1;
            match op {
                StepOp::Embed { table, scale, to } => {
                    let table = self.weight("table", table.clone())?;
                    self.plan.launches.push(StepLaunch::Embed {
                        table,
                        to: self.places[*to],
                        hidden: self.widths[*to],
                        scale: *scale as f32,
                    });
                }
                StepOp::Norm {
                    weight,
                    norm,
                    from,
                    to,
                } => {
                    let (n, width) = (weight.dims()[0], self.widths[*from]);
                    if !n.is_multiple_of(EIGHT) {
                        return Ok(false);
                    }
                    let norm = self.norm(weight.clone(), *norm)?;
                    let product = |op: &StepOp<Cuda>| {
                        matches!(op, StepOp::Linears { .. } | StepOp::Logits { .. })
                    };
                    if n == width && only(*to) && next.is_some_and(product) {
                        let (to, from) = (*to, *from);
                        folded = Some(Folded { to, from, norm });
                        at += 1;
                        continue;
                    }
                    let add = match next {
                        Some(StepOp::Add { from, scale }) if from == to && only(*to) => {
                            taken = 2;
                            Some(*scale as f32)
                        }
                        _ => None,
                    };
                    self.plan.launches.push(StepLaunch::Normalize {
                        from: self.places[*from],
                        to: self.places[if add.is_some() { 0 } else { *to }],
                        runs: width / n,
                        n,
                        norm,
                        add,
                    });
                }
                StepOp::Linears { from, linears } => {
                    let gate = match next {
                        Some(StepOp::Gate { gelu, gate, up, to })
                            if linears.len() == 2 && only(*gate) && only(*up) =>
                        {
                            Some((*gelu, *gate, *up, *to))
                        }
                        _ => None,
                    };
                    let input = folded.take().filter(|it| it.to == *from);
                    let base = input.map_or(*from, |it| it.from);
                    let add = match next {
                        Some(StepOp::Add { from, scale })
                            if base != 0
                                && linears.len() == 1
                                && *from == linears[0].to
                                && only(*from) =>
                        {
                            Some(*scale as f32)
                        }
                        _ => None,
                    };
                    let norm = input.map(|it| it.norm);
                    let Some(took) = self.linears(linears, (base, norm), gate, add)? else {
                        return Ok(false);
                    };
                    taken = took;
                }
                StepOp::Split { from, to } => {
                    let mut start = self.places[*from];
                    for &part in to {
                        if !self.widths[part].is_multiple_of(EIGHT) {
                            return Ok(false);
                        }
                        self.places[part] = start;
                        start = start.later(2 * self.widths[part]);
                    }
                }
                StepOp::Attend {
                    qkv,
                    to,
                    heads,
                    table,
                    scores,
                } => {
                    let dim = self.widths[*to] / heads[0];
                    let table = match table {
                        None => None,
                        Some(table) if self.tables[*table].1 == dim / 2 => {
                            Some(self.tables[*table].0)
                        }
                        Some(_) => return Ok(false),
                    };
                    // Heads of 256 features were not tried on a card.
                    if !matches!(dim, 64 | 128) || scores.window == Some(0) {
                        return Ok(false);
                    }
                    self.plan.launches.push(StepLaunch::Attend {
                        qkv: qkv.map(|register| self.places[register]),
                        table,
                        to: self.places[*to],
                        heads: *heads,
                        dim,
                        cache: self.caches,
                        window: scores.window.unwrap_or(0),
                        scale: scores.scale(dim) as f32,
                        cap: scores.softcap.unwrap_or(0.0) as f32,
                    });
                    self.caches += 1;
                }
                StepOp::Gate { gelu, gate, up, to } => {
                    self.plan.launches.push(StepLaunch::Gate {
                        gate: self.places[*gate],
                        up: self.places[*up],
                        to: self.places[*to],
                        n: self.widths[*to],
                        gelu: *gelu,
                    });
                }
                StepOp::Add { from, scale } => {
                    self.plan.launches.push(StepLaunch::Add {
                        from: self.places[*from],
                        residual: self.places[0],
                        n: self.widths[0],
                        scale: *scale as f32,
                    });
                }
                StepOp::Logits {
                    from,
                    weight,
                    scale,
                    cap,
                } => {
                    let input = folded.take().filter(|it| it.to == *from);
                    let base = input.map_or(*from, |it| it.from);
                    let [rows, _] = weight.dims();
                    let Some(weighed) =
                        self.weighed(&StepWeight::Dense(weight.clone()), 0, true)?
                    else {
                        return Ok(false);
                    };
                    let like = &self.plan.buffers[INPUTS];
                    let logits = buffer::empty(like, [1, rows], DType::F32);
                    let out = self.held(logits);
                    self.plan.logits = out.buffer;
                    let codes = self.held(weighed.codes);
                    self.plan.launches.push(StepLaunch::Product {
                        kind: weighed.kind,
                        parts: vec![PartAt {
                            codes,
                            grid: None,
                            bias: None,
                            out,
                            rows,
                        }],
                        order: None,
                        from: self.places[base],
                        residual: None,
                        norm: input.map(|it| it.norm),
                        scale: *scale as f32,
                        cap: cap.unwrap_or(0.0) as f32,
                        logits: true,
                    });
                }
            }
            at += taken;
        }
        Ok(self.plan.logits > 0)
    }

    /// Plans linears of `from`, with a norm before them, a gate after them or an addition to the residual stream. Returns
    /// the number of operations that this does.
    fn linears(
        &mut self,
        linears: &[StepLinear<Cuda>],
        (from, norm): (StepRegister, Option<NormAt>),
        gate: Option<(bool, StepRegister, StepRegister, StepRegister)>,
        add: Option<f32>,
    ) -> Result<Option<usize>, Error> {
        let mut weighed = Vec::new();
        for linear in linears {
            let Some(found) = self.weighed(&linear.weight, 0, false)? else {
                return Ok(None);
            };
            weighed.push(found);
        }
        let alike = |a: &Weighed, b: &Weighed| a.kind == b.kind && a.order == b.order;
        let paired = match gate {
            Some((gelu, ..))
                if alike(&weighed[0], &weighed[1]) && weighed[0].rows == weighed[1].rows =>
            {
                if gelu { 2 } else { 1 }
            }
            _ => 0,
        };
        let mut rest = linears.iter().zip(weighed).peekable();
        while let Some((linear, weight)) = rest.next() {
            let mut together = vec![(linear, weight)];
            while let Some(one) =
                rest.next_if(|(_, it)| together.len() < PARTS && alike(it, &together[0].1))
            {
                together.push(one);
            }
            let first = &together[0].1;
            let kind = ProductKind {
                paired,
                ..first.kind
            };
            let order = first.order.clone();
            let order =
                order.filter(|order| order.iter().zip(0..).any(|(&column, at)| column != at));
            let order = order.map(|order| {
                let like = &self.plan.buffers[INPUTS];
                let order = buffer::upload(like, &order, DType::I32);
                self.held(order)
            });
            let mut parts = Vec::new();
            for (linear, weight) in together {
                let bias = match &linear.bias {
                    Some(bias) => Some(self.weight("bias", bias.clone())?),
                    None => None,
                };
                let out = match gate {
                    Some((.., to)) if paired > 0 => to,
                    _ => linear.to,
                };
                let part = PartAt {
                    codes: self.held(weight.codes),
                    grid: weight.grid.map(|grid| self.held(grid)),
                    bias,
                    out: self.places[out],
                    rows: weight.rows,
                };
                // A gate comes first.
                match gate {
                    Some((_, gate, ..)) if paired > 0 && linear.to == gate => parts.insert(0, part),
                    _ => parts.push(part),
                }
            }
            self.plan.launches.push(StepLaunch::Product {
                kind,
                parts,
                order,
                from: self.places[from],
                residual: add.map(|_| self.places[0]),
                norm,
                scale: add.unwrap_or(1.0),
                cap: 0.0,
                logits: false,
            });
        }
        Ok(Some(if paired > 0 || add.is_some() { 2 } else { 1 }))
    }

    /// A weight as a launch takes it; `None` if none does.
    fn weighed(
        &self,
        weight: &StepWeight<Cuda>,
        paired: usize,
        logits: bool,
    ) -> Result<Option<Weighed>, Error> {
        let device = self.plan.buffers[INPUTS].device.index;
        let found = match weight {
            StepWeight::Dense(weight) => {
                let [rows, columns] = weight.dims();
                let whole = rows.is_multiple_of(16) || (logits && rows > 16);
                if !whole || !columns.is_multiple_of(EIGHT) {
                    return Ok(None);
                }
                Weighed {
                    kind: ProductKind {
                        bits: 16,
                        columns,
                        per_group: 0,
                        paired,
                    },
                    order: None,
                    codes: buffer::float("step", "weight", weight.clone(), self.plan.dtype)?,
                    grid: None,
                    rows,
                }
            }
            StepWeight::Packed(packed) => {
                let PackedLayout::Rows { codes, grid, order } = &packed.layout else {
                    return Ok(None);
                };
                let ints = |name, x: Tensor<Cuda, 2, Int>| buffer::int("step", name, x, DType::I32);
                let ([rows, columns], bits) = (packed.dims(), packed.bits.get());
                // Codes of 2 bits were not tried on a card.
                if !matches!(bits, 4 | 8) {
                    return Ok(None);
                }
                let groups = grid.dims()[1];
                let order = buffer::int("step", "order", order.clone(), DType::I32)?;
                Weighed {
                    kind: ProductKind {
                        bits,
                        columns,
                        per_group: if groups == 1 {
                            0
                        } else {
                            columns * bits / 128 / groups
                        },
                        paired,
                    },
                    order: Some(buffer::download(&order)?),
                    codes: ints("codes", codes.clone())?,
                    grid: Some(ints("grid", grid.clone())?),
                    rows,
                }
            }
        };
        let fits = found.kind.columns.is_multiple_of(EIGHT) && depth(found.kind, device)?.is_some();
        Ok(fits.then_some(found))
    }
}
