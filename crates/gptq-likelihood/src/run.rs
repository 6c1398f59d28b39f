//! Requests to a model on a device.

use std::path::Path;

use gptq_eval::ChoiceRequest;
use gptq_kernels::{Device, Engine, Work};
use gptq_model::Model;

use crate::LikelihoodError;
use crate::pass::LikelihoodPass;

/// Loads the checkpoint in `dir`, dense or quantized, and returns the log-likelihood of each request: the sum of `ln p` of its
/// scored tokens, each after all tokens before it; 0 where there is none. What requests begin with alike is run once. `on_progress` receives the
/// finished share of the work, 0 to 1.
///
/// # Errors
/// A checkpoint that cannot be run, or an output that is not finite.
pub fn log_likelihoods(
    dir: &Path,
    device: Device,
    requests: &[ChoiceRequest],
    on_progress: &mut dyn FnMut(f64),
) -> Result<Vec<f64>, LikelihoodError> {
    device.resolve()?.run(Likelihoods {
        dir,
        requests,
        on_progress,
    })?
}

struct Likelihoods<'a> {
    dir: &'a Path,
    requests: &'a [ChoiceRequest],
    on_progress: &'a mut dyn FnMut(f64),
}

impl Work for Likelihoods<'_> {
    type Output = Result<Vec<f64>, LikelihoodError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let model = Model::<B>::open(self.dir, &device)?;
        LikelihoodPass::run(&model, self.requests, self.on_progress)
    }
}
