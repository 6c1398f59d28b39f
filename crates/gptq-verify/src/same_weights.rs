//! Compares an exported branch with the one it was made from: every weight is to be the same to the bit.

use std::path::Path;

use gptq_format::{Checkpoint, FormatError, PackedLinear};
use gptq_plan::Check;
use gptq_spec::{Census, ModelTensor, Role};
use rayon::prelude::*;

use crate::VerifyError;

/// Compares the dequantized weights of linear layers, and all other tensors.
///
/// # Errors
/// A `branch` that is not a sound checkpoint.
pub(crate) fn same_weights(census: &Census, branch: &Path) -> Result<Check, VerifyError> {
    let (config, other) = Census::take(branch)?.sound()?;
    let tensors = config.tensors();
    let differs = (tensors.par_iter()).find_map_first(|tensor| {
        match same(tensor, &census.checkpoint, &other) {
            Ok(true) => None,
            Ok(false) => Some(format!(
                "{} differs from that of {}",
                tensor.name,
                branch.display()
            )),
            Err(error) => Some(error.to_string()),
        }
    });
    Ok(Check {
        name: "same weights".into(),
        pass: differs.is_none(),
        detail: differs.unwrap_or_else(|| {
            let count = tensors.len();
            format!(
                "{count} tensors are to the bit those of {}",
                branch.display()
            )
        }),
    })
}

fn same(tensor: &ModelTensor, one: &Checkpoint, other: &Checkpoint) -> Result<bool, FormatError> {
    let module = tensor.module();
    if let (Role::Linear, &[n_out, n_in]) = (tensor.role, tensor.shape.as_slice()) {
        match (
            one.packed(module, n_in, n_out)?,
            other.packed(module, n_in, n_out)?,
        ) {
            (Some(one), Some(other)) => return Ok(one == other || weights(&one) == weights(&other)),
            (None, None) => {}
            _ => return Ok(false),
        }
    }
    let (left, right) = (one.view(&tensor.name)?, other.view(&tensor.name)?);
    let same = left.shape == right.shape && left.same_values(&right);
    one.give_back(&tensor.name);
    other.give_back(&tensor.name);
    Ok(same)
}

/// Returns the bits of the dequantized weights.
fn weights(linear: &PackedLinear) -> Vec<u32> {
    let weights = linear.unpack().dequantize();
    weights.into_iter().map(f32::to_bits).collect()
}
