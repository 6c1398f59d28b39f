//! Runs a model on windows of text, alone or beside its dense model, block by block.
//!
//! Perplexity is `exp` of the mean negative log-likelihood of every token except the first of each
//! window. With a dense model, the dense model rounded to nearest with the branch's settings also
//! runs on a share of the windows, as a baseline: the loss at these settings without any method.

use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_kernels::{Engine, map_lanes};
use gptq_model::{Block, Flow, Head, HostBlock, Model};
use gptq_plan::{BlockError, F16Range};
use gptq_spec::BlockSpec;

use crate::VerifyError;
use crate::nearest::{Setting, nearest};
use crate::range::{self, Magnitudes};
use crate::weights::{self, Strange};

/// Tokens run through a block at once.
const CHUNK: usize = 4096;
/// Rows of logits computed at once.
const LOGIT_ROWS: usize = 512;
/// One in this many windows is also run through the round-to-nearest model.
const SHARE: usize = 4;

/// Measurements on the text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TextResults {
    /// Mean negative log-likelihood of a token; not finite if the output is not.
    pub loss: f64,
    pub range: F16Range,
    pub dense: Option<DenseComparison>,
}

/// Comparison with the dense model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DenseComparison {
    /// Mean negative log-likelihood of a token of the dense model.
    pub loss: f64,
    pub kl_divergence: f64,
    pub top1_agreement: f64,
    pub blocks: Vec<BlockError>,
    /// Mean code width of the quantized weights; 16 if there are none.
    pub bits: f64,
    /// Round-to-nearest baseline, if anything is quantized.
    pub nearest: Option<Nearest>,
    /// Groups whose scale does not match the dense weights.
    pub strange: Vec<Strange>,
}

/// The dense model rounded to nearest with the branch's settings, on a share of the text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Nearest {
    pub tokens: usize,
    /// Mean negative log-likelihood of a token, and the dense model's on the same tokens.
    pub loss: f64,
    pub dense_loss: f64,
    pub kl_divergence: f64,
    pub top1_agreement: f64,
}

/// Quantization settings of a block's linear layer.
struct Quantized {
    /// Index in the block's spec, and module name.
    linear: usize,
    module: String,
    setting: Setting,
    g_idx: Vec<i32>,
    in_features: usize,
}

/// Runs `windows`, all of the same length of at least 2, through `model` and, in the same pass and
/// dtype, through `dense`. One block of each is resident at a time, and the hidden states of all
/// windows. `on_progress` receives the finished share of the work.
pub(crate) fn measure<B: Engine>(
    model: &Model<B>,
    dense: Option<&Model<B>>,
    windows: &[Vec<u32>],
    on_progress: &mut dyn FnMut(f64),
) -> Result<TextResults, VerifyError> {
    let window = windows.first().map_or(1, Vec::len).max(1);
    let per_chunk = (CHUNK / window).max(1);
    let mut flows = model.embed(windows, per_chunk, model.dtype())?;
    let mut range = F16Range::default();
    let mut beside = dense
        .map(|dense| Beside::start(model, dense, windows, per_chunk))
        .transpose()?;
    // Weighted by parameters: a head with a large vocabulary may take as much work as many blocks.
    let config = model.config();
    let head_work = config.vocabulary as f64 * config.hidden_size as f64;
    let block_work = |spec: &BlockSpec| spec.parameters() as f64;
    let all_work = config
        .blocks()
        .iter()
        .map(|spec| block_work(spec))
        .sum::<f64>()
        + head_work;
    let mut work = 0.0;
    for (layer, spec) in config.blocks().iter().enumerate() {
        let host = model.read_block(layer)?;
        let quantized = match &beside {
            Some(_) => quantized(model, &host, layer)?,
            None => Vec::new(),
        };
        let block = model.upload(host);
        let mut magnitudes = Magnitudes::default();
        let ran = map_lanes::<B, _, _>(flows, |flow| Magnitudes::of(&block, flow));
        let ran = ran.into_iter().map(|(flow, found)| {
            magnitudes.merge(found);
            flow
        });
        flows = ran.collect();
        let dense_readings = match &mut beside {
            Some(beside) => beside.block(layer, &block, &quantized, magnitudes.overflow())?,
            None => None,
        };
        range::add(
            &mut range,
            Some(layer),
            &magnitudes,
            dense_readings.as_ref(),
        );
        work += block_work(spec);
        on_progress(work / all_work);
    }
    let head = model.head()?;
    let mut sums = ModelSums::default();
    let mut magnitudes = Magnitudes::default();
    let chunks = windows.chunks(per_chunk);
    let chunk_work = head_work / chunks.len() as f64;
    for (at, chunk) in chunks.enumerate() {
        let Some(flow) = flows.get(at) else { break };
        let others = beside.as_ref().map(|beside| beside.at(at));
        sums.add(&head, flow, others, chunk, &mut magnitudes);
        work += chunk_work;
        on_progress(work / all_work);
    }
    range::add(&mut range, None, &magnitudes, None);
    Ok(TextResults {
        loss: sums.own.mean(sums.own.loss),
        range,
        dense: beside.map(|beside| sums.compared(beside)),
    })
}

/// Returns the quantized linear layers of a block.
fn quantized<B: Engine>(
    model: &Model<B>,
    block: &HostBlock,
    layer: usize,
) -> Result<Vec<Quantized>, VerifyError> {
    let Some(config) = model.checkpoint().quantize_config() else {
        return Ok(Vec::new());
    };
    let linears = model.config().block(layer).linears().iter().enumerate();
    let packed = linears.filter_map(|(linear, spec)| Some((linear, spec, block.packed(linear)?)));
    packed
        .map(|(linear, spec, packed)| {
            let module = spec.module(layer);
            let own = config.module(&module)?;
            Ok(Quantized {
                linear,
                setting: Setting {
                    bits: packed.bits,
                    group_size: own.map_or(config.group_size, |(_, group_size)| group_size),
                    sym: config.sym,
                },
                g_idx: packed.g_idx.clone(),
                in_features: packed.in_features,
                module,
            })
        })
        .collect()
}

/// The dense model that runs beside the verified one.
struct Beside<'a, B: Engine> {
    model: &'a Model<B>,
    head: Head<B>,
    flows: Vec<Flow<B>>,
    /// Inputs of the round-to-nearest model: the first windows of each chunk; `None` for a chunk
    /// whose predecessors already cover the share, and if nothing is quantized.
    rounded: Vec<Option<Flow<B>>>,
    blocks: Vec<BlockError>,
    strange: Vec<Strange>,
    /// Total code bits of the quantized weights, and their number.
    codes: [f64; 2],
}

impl<'a, B: Engine> Beside<'a, B> {
    fn start(
        judged: &Model<B>,
        model: &'a Model<B>,
        windows: &[Vec<u32>],
        per_chunk: usize,
    ) -> Result<Self, VerifyError> {
        let flows = model.embed(windows, per_chunk, model.dtype())?;
        let quantized = judged.checkpoint().quantize_config().is_some();
        let mut seen: usize = 0;
        let rounded = flows.iter().map(|flow| {
            let before = seen.div_ceil(SHARE);
            seen += flow.windows;
            let share = seen.div_ceil(SHARE) - before;
            first(flow, if quantized { share } else { 0 })
        });
        Ok(Beside {
            rounded: rounded.collect(),
            head: model.head()?,
            model,
            flows,
            blocks: Vec::new(),
            strange: Vec::new(),
            codes: [0.0; 2],
        })
    }

    /// Runs block `layer`; returns its magnitudes if `read`.
    fn block(
        &mut self,
        layer: usize,
        judged: &Block<B>,
        quantized: &[Quantized],
        read: bool,
    ) -> Result<Option<Magnitudes>, VerifyError> {
        let dense = self.model.block(layer)?;
        let mut nearby = dense.clone();
        for linear in quantized {
            let at = linear.linear;
            let weight = |block: &Block<B>| block.linear(at).weight.dense(self.model.dtype());
            let (right, found) = (weight(&dense), weight(judged));
            let weights = right.dims().iter().product::<usize>() as f64;
            let bits = linear.setting.bits.get() as f64;
            self.codes = [self.codes[0] + bits * weights, self.codes[1] + weights];
            let group_size = linear.setting.group_size;
            let columns = group_size.columns(linear.in_features);
            let groups = group_size.groups(linear.in_features);
            let sums = weights::sums(right.clone(), found, &linear.g_idx, columns);
            let strange = weights::strange(linear.module.clone(), sums, groups);
            self.strange.extend(strange);
            nearby.set_weight(at, nearest(right, linear.setting));
        }
        let flows = std::mem::take(&mut self.flows).into_iter();
        let both = flows.zip(std::mem::take(&mut self.rounded)).collect();
        let ran = map_lanes::<B, _, _>(both, |(flow, rounded): (Flow<B>, Option<Flow<B>>)| {
            let (right, magnitudes) = match read {
                true => Magnitudes::of(&dense, flow.clone()),
                false => (dense.forward(flow.clone()), Magnitudes::default()),
            };
            let mut energies = Energies {
                found: energy(&judged.forward(flow.clone()), &right),
                whole: energy(&right, &flow),
                ..Energies::default()
            };
            let rounded = rounded.map(|rounded| {
                let share = |flow: &Flow<B>| first(flow, rounded.windows);
                if let (Some(flow), Some(right)) = (share(&flow), share(&right)) {
                    energies.share = energy(&right, &flow);
                    energies.nearest = energy(&nearby.forward(flow), &right);
                }
                nearby.forward(rounded)
            });
            (right, rounded, energies, magnitudes)
        });
        let mut sum = Energies::default();
        let mut all = Magnitudes::default();
        for (flow, rounded, energies, magnitudes) in ran {
            self.flows.push(flow);
            self.rounded.push(rounded);
            sum.add(energies);
            all.merge(magnitudes);
        }
        self.blocks.push(sum.error(layer));
        Ok(read.then_some(all))
    }

    /// Returns the inputs of the head for a chunk.
    fn at(&self, chunk: usize) -> Others<'_, B> {
        Others {
            head: &self.head,
            dense: self.flows.get(chunk),
            rounded: self.rounded.get(chunk).and_then(Option::as_ref),
        }
    }
}

/// Returns the first `windows` windows; `None` if that is zero.
fn first<B: Engine>(flow: &Flow<B>, windows: usize) -> Option<Flow<B>> {
    let tokens = flow.residual.dims()[0] / flow.windows.max(1) * windows;
    let states = || flow.residual.clone().narrow(0, 0, tokens);
    (windows > 0).then(|| Flow::new(windows, states()))
}

/// Squared norms, summed over tokens.
#[derive(Clone, Copy, Debug, Default)]
struct Energies {
    /// `‖B̂(x) - B(x)‖²` and `‖B(x) - x‖²`.
    found: f64,
    whole: f64,
    /// The same two for the block rounded to nearest, on its share of the text.
    nearest: f64,
    share: f64,
}

impl Energies {
    fn add(&mut self, other: Energies) {
        self.found += other.found;
        self.whole += other.whole;
        self.nearest += other.nearest;
        self.share += other.share;
    }

    fn error(&self, layer: usize) -> BlockError {
        BlockError::new(layer, [self.found, self.whole], [self.nearest, self.share])
    }
}

/// Returns `‖a - b‖²` of hidden states.
fn energy<B: Engine>(a: &Flow<B>, b: &Flow<B>) -> f64 {
    let wide = |flow: &Flow<B>| flow.residual.clone().cast(DType::F32);
    let difference = wide(a) - wide(b);
    let sum = (difference.clone() * difference).sum();
    sum.into_data().iter::<f64>().sum()
}

/// Hidden states that run beside the verified model, before the head.
struct Others<'a, B: Engine> {
    head: &'a Head<B>,
    dense: Option<&'a Flow<B>>,
    rounded: Option<&'a Flow<B>>,
}

/// Sums over scored tokens for one model compared with the dense one.
#[derive(Clone, Copy, Debug, Default)]
struct TokenSums {
    tokens: usize,
    loss: f64,
    /// Negative log-likelihood of the dense model on the same tokens.
    dense_loss: f64,
    divergence: f64,
    agreed: usize,
}

impl TokenSums {
    /// Adds the comparison of `logits` with the dense model's, `[targets, vocabulary]` each.
    fn add<B: Engine>(&mut self, logits: Tensor<B, 2>, right: Tensor<B, 2>, targets: &[u32]) {
        let ids: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
        let data = TensorData::new(ids, [targets.len()]);
        let targets = Tensor::<B, 1, Int>::from_data(data, (&logits.device(), DType::I32));
        self.tokens += targets.dims()[0];
        let compared = B::compare_logits(logits, right, targets).into_data();
        let values: Vec<f64> = compared.iter().collect();
        for row in values.chunks_exact(4) {
            let &[loss, dense_loss, divergence, agreed] = row else {
                continue;
            };
            self.loss += loss;
            self.dense_loss += dense_loss;
            self.divergence += divergence;
            self.agreed += agreed as usize;
        }
    }

    /// Returns the mean per token.
    fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens as f64
    }
}

/// Sums for the verified model and for the round-to-nearest baseline.
#[derive(Default)]
struct ModelSums {
    own: TokenSums,
    nearest: TokenSums,
}

impl ModelSums {
    fn add<B: Engine>(
        &mut self,
        head: &Head<B>,
        flow: &Flow<B>,
        others: Option<Others<'_, B>>,
        windows: &[Vec<u32>],
        magnitudes: &mut Magnitudes,
    ) {
        for (i, tokens) in windows.iter().enumerate() {
            let window = tokens.len();
            // Position p predicts token p + 1.
            let all = tokens.get(1..).unwrap_or_default();
            for (piece, targets) in all.chunks(LOGIT_ROWS).enumerate() {
                let start = i * window + piece * LOGIT_ROWS;
                let rows = start..start + targets.len();
                let logits = |head: &Head<B>, flow: &Flow<B>| {
                    head.logits(flow.residual.clone().slice([rows.clone()]))
                };
                let own = logits(head, flow);
                magnitudes.read("logits", own.clone());
                let right = others.as_ref().and_then(|it| Some((it.head, it.dense?)));
                let Some((dense_head, dense)) = right else {
                    // Its own reference: only its loss is asked for.
                    self.own.add(own.clone(), own, targets);
                    continue;
                };
                let right = logits(dense_head, dense);
                self.own.add(own, right.clone(), targets);
                let rounded = others.as_ref().and_then(|others| others.rounded);
                if let Some(flow) = rounded.filter(|flow| i < flow.windows) {
                    self.nearest.add(logits(dense_head, flow), right, targets);
                }
            }
        }
    }

    fn compared<B: Engine>(&self, beside: Beside<'_, B>) -> DenseComparison {
        let ModelSums { own, nearest } = self;
        DenseComparison {
            loss: own.mean(own.dense_loss),
            kl_divergence: own.mean(own.divergence),
            top1_agreement: own.mean(own.agreed as f64),
            bits: match beside.codes {
                [_, 0.0] => 16.0,
                [bits, weights] => bits / weights,
            },
            blocks: beside.blocks,
            strange: beside.strange,
            nearest: (nearest.tokens > 0).then(|| Nearest {
                tokens: nearest.tokens,
                loss: nearest.mean(nearest.loss),
                dense_loss: nearest.mean(nearest.dense_loss),
                kl_divergence: nearest.mean(nearest.divergence),
                top1_agreement: nearest.mean(nearest.agreed as f64),
            }),
        }
    }
}
