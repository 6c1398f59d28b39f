//! Weights of a tap that rank 0 has by itself, of an interrupted run or tuned, sent to the others.

use burn::tensor::{DType, Tensor};
use gptq_format::QuantizedLinear;
use gptq_kernels::Engine;
use gptq_model::Block;
use gptq_plan::{Plan, PlannedLinear};

use crate::RunError;
use crate::block_loop::At;
use crate::peers::Peers;
use crate::row_parts;
use crate::solve_shares::{receive_weights, send_weights};

/// Sends a tap's linears from rank 0, weights `[out, in]` and a function that gives their codes: from device to device the
/// weights, by messages the codes. There is nothing to send if there is no other rank.
///
/// # Errors
/// The end of the run on another rank, or a failure of the link.
pub(crate) fn send_tap<B: Engine>(
    linears: impl Iterator<Item = (Tensor<B, 2>, impl FnOnce() -> QuantizedLinear)>,
    peers: &Peers<'_, B>,
) -> Result<(), RunError> {
    match peers.link {
        _ if peers.share().size == 1 => Ok(()),
        Some(link) => send_weights(linears.map(|it| it.0).collect(), link, peers),
        None => Ok(row_parts::send(linears.map(|it| (it.1)()), peers.ranks)?),
    }
}

/// Gives `block` the weights of the linears of a tap that a branch quantizes, which rank 0 sends by [`send_tap`].
///
/// # Errors
/// The end of the run on another rank, or a failure of the link.
pub(crate) fn receive_tap<B: Engine>(
    plan: &Plan,
    at: At,
    block: &mut Block<B>,
    (dtype, device): (DType, &B::Device),
    peers: &Peers<'_, B>,
) -> Result<(), RunError> {
    let linears = planned(plan, at);
    if linears.is_empty() {
        return Ok(());
    }
    let weights = match peers.link {
        Some(link) => receive_weights(&linears, dtype, link, peers)?,
        None => row_parts::receive(linears.iter(), (dtype, device), peers.ranks)?,
    };
    for (linear, weight) in weights {
        block.set_weight(linear, weight);
    }
    Ok(())
}

/// The linears at a tap that a branch quantizes.
fn planned(plan: &Plan, at: At) -> Vec<PlannedLinear> {
    let spec = plan.config.block(at.layer);
    let planned =
        |linear| plan.branches[at.branch].planned(at.layer, linear, &spec.linears()[linear]);
    spec.linears_of(at.tap).filter_map(planned).collect()
}
