//! Compares the f32 forward pass, dense or dequantized, with another program: logits, and greedy
//! tokens.

use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use burn::tensor::DType;
use gptq_kernels::Cpu;
use gptq_model::{Decoder, Model};
use safetensors::SafeTensors;

/// Maximum difference between two f32 programs that sum in different orders.
const TOLERANCE: f32 = 2e-3;

/// Prints the largest difference over all positions; errors if it is over [`TOLERANCE`].
pub(crate) fn logits(model: &Path, logits: &Path) -> anyhow::Result<()> {
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

/// Decodes greedily every prompt in `tokens` (`tests/golden/generate.json`) for the model with this
/// directory's name; errors at the first token that differs.
pub(crate) fn tokens(dir: &Path, tokens: &Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(tokens).with_context(|| tokens.display().to_string())?;
    let golden: serde_json::Value = serde_json::from_str(&text)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let rows = (golden["models"][name.as_ref()].as_array())
        .ok_or_else(|| anyhow!("{}: no entry for {name}", tokens.display()))?;
    let mut decoder = Decoder::load(&Model::<Cpu>::open(dir, &Default::default())?)?;
    for row in rows {
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(row[key].clone());
        let (mut context, expected) = (ids("ids")?, ids("tokens")?);
        for (step, &token) in expected.iter().enumerate() {
            let logits = decoder.next_logits(&context)?;
            let best = (0..logits.len()).fold(0, |b, i| if logits[i] > logits[b] { i } else { b });
            ensure!(
                best == token as usize,
                "{}: token {step} is {best}, expected {token}",
                row["prompt"]
            );
            context.push(token);
        }
        println!("{}: {} tokens agree", row["prompt"], expected.len());
    }
    Ok(())
}
