//! A step of one token through small models of every operation, compared with the same operations in f64, token by token.
//!
//! Longer than most: every operation is here twice, for the device and in f64.

use burn::tensor::{Element, Tensor};
use gptq_format::Bits;
use half::{bf16, f16};

use super::packed::layer;
use crate::cuda::{
    Cuda, Device, resident,
    testing::{Random, device, distance, rounding, tensor, values, wide},
};
use crate::{
    Engine, Scores, StepLinear, StepNorm, StepOp, StepProgram, StepRegister, StepToken, StepWeight,
};

const VOCABULARY: usize = 331;
const CAPACITY: usize = 320;

/// A program, and its weights in f64.
struct Model<E: Element> {
    program: StepProgram<Cuda>,
    ops: Vec<Reference>,
    random: Random,
    device: Device,
    /// Heads of keys and their features, for each cache.
    caches: Vec<[usize; 2]>,
    _dtype: std::marker::PhantomData<E>,
}

/// An operation in f64, of the same registers.
enum Reference {
    Embed(Vec<f64>, f64),
    Norm(Vec<f64>, StepNorm),
    Linears(Vec<(Vec<f64>, Option<Vec<f64>>)>),
    Other,
}

/// The form of a linear's weight.
#[derive(Clone, Copy)]
enum Stored {
    Dense,
    Packed(Bits, usize, bool),
}

impl<E: Element> Model<E> {
    fn new(hidden: usize, scale: f64, device: &Device) -> Self {
        let mut model = Model {
            program: StepProgram {
                widths: vec![hidden],
                ops: Vec::new(),
                tables: Vec::new(),
            },
            ops: Vec::new(),
            random: Random(11),
            device: device.clone(),
            caches: Vec::new(),
            _dtype: std::marker::PhantomData,
        };
        let table = model.random.halves::<E>(VOCABULARY * hidden, 1.0);
        let op = StepOp::Embed {
            table: tensor(&table, [VOCABULARY, hidden], device),
            scale,
            to: 0,
        };
        model.push(op, Reference::Embed(widened(&table), scale));
        model
    }

    fn push(&mut self, op: StepOp<Cuda>, reference: Reference) {
        self.program.ops.push(op);
        self.ops.push(reference);
    }

    fn register(&mut self, width: usize) -> StepRegister {
        self.program.widths.push(width);
        self.program.widths.len() - 1
    }

    fn norm(&mut self, from: StepRegister, n: usize, norm: StepNorm) -> StepRegister {
        let weight: Vec<E> = (0..n)
            .map(|_| E::from_elem(1.0 - norm.offset + 0.3 * self.random.normal()))
            .collect();
        let to = self.register(self.program.widths[from]);
        let op = StepOp::Norm {
            weight: tensor(&weight, [n], &self.device),
            norm,
            from,
            to,
        };
        self.push(op, Reference::Norm(widened(&weight), norm));
        to
    }

    fn linears<const N: usize>(
        &mut self,
        from: StepRegister,
        all: [(usize, Stored, bool); N],
    ) -> [StepRegister; N] {
        let columns = self.program.widths[from];
        let (mut linears, mut weights) = (Vec::new(), Vec::new());
        let to = all.map(|(rows, stored, biased)| {
            let to = self.register(rows);
            let (weight, wide_weight) = match stored {
                Stored::Dense => {
                    let weight = self.random.halves::<E>(rows * columns, 0.08);
                    let wide_weight = widened(&weight);
                    (
                        StepWeight::Dense(tensor(&weight, [rows, columns], &self.device)),
                        wide_weight,
                    )
                }
                Stored::Packed(bits, group, act_order) => {
                    // The same columns for all of a tap, as a branch has them.
                    let mut order = Random(columns as u64);
                    let mut linear = layer([columns, rows], bits, group, false, &mut self.random);
                    if act_order {
                        for at in 0..columns {
                            linear.g_idx.swap(at, order.next() as usize % columns);
                        }
                    }
                    let packed = resident(&linear.pack(), &self.device).unwrap();
                    let dense = linear.dequantize().into_iter().map(f64::from);
                    (StepWeight::Packed(packed), dense.collect())
                }
            };
            let bias = biased.then(|| self.random.halves::<E>(rows, 0.5));
            weights.push((wide_weight, bias.as_deref().map(widened)));
            let bias = bias.map(|bias| tensor(&bias, [rows], &self.device));
            linears.push(StepLinear { weight, bias, to });
            to
        });
        self.push(
            StepOp::Linears { from, linears },
            Reference::Linears(weights),
        );
        to
    }

    fn attend(
        &mut self,
        qkv: [StepRegister; 3],
        dim: usize,
        table: Option<usize>,
        scores: Scores,
    ) -> StepRegister {
        let [width, kv_width, _] = qkv.map(|register| self.program.widths[register]);
        let to = self.register(width);
        self.caches.push([kv_width / dim, dim]);
        let op = StepOp::Attend {
            qkv,
            to,
            heads: [width / dim, kv_width / dim],
            table,
            scores,
        };
        self.push(op, Reference::Other);
        to
    }

    fn gate(&mut self, gate: StepRegister, up: StepRegister, gelu: bool) -> StepRegister {
        let to = self.register(self.program.widths[up]);
        self.push(StepOp::Gate { gelu, gate, up, to }, Reference::Other);
        to
    }

    fn add(&mut self, from: StepRegister, scale: f64) {
        self.push(StepOp::Add { from, scale }, Reference::Other);
    }

    fn logits(&mut self, from: StepRegister, scale: f64, cap: Option<f64>) {
        let hidden = self.program.widths[from];
        let weight = self.random.halves::<E>(VOCABULARY * hidden, 0.1);
        let op = StepOp::Logits {
            from,
            weight: tensor(&weight, [VOCABULARY, hidden], &self.device),
            scale,
            cap,
        };
        self.push(op, Reference::Linears(vec![(widened(&weight), None)]));
    }

    /// Runs tokens after caches that are filled up to `start`, and returns the largest distance of their logits.
    fn distance(&mut self, start: usize, tokens: usize) -> f64 {
        let mut step = Cuda::step(self.program.clone()).expect("kernels for all of it");
        let mut held = Vec::new();
        let mut caches: Vec<[Tensor<Cuda, 3>; 2]> = Vec::new();
        for &[heads, dim] in &self.caches {
            let pair = [0, 1].map(|_| self.random.halves::<E>(heads * CAPACITY * dim, 1.0));
            held.push(pair.each_ref().map(|rows| widened(rows)));
            caches.push(
                pair.each_ref()
                    .map(|rows| tensor(rows, [heads, CAPACITY, dim], &self.device)),
            );
        }
        let mut worst: f64 = 0.0;
        for position in start..start + tokens {
            let id = (self.random.next() % VOCABULARY as u64) as u32;
            let tables: Vec<[Vec<f32>; 2]> = (self.program.tables.iter())
                .map(|&n| {
                    let angle = |i: usize| position as f64 * 1e4_f64.powf(-(i as f64) / n as f64);
                    let of = |f: fn(f64) -> f64| (0..n).map(|i| f(angle(i)) as f32).collect();
                    [of(f64::cos), of(f64::sin)]
                })
                .collect();
            let token = StepToken {
                id,
                position,
                tables: tables.iter().map(|table| table.concat()).collect(),
            };
            let found = step.run(&token, caches.clone());
            let found: Vec<f64> = found.into_iter().map(f64::from).collect();
            let expected = self.reference(&token, &mut held);
            worst = worst.max(distance(&found, &expected));
            if worst.is_nan() {
                return worst;
            }
        }
        for (pair, wide) in caches.into_iter().zip(&held) {
            for (rows, wide) in pair.into_iter().zip(wide) {
                worst = worst.max(distance(&values(rows), wide));
            }
        }
        worst
    }

    fn reference(&self, token: &StepToken, caches: &mut [[Vec<f64>; 2]]) -> Vec<f64> {
        let widths = &self.program.widths;
        let mut registers: Vec<Vec<f64>> = widths.iter().map(|&n| vec![f64::NAN; n]).collect();
        let mut cache = caches.iter_mut();
        for (op, reference) in self.program.ops.iter().zip(&self.ops) {
            match (op, reference) {
                (StepOp::Embed { to, .. }, Reference::Embed(table, scale)) => {
                    let (n, row) = (widths[*to], token.id as usize);
                    registers[*to] = table[row * n..(row + 1) * n]
                        .iter()
                        .map(|x| x * scale)
                        .collect();
                }
                (StepOp::Norm { from, to, .. }, Reference::Norm(weight, norm)) => {
                    let runs = registers[*from].chunks(weight.len());
                    registers[*to] = runs.flat_map(|x| normalized(x, weight, *norm)).collect();
                }
                (StepOp::Linears { from, linears }, Reference::Linears(weights)) => {
                    for (linear, (weight, bias)) in linears.iter().zip(weights) {
                        let mut y = product(weight, &registers[*from]);
                        for (y, bias) in y.iter_mut().zip(bias.iter().flatten()) {
                            *y += bias;
                        }
                        registers[linear.to] = y;
                    }
                }
                (StepOp::Split { from, to }, _) => {
                    let mut start = 0;
                    for &to in to {
                        registers[to] = registers[*from][start..start + widths[to]].to_vec();
                        start += widths[to];
                    }
                }
                (
                    StepOp::Attend {
                        qkv,
                        to,
                        heads,
                        table,
                        scores,
                    },
                    _,
                ) => {
                    let dim = widths[*to] / heads[0];
                    let [q, k, v] = qkv.map(|register| registers[register].clone());
                    let table = table.map(|table| &token.tables[table]);
                    let [q, k] = [q, k].map(|x| rotated::<E>(&x, dim, table));
                    let pair = cache.next().unwrap();
                    for head in 0..heads[1] {
                        let at = (head * CAPACITY + token.position) * dim;
                        pair[0][at..at + dim].copy_from_slice(&k[head * dim..(head + 1) * dim]);
                        pair[1][at..at + dim].copy_from_slice(&v[head * dim..(head + 1) * dim]);
                    }
                    registers[*to] = (0..heads[0])
                        .flat_map(|head| {
                            let kv = head / (heads[0] / heads[1]);
                            let rows = |cache: &[f64]| {
                                cache[kv * CAPACITY * dim..(kv + 1) * CAPACITY * dim].to_vec()
                            };
                            attended(
                                &q[head * dim..(head + 1) * dim],
                                [rows(&pair[0]), rows(&pair[1])],
                                token.position,
                                *scores,
                            )
                        })
                        .collect();
                }
                (StepOp::Gate { gelu, gate, up, to }, _) => {
                    let act = |x: f64| match gelu {
                        true => {
                            0.5 * x
                                * (1.0
                                    + (0.797_884_560_802_865_4 * (x + 0.044_715 * x.powi(3)))
                                        .tanh())
                        }
                        false => x / (1.0 + (-x).exp()),
                    };
                    let pairs = registers[*gate].iter().zip(&registers[*up]);
                    registers[*to] = pairs.map(|(g, u)| act(*g) * u).collect();
                }
                (StepOp::Add { from, scale }, _) => {
                    let summand = registers[*from].clone();
                    for (x, y) in registers[0].iter_mut().zip(summand) {
                        *x += scale * y;
                    }
                }
                (
                    StepOp::Logits {
                        from, scale, cap, ..
                    },
                    Reference::Linears(weights),
                ) => {
                    let logits = product(&weights[0].0, &registers[*from]).into_iter();
                    return match cap {
                        None => logits.map(|x| x * scale).collect(),
                        Some(cap) => logits.map(|x| cap * (x * scale / cap).tanh()).collect(),
                    };
                }
                _ => unreachable!("pushed together"),
            }
            // What a kernel stores is rounded.
            for x in registers.iter_mut().flatten() {
                *x = wide(E::from_elem(*x));
            }
        }
        unreachable!("the last operation gives logits")
    }
}

fn widened<E: Element>(x: &[E]) -> Vec<f64> {
    x.iter().map(|&x| wide(x)).collect()
}

fn product(weight: &[f64], x: &[f64]) -> Vec<f64> {
    let rows = weight.chunks(x.len());
    rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum())
        .collect()
}

fn normalized(x: &[f64], weight: &[f64], norm: StepNorm) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = if norm.centred {
        x.iter().sum::<f64>() / n
    } else {
        0.0
    };
    let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let factor = (square + norm.eps).sqrt().recip();
    let pairs = x.iter().zip(weight);
    pairs
        .map(|(x, w)| (x - mean) * factor * (w + norm.offset))
        .collect()
}

fn rotated<E: Element>(x: &[f64], dim: usize, table: Option<&Vec<f32>>) -> Vec<f64> {
    let Some(table) = table else {
        return x.to_vec();
    };
    let half = dim / 2;
    let turned = (0..x.len()).map(|i| {
        let (head, d) = (i / dim, i % dim);
        let other = x[head * dim + (d + half) % dim] * if d < half { -1.0 } else { 1.0 };
        let turned = x[i] * f64::from(table[d % half]) + other * f64::from(table[half + d % half]);
        wide(E::from_elem(turned))
    });
    turned.collect()
}

fn attended(q: &[f64], [keys, rows]: [Vec<f64>; 2], at: usize, scores: Scores) -> Vec<f64> {
    let dim = q.len();
    let seen = scores.first_key(at)..at + 1;
    let score = |j: usize| {
        let key = &keys[j * dim..(j + 1) * dim];
        let score = scores.scale(dim) * q.iter().zip(key).map(|(a, b)| a * b).sum::<f64>();
        scores
            .softcap
            .map_or(score, |cap| cap * (score / cap).tanh())
    };
    let found: Vec<f64> = seen.clone().map(score).collect();
    let most = found.iter().copied().fold(f64::MIN, f64::max);
    let total: f64 = found.iter().map(|s| (s - most).exp()).sum();
    let mut out = vec![0.0; dim];
    for (j, s) in seen.zip(found) {
        for (out, v) in out.iter_mut().zip(&rows[j * dim..(j + 1) * dim]) {
            *out += (s - most).exp() / total * v;
        }
    }
    out
}

const RMS: StepNorm = StepNorm {
    eps: 1e-5,
    offset: 0.0,
    rounded: true,
    centred: false,
};

/// A block of Llama's kind.
fn llama<E: Element>(
    model: &mut Model<E>,
    stored: Stored,
    heads: [usize; 2],
    dim: usize,
    inner: usize,
    biased: bool,
) {
    let hidden = model.program.widths[0];
    let x = model.norm(0, hidden, RMS);
    let (q, kv) = (heads[0] * dim, heads[1] * dim);
    let qkv = model.linears(
        x,
        [
            (q, stored, biased),
            (kv, stored, biased),
            (kv, stored, biased),
        ],
    );
    let y = model.attend(qkv, dim, Some(0), Scores::default());
    let [y] = model.linears(y, [(hidden, stored, false)]);
    model.add(y, 1.0);
    let x = model.norm(0, hidden, RMS);
    let [gate, up] = model.linears(x, [(inner, stored, biased), (inner, stored, biased)]);
    let y = model.gate(gate, up, false);
    let [y] = model.linears(y, [(hidden, stored, biased)]);
    model.add(y, 0.25);
}

fn steps_of_llama<E: Element>() {
    let Some(device) = device() else { return };
    for (stored, hidden, heads, dim, inner) in [
        (Stored::Dense, 256, [4, 2], 64, 768),
        (Stored::Dense, 576, [9, 3], 64, 1536),
        (
            Stored::Packed(Bits::Four, 128, true),
            512,
            [4, 4],
            128,
            1152,
        ),
        (Stored::Packed(Bits::Four, 64, false), 576, [9, 3], 64, 1536),
        (Stored::Packed(Bits::Four, 32, true), 512, [4, 1], 128, 1024),
        (Stored::Packed(Bits::Four, 96, true), 192, [3, 1], 64, 384),
        (
            Stored::Packed(Bits::Eight, 128, true),
            4096,
            [4, 2],
            128,
            768,
        ),
        (
            Stored::Packed(Bits::Eight, 192, false),
            192,
            [3, 1],
            64,
            384,
        ),
        (
            Stored::Packed(Bits::Four, 128, true),
            4096,
            [2, 2],
            64,
            4096,
        ),
    ] {
        let mut model = Model::<E>::new(hidden, 1.0, &device);
        model.program.tables.push(dim / 2);
        for biased in [false, true] {
            llama(&mut model, stored, heads, dim, inner, biased);
        }
        let x = model.norm(0, hidden, RMS);
        model.logits(x, 1.0, None);
        for start in [0, 61, 300] {
            let found = model.distance(start, 4);
            // Every operation rounds once more than the f64 one, of some twenty.
            assert!(
                found < 12.0 * rounding::<E>(),
                "{hidden} {heads:?} {inner} from {start}: {found}"
            );
        }
    }
}

#[test]
fn a_step_computes_what_its_operations_say() {
    steps_of_llama::<f16>();
    steps_of_llama::<bf16>();
}

fn steps_of_others<E: Element>() {
    let Some(device) = device() else { return };
    let (hidden, dim) = (320, 64);
    let four = Stored::Packed(Bits::Four, 64, true);
    let eight = Stored::Packed(Bits::Eight, 64, true);
    let mut model = Model::<E>::new(hidden, 12.5, &device);
    model.program.tables.extend([dim / 2, dim / 2]);
    let plus_one = StepNorm {
        eps: 1e-6,
        offset: 1.0,
        rounded: false,
        centred: false,
    };
    let centred = StepNorm {
        offset: 0.0,
        centred: true,
        ..plus_one
    };
    // Norms of heads, after the linears and before the sum; linears of several widths; a window and a softcap.
    let x = model.norm(0, hidden, plus_one);
    let [q, k, v] = model.linears(
        x,
        [
            (256, four, false),
            (128, eight, false),
            (128, Stored::Dense, false),
        ],
    );
    let (q, k) = (model.norm(q, dim, plus_one), model.norm(k, dim, plus_one));
    let scores = Scores {
        scale: Some(0.1),
        softcap: Some(5.0),
        window: Some(100),
    };
    let y = model.attend([q, k, v], dim, Some(1), scores);
    let [y] = model.linears(y, [(hidden, eight, true)]);
    let y = model.norm(y, hidden, plus_one);
    model.add(y, 0.5);
    let x = model.norm(0, hidden, centred);
    let [gate, up] = model.linears(x, [(448, four, false), (448, four, false)]);
    let y = model.gate(gate, up, true);
    let [y] = model.linears(y, [(hidden, four, false)]);
    let y = model.norm(y, hidden, centred);
    model.add(y, 1.0);
    // One linear for queries, keys and values, and one for gate and up; nothing rotated; two readers of one norm.
    let x = model.norm(0, hidden, RMS);
    let [qkv] = model.linears(x, [(256 + 128, four, true)]);
    let parts = [256, 64, 64].map(|width| model.register(width));
    let op = StepOp::Split {
        from: qkv,
        to: parts.to_vec(),
    };
    model.push(op, Reference::Other);
    let y = model.attend(parts, dim, None, Scores::default());
    let [y] = model.linears(y, [(hidden, Stored::Dense, false)]);
    let [both] = model.linears(x, [(2 * 192, Stored::Dense, false)]);
    let halves = [192, 192].map(|width| model.register(width));
    let op = StepOp::Split {
        from: both,
        to: halves.to_vec(),
    };
    model.push(op, Reference::Other);
    let z = model.gate(halves[0], halves[1], false);
    let [z] = model.linears(z, [(hidden, Stored::Dense, false)]);
    model.add(y, 1.0);
    model.add(z, 1.0);
    let [up] = model.linears(0, [(hidden, Stored::Dense, false)]);
    model.add(up, 0.1);
    let x = model.norm(0, hidden, plus_one);
    model.logits(x, 0.5, Some(3.0));
    for start in [0, 95, 250] {
        let found = model.distance(start, 12);
        assert!(found < 12.0 * rounding::<E>(), "from {start}: {found}");
    }
}

#[test]
fn a_step_has_every_kind_of_norm_gate_and_attention() {
    steps_of_others::<f16>();
    steps_of_others::<bf16>();
}

#[test]
fn what_no_kernel_does_gives_no_step() {
    let Some(device) = device() else { return };
    let make = |stored, dim| {
        let mut model = Model::<f16>::new(256, 1.0, &device);
        model.program.tables.push(dim / 2);
        llama(&mut model, stored, [4, 4], dim, 512, false);
        model.logits(0, 1.0, None);
        Cuda::step(model.program).is_some()
    };
    assert!(make(Stored::Dense, 64));
    for dim in [32, 256] {
        assert!(!make(Stored::Dense, dim));
    }
    for bits in [Bits::Two, Bits::Three] {
        assert!(!make(Stored::Packed(bits, 128, false), 64));
    }
}
