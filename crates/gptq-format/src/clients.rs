//! Rules for which programs can load a branch, from shapes and settings alone, so known before any
//! work.
//!
//! [`READERS`] is the table of what each reads of which format, with the basis of its rules: the versions that were run
//! on branches of every kind, or whose source was read. Packing needs `in % 32 == 0` and `out % 32 == 0` throughout.

mod autogptq;
mod compressed_tensors;
mod contents;
mod mlx;
mod table;

pub use contents::Contents;
pub use table::{Client, READERS, Reader};

use contents::need;

use crate::CheckpointFormat;

/// Properties of a model's linear layers that their names tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// True if programs hold one under another name than the files do: the text model beside a vision tower, fused gate
    /// and up, which GPTQModel takes apart, and Mixtral's experts. Transformers maps names as it reads.
    pub renamed: bool,
    /// True if some are experts'.
    pub experts: bool,
}

impl Names {
    /// Reads the names of a model's linear layers, quantized or not.
    pub fn of<S: AsRef<str>>(modules: impl IntoIterator<Item = S>) -> Names {
        let mut names = Names::default();
        for module in modules {
            let module = module.as_ref();
            names.renamed |= module.starts_with("language_model.")
                || module.ends_with(".gate_up_proj")
                || module.contains(".block_sparse_moe.experts.");
            names.experts |= module.contains(".experts.");
        }
        names
    }
}

/// A client's verdict on a branch.
#[derive(Clone, Debug, PartialEq)]
pub struct Support {
    /// The client.
    pub client: Client,
    /// `Err` holds the rule that fails.
    pub verdict: Result<(), &'static str>,
    /// Advice for its user on a branch that it loads.
    pub note: Option<&'static str>,
    /// Versions that the rules are based on, and how they were checked.
    pub tried: &'static str,
}

/// Applies every client's rules to a branch.
pub fn client_support(contents: &Contents) -> Vec<Support> {
    let support = |client: Client| {
        let verdict = verdict(contents, client);
        let note = note(contents, client).filter(|_| verdict.is_ok());
        Support {
            client,
            verdict,
            note,
            tried: match client {
                Client::LlamaCpp if contents.gguf => client.tried_with("gguf"),
                _ => client.tried(contents.format),
            },
        }
    };
    Client::ALL.into_iter().map(support).collect()
}

fn verdict(contents: &Contents, client: Client) -> Result<(), &'static str> {
    contents.all(
        |l| l.in_features % 32 == 0 && l.out_features % 32 == 0,
        "dimensions are not multiples of 32",
    )?;
    need(
        !contents.stray,
        "config and tensors disagree on which linear layers are quantized",
    )?;
    // These fuse experts.
    need(
        !contents.parted || !matches!(client, Client::Vllm | Client::SgLang),
        "needs one setting for all experts of a block",
    )?;
    match contents.format {
        CheckpointFormat::Gptq | CheckpointFormat::GptqV2 => autogptq::verdict(contents, client),
        CheckpointFormat::CompressedTensors => compressed_tensors::verdict(contents, client),
        CheckpointFormat::Mlx => mlx::verdict(client),
    }
}

fn note(contents: &Contents, client: Client) -> Option<&'static str> {
    match contents.format {
        CheckpointFormat::Gptq | CheckpointFormat::GptqV2 => autogptq::note(contents, client),
        CheckpointFormat::CompressedTensors => compressed_tensors::note(contents, client),
        CheckpointFormat::Mlx => None,
    }
}

#[cfg(test)]
mod tests;
