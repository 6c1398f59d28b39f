//! Texts through a model, block by block: one block is resident at a time, and the hidden states of as many texts as fit.

use std::sync::mpsc::sync_channel;
use std::thread;

use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_eval::ChoiceRequest;
use gptq_kernels::{Engine, map_lanes};
use gptq_model::{Cache, Flow, Head, Model, StretchLayout};
use gptq_spec::Rope;

use crate::LikelihoodError;
use crate::chunks::{Bundle, Chunks};
use crate::forest::Forest;

/// Bytes of hidden states that are held at once; every block is read again for as many more.
const STATES: usize = 2 << 30;

/// Rows of logits computed at once.
const LOGIT_ROWS: usize = 512;

/// Something to predict: a token, from a row of a chunk.
#[derive(Clone, Copy, Debug)]
struct Prediction {
    row: usize,
    token: u32,
    request: usize,
}

/// Chunks that share a cache, on the device.
struct Running<B: Engine> {
    flows: Vec<Flow<B>>,
    layouts: Vec<StretchLayout<B>>,
}

/// A model, what was done with it and what is left.
pub(crate) struct LikelihoodPass<'a, B: Engine> {
    model: &'a Model<B>,
    head: Option<Head<B>>,
    /// Sums of the requests so far.
    sums: Vec<f64>,
    /// Tokens that have been through all blocks, and all tokens.
    done: usize,
    all: usize,
    on_progress: &'a mut dyn FnMut(f64),
}

/// Requests whose rotary frequencies are the same, as they lie in chunks.
struct RequestGroup {
    longest: usize,
    bundles: Vec<(Bundle, Vec<Vec<Prediction>>)>,
}

impl<'a, B: Engine> LikelihoodPass<'a, B> {
    /// Returns the log-likelihood of each request's last tokens.
    pub(crate) fn run(
        model: &'a Model<B>,
        requests: &[ChoiceRequest],
        on_progress: &'a mut dyn FnMut(f64),
    ) -> Result<Vec<f64>, LikelihoodError> {
        let groups: Vec<RequestGroup> = alike(model, requests)
            .into_iter()
            .map(|indices| RequestGroup::new::<B>(requests, &indices))
            .collect();
        let mut pass = LikelihoodPass {
            model,
            head: None,
            sums: vec![0.0; requests.len()],
            done: 0,
            all: groups.iter().map(RequestGroup::tokens).sum(),
            on_progress,
        };
        for group in groups {
            pass.group(group)?;
        }
        match pass.sums.iter().all(|sum| sum.is_finite()) {
            true => Ok(pass.sums),
            false => Err(LikelihoodError::NonFinite {
                dir: model.checkpoint().dir().into(),
            }),
        }
    }

    fn group(&mut self, group: RequestGroup) -> Result<(), LikelihoodError> {
        let hidden = self.model.config().hidden_size * self.model.dtype().size();
        let most = (STATES / hidden.max(1)).max(1);
        let (mut slab, mut held) = (Vec::new(), 0);
        for bundle in group.bundles {
            let tokens = tokens(&bundle.0);
            if held > 0 && held + tokens > most {
                self.slab(std::mem::take(&mut slab), group.longest)?;
                held = 0;
            }
            held += tokens;
            slab.push(bundle);
        }
        self.slab(slab, group.longest)
    }

    /// Runs bundles whose hidden states are held together.
    fn slab(
        &mut self,
        bundles: Vec<(Bundle, Vec<Vec<Prediction>>)>,
        longest: usize,
    ) -> Result<(), LikelihoodError> {
        let (model, device) = (self.model, self.model.device());
        let own: usize = bundles.iter().map(|(bundle, _)| tokens(bundle)).sum();
        let inputs = bundles.iter().flat_map(|(bundle, _)| bundle);
        let inputs: Vec<Vec<u32>> = inputs.map(|chunk| chunk.tokens.clone()).collect();
        // Each chunk is one window.
        let mut flows = model.embed(&inputs, 1, model.dtype())?.into_iter();
        let mut running: Vec<Running<B>> = Vec::new();
        let mut targets = Vec::new();
        for (bundle, own) in bundles {
            let layouts = bundle.iter();
            let layouts = layouts.map(|it| StretchLayout::new(&it.stretches, longest, device));
            running.push(Running {
                flows: flows.by_ref().take(bundle.len()).collect(),
                layouts: layouts.collect(),
            });
            targets.extend(own);
        }
        let layers = model.config().layers;
        thread::scope(|scope| {
            let (sender, blocks) = sync_channel(0);
            scope.spawn(move || {
                // A pass that has failed receives no more.
                (0..layers).try_for_each(|layer| sender.send(model.read_block(layer)).ok());
            });
            for (layer, block) in blocks.iter().enumerate() {
                let block = model.upload(block?);
                running = map_lanes::<B, _, _>(std::mem::take(&mut running), |bundle| {
                    let mut cache = Cache::new(block.spec(), model.dtype(), device);
                    let both = bundle.flows.into_iter().zip(&bundle.layouts);
                    let flows = both
                        .map(|(flow, layout)| block.forward_stretches(flow, layout, &mut cache));
                    Running {
                        flows: flows.collect(),
                        layouts: bundle.layouts,
                    }
                });
                wait(&running);
                let share = (layer + 1) as f64 / layers as f64;
                let done = self.done as f64 + share * own as f64;
                (self.on_progress)(done / self.all as f64);
            }
            Ok::<_, LikelihoodError>(())
        })?;
        self.done += own;
        let head = match self.head.take() {
            Some(head) => head,
            None => model.head()?,
        };
        let flows = running.into_iter().flat_map(|it| it.flows);
        for (flow, targets) in flows.zip(targets) {
            self.score(&head, &flow, targets);
        }
        self.head = Some(head);
        Ok(())
    }

    /// Adds the log-likelihoods of a chunk's targets.
    fn score(&mut self, head: &Head<B>, flow: &Flow<B>, mut targets: Vec<Prediction>) {
        targets.sort_by_key(|target| target.row);
        let by_row: Vec<&[Prediction]> = targets.chunk_by(|a, b| a.row == b.row).collect();
        for rows in by_row.chunks(head.rows_at_once().min(LOGIT_ROWS)) {
            let ids: Vec<i32> = rows.iter().map(|row| row[0].row as i32).collect();
            let data = TensorData::new(ids, [rows.len()]);
            let ids = Tensor::<B, 1, Int>::from_data(data, (self.model.device(), DType::I32));
            let hidden = B::embed(ids, flow.residual.clone());
            let wanted = rows.iter().enumerate();
            let wanted = wanted.flat_map(|(at, row)| row.iter().map(move |it| (at, it.token)));
            let wanted: Vec<(usize, u32)> = wanted.collect();
            let found = head.log_likelihoods(hidden, &wanted);
            for (target, found) in rows.iter().copied().flatten().zip(found) {
                self.sums[target.request] += f64::from(found);
            }
        }
    }
}

impl RequestGroup {
    /// Makes chunks of the requests `indices`.
    fn new<B: Engine>(requests: &[ChoiceRequest], indices: &[usize]) -> RequestGroup {
        let texts: Vec<&[u32]> = (indices.iter())
            .map(|index| input(&requests[*index]))
            .collect();
        let forest = Forest::grow(&texts);
        let Chunks { bundles, places } = Chunks::cut(&forest, &texts, B::CHUNK_TOKENS);
        let mut targets: Vec<Vec<Vec<Prediction>>> = (bundles.iter())
            .map(|bundle| bundle.iter().map(|_| Vec::new()).collect())
            .collect();
        for (text, &request) in indices.iter().enumerate() {
            let ChoiceRequest { tokens, scored } = &requests[request];
            for position in texts[text].len() - scored..texts[text].len() {
                let node = forest.holding(text, position);
                let place = places[node];
                targets[place.bundle][place.chunk].push(Prediction {
                    row: place.row + position - forest.nodes[node].start,
                    token: tokens[position + 1],
                    request,
                });
            }
        }
        RequestGroup {
            longest: texts.iter().map(|it| it.len()).max().unwrap_or_default(),
            bundles: bundles.into_iter().zip(targets).collect(),
        }
    }

    fn tokens(&self) -> usize {
        self.bundles.iter().map(|(bundle, _)| tokens(bundle)).sum()
    }
}

/// Input of the model for a request: all but the last token, which nothing follows.
fn input(request: &ChoiceRequest) -> &[u32] {
    &request.tokens[..request.tokens.len() - 1]
}

fn tokens(bundle: &Bundle) -> usize {
    bundle.iter().map(|chunk| chunk.tokens.len()).sum()
}

/// Groups requests, by their indices, whose lengths have the same rotary frequencies.
fn alike<B: Engine>(model: &Model<B>, requests: &[ChoiceRequest]) -> Vec<Vec<usize>> {
    let config = model.config();
    let ropes: [&Rope; 2] = [&config.rope, &config.sliding_rope];
    let len = |index: &usize| input(&requests[*index]).len();
    let mut order: Vec<usize> = (0..requests.len()).collect();
    // Where nothing is to be predicted, nothing is run.
    order.retain(|index| requests[*index].scored > 0);
    order.sort_by_key(len);
    let agree = |a: &usize, b: &usize| {
        let agrees = |rope: &&Rope| rope.scaling.agrees(len(a), len(b));
        ropes.iter().all(agrees)
    };
    order.chunk_by(agree).map(<[usize]>::to_vec).collect()
}

/// Waits for the device, so that it is never more than a block behind.
fn wait<B: Engine>(running: &[Running<B>]) {
    let last = running.last().and_then(|bundle| bundle.flows.last());
    if let Some(flow) = last {
        flow.residual.clone().narrow(0, 0, 1).into_data();
    }
}
