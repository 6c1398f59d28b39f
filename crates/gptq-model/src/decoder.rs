//! A whole model on a device for generation, token by token.

use burn::tensor::DType;
use gptq_kernels::Engine;
use gptq_spec::{ModelConfig, Rope};

use crate::model::{Embedding, check_tokens};
use crate::step::ModelStep;
use crate::{Block, Cache, Head, Model, ModelError};

/// All blocks resident on a device, each with its cache.
pub struct Decoder<B: Engine> {
    config: ModelConfig,
    dtype: DType,
    embedding: Embedding<B>,
    blocks: Vec<(Block<B>, Cache<B>)>,
    head: Head<B>,
    /// Takes one token through all of it at once, where the engine has that.
    step: Option<ModelStep<B>>,
    /// Tokens whose keys and values are cached.
    held: Vec<u32>,
}

impl<B: Engine> Decoder<B> {
    /// Loads every part of `model`.
    pub fn load(model: &Model<B>) -> Result<Self, ModelError> {
        let config = model.config();
        let block = |layer| {
            let cache = Cache::new(config.block(layer), model.dtype(), model.device());
            Ok::<_, ModelError>((model.resident_block(layer)?, cache))
        };
        let (embedding, head) = (model.embedding()?, model.head()?);
        let blocks: Vec<_> = (0..config.layers).map(block).collect::<Result<_, _>>()?;
        Ok(Decoder {
            config: config.clone(),
            dtype: model.dtype(),
            step: ModelStep::of(&embedding, blocks.iter().map(|it| &it.0), &head),
            embedding,
            blocks,
            head,
            held: Vec::new(),
        })
    }

    /// Returns how many of the first tokens of `context` are cached and need not be run again.
    pub fn reusable(&self, context: &[u32]) -> usize {
        // In a text so long that frequencies change, keys that were rotated before are others.
        let ropes = [&self.config.rope, &self.config.sliding_rope];
        let agrees = |rope: &&Rope| rope.scaling.agrees(self.held.len(), context.len());
        if !ropes.iter().all(agrees) {
            return 0;
        }
        let pairs = self.held.iter().zip(context);
        let common = pairs.take_while(|(held, token)| held == token).count();
        // The last token gives the prediction, so it is always run.
        common.min(context.len().saturating_sub(1))
    }

    /// Returns the logits `[vocabulary]` of the token after `context`, which must not be empty.
    /// Only the part that differs from the last call is run, all at once.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub fn next_logits(&mut self, context: &[u32]) -> Result<Vec<f32>, ModelError> {
        let start = self.reusable(context);
        let new = context[start..].to_vec();
        let n = new.len();
        if let (&[token], Some(step)) = (new.as_slice(), &mut self.step) {
            check_tokens([token].iter(), self.config.vocabulary)?;
            let caches = self.blocks.iter_mut().map(|(_, cache)| {
                cache.truncate(start);
                cache.next()
            });
            let logits = step.run(token, start, caches.collect());
            self.held.truncate(start);
            self.held.push(token);
            return Ok(logits);
        }
        let mut flow = self.embedding.flow(&[new], self.dtype)?;
        for (block, cache) in &mut self.blocks {
            cache.truncate(start);
            flow = block.forward_cached(flow, cache);
        }
        self.held.truncate(start);
        self.held.extend_from_slice(&context[start..]);
        let last = flow.residual.narrow(0, n - 1, 1);
        let logits = self.head.logits(last).into_data();
        Ok(logits.to_vec::<f32>().expect("the logits are f32"))
    }
}
