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

pub use contents::{Contents, ModuleNames};
pub use table::{Client, READERS, Reader};

use contents::need;

use crate::CheckpointFormat;

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
