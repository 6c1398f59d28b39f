//! A model on windows of text, alone or beside the dense model it came from, block by block.
//!
//! Perplexity is `exp` of the mean negative log-likelihood of every token of every window but the
//! window's first.

use burn::tensor::{DType, Int, Tensor, TensorData, activation::log_softmax};
use gptq_kernels::{Engine, map_lanes};
use gptq_model::{Flow, Head, Model};

use crate::{BlockError, VerifyError};

/// Tokens run through a block together.
const CHUNK: usize = 4096;
/// Rows of logits alive together.
const LOGIT_ROWS: usize = 512;

/// What the text showed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Measured {
    pub perplexity: f64,
    pub dense: Option<Compared>,
}

/// Against the dense model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Compared {
    pub perplexity: f64,
    pub kl_divergence: f64,
    pub top1_agreement: f64,
    pub blocks: Vec<BlockError>,
}

/// Runs `windows`, all of one length of at least 2, through `model`, and through `dense`, taken in the
/// same type, in the same pass. One block of each is resident at a time; the hidden states of all windows are. `on_block` is
/// told the number of blocks done.
pub(crate) fn measure<B: Engine>(
    model: &Model<B>,
    dense: Option<&Model<B>>,
    windows: &[Vec<u32>],
    on_block: &mut dyn FnMut(usize),
) -> Result<Measured, VerifyError> {
    let window = windows.first().map_or(1, Vec::len).max(1);
    let per_chunk = (CHUNK / window).max(1);
    let mut flows = model.embed(windows, per_chunk, model.dtype())?;
    let mut dense_flows = match dense {
        Some(dense) => dense.embed(windows, per_chunk, dense.dtype())?,
        None => Vec::new(),
    };
    let mut blocks = Vec::new();
    for layer in 0..model.config().layers {
        let block = model.block(layer)?;
        flows = map_lanes::<B, _, _>(flows, |flow| block.forward(flow));
        if let Some(dense) = dense {
            let dense = dense.block(layer)?;
            let ran = map_lanes::<B, _, _>(dense_flows, |flow| {
                let right = dense.forward(flow.clone());
                let found = block.forward(flow.clone());
                let error = energy(&found, &right);
                (error, energy(&right, &flow), right)
            });
            let total = |part: fn(&(f64, f64, Flow<B>)) -> f64| ran.iter().map(part).sum::<f64>();
            blocks.push(BlockError {
                layer,
                relative_error: total(|r| r.0) / total(|r| r.1),
            });
            dense_flows = ran.into_iter().map(|(_, _, flow)| flow).collect();
        }
        on_block(layer + 1);
    }
    let heads = (model.head()?, dense.map(Model::head).transpose()?);
    let mut sums = Sums::default();
    let mut dense_flows = dense_flows.into_iter();
    for (flow, chunk) in flows.into_iter().zip(windows.chunks(per_chunk)) {
        let beside = heads.1.as_ref().zip(dense_flows.next());
        sums.add(
            &heads.0,
            &flow,
            beside.as_ref().map(|(h, f)| (*h, f)),
            chunk,
        );
    }
    let n = sums.tokens as f64;
    let measured = Measured {
        perplexity: (sums.loss / n).exp(),
        dense: dense.map(|_| Compared {
            perplexity: (sums.dense_loss / n).exp(),
            kl_divergence: sums.divergence / n,
            top1_agreement: sums.agreed as f64 / n,
            blocks,
        }),
    };
    match measured.perplexity.is_finite() {
        true => Ok(measured),
        false => Err(VerifyError::NonFiniteOutput {
            dir: model.checkpoint().dir().into(),
        }),
    }
}

/// `‖a - b‖²` of hidden states.
fn energy<B: Engine>(a: &Flow<B>, b: &Flow<B>) -> f64 {
    let wide = |flow: &Flow<B>| flow.residual.clone().cast(DType::F32);
    let difference = wide(a) - wide(b);
    let sum = (difference.clone() * difference).sum();
    sum.into_data().iter::<f64>().sum()
}

/// Sums over scored tokens.
#[derive(Default)]
struct Sums {
    tokens: usize,
    loss: f64,
    dense_loss: f64,
    divergence: f64,
    agreed: usize,
}

impl Sums {
    fn add<B: Engine>(
        &mut self,
        head: &Head<B>,
        flow: &Flow<B>,
        dense: Option<(&Head<B>, &Flow<B>)>,
        windows: &[Vec<u32>],
    ) {
        for (i, tokens) in windows.iter().enumerate() {
            let window = tokens.len();
            // Position p predicts token p + 1.
            let all = tokens.get(1..).unwrap_or_default();
            for (piece, targets) in all.chunks(LOGIT_ROWS).enumerate() {
                let start = i * window + piece * LOGIT_ROWS;
                let rows = start..start + targets.len();
                let log_p = |head: &Head<B>, flow: &Flow<B>| {
                    let states = flow.residual.clone().slice([rows.clone()]);
                    log_softmax(head.logits(states), 1)
                };
                let found = log_p(head, flow);
                self.tokens += targets.len();
                self.loss += loss(found.clone(), targets);
                let Some((head, flow)) = dense else { continue };
                let right = log_p(head, flow);
                self.dense_loss += loss(right.clone(), targets);
                let divergence = right.clone().exp() * (right.clone() - found.clone());
                self.divergence += floats(divergence.sum_dim(1)).sum::<f64>();
                let agreed = right.argmax(1).equal(found.argmax(1)).int().sum();
                self.agreed += agreed.into_data().iter::<i64>().sum::<i64>() as usize;
            }
        }
    }
}

/// The sum of the targets' negative log-likelihoods, given `[targets, vocabulary]`.
fn loss<B: Engine>(log_p: Tensor<B, 2>, targets: &[u32]) -> f64 {
    let ids: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
    let ids = Tensor::<B, 2, Int>::from_data(
        TensorData::new(ids, [targets.len(), 1]),
        (&log_p.device(), DType::I32),
    );
    -floats(log_p.gather(1, ids)).sum::<f64>()
}

fn floats<B: Engine>(x: Tensor<B, 2>) -> impl Iterator<Item = f64> {
    let values: Vec<f64> = x.into_data().iter().collect();
    values.into_iter()
}
