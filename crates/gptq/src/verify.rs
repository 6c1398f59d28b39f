//! `gptq verify`.

use anyhow::Result;
use gptq_verify::{Evaluation, verify};

use crate::cli::VerifyArgs;

pub(crate) fn run(args: VerifyArgs) -> Result<()> {
    let evaluation = args.text.map(|text| Evaluation {
        text,
        window: args.window,
    });
    let verdict = verify(
        &args.dir,
        evaluation.as_ref(),
        args.against.as_deref(),
        args.device,
    )?;
    println!(
        "{}: {} tensors as their configs say, {} quantised linears",
        args.dir.display(),
        verdict.structure.tensors,
        verdict.structure.quantised_linears
    );
    if let Some(perplexity) = verdict.perplexity {
        println!(
            "perplexity {perplexity:.4} on {} tokens in windows of {}",
            verdict.scored_tokens, args.window
        );
        if let Some(dense) = verdict.dense_perplexity {
            let change = 100.0 * (perplexity / dense - 1.0);
            println!("dense model {dense:.4}: {change:+.2} %");
        }
    }
    Ok(())
}
