//! Logits of the f32 forward against another program's.

use std::path::Path;

use anyhow::{Context, ensure};
use burn::tensor::DType;
use gptq_kernels::Cpu;
use gptq_model::Model;
use safetensors::SafeTensors;

/// Largest difference allowed: two f32 programs that sum in different orders.
const TOLERANCE: f32 = 2e-3;

/// Prints the largest difference over all positions; errors when it is over [`TOLERANCE`].
pub(crate) fn run(model: &Path, logits: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(logits).with_context(|| logits.display().to_string())?;
    let file = SafeTensors::deserialize(&bytes)?;
    let ids = file.tensor("input_ids")?;
    let seq = ids.shape()[1];
    let ids: Vec<u32> = ids
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    let windows: Vec<Vec<u32>> = ids.chunks(seq).map(<[u32]>::to_vec).collect();
    let expected = file.tensor("logits")?;

    let model = Model::<Cpu>::open(model, &Default::default())?;
    let mut flow = model.embed(&windows, windows.len(), DType::F32)?.remove(0);
    for layer in 0..model.config().layers {
        flow = model.block(layer)?.forward(flow);
    }
    let found = model.head()?.logits(flow.residual).into_data();
    let found = found
        .as_slice::<f32>()
        .map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let expected = expected
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b));
    ensure!(
        found.len() == expected.len(),
        "{} logits, expected {}",
        found.len(),
        expected.len()
    );
    let worst = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    println!("{} logits, largest difference {worst:.2e}", found.len());
    ensure!(
        worst < TOLERANCE,
        "the largest difference is over {TOLERANCE}"
    );
    Ok(())
}
