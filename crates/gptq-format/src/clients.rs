//! Who can load a branch, from shapes and settings alone: known before any work is spent.
//!
//! Rules: packing needs `in % 32 == 0` and `out % 32 == 0`. ExLlama, ExLlamaV2 and TGI, which has
//! their kernels, take 4 bits with `in % group == 0`, and add one to every zero point whatever
//! `checkpoint_format` says, so that an asymmetric branch (`gptq_v2`) would be off by a step. vLLM's
//! Marlin takes 4 or 8 bits, symmetric, groups -1, 32, 64 or 128, `out % 64 == 0`, `in % 128 == 0`;
//! other branches run there on the slower plain GPTQ kernel. Transformers (through GPTQModel or
//! Optimum) has reference kernels for everything the format can say, but only GPTQModel and vLLM
//! read per-module settings.

use crate::{Bits, GroupSize, LinearShape};

/// A program that loads GPTQ checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the programs")]
pub enum Client {
    GptqModel,
    Transformers,
    ExLlama,
    Vllm,
    VllmMarlin,
    Tgi,
}

impl Client {
    /// Every client the rules cover.
    pub const ALL: [Client; 6] = [
        Client::GptqModel,
        Client::Transformers,
        Client::ExLlama,
        Client::Vllm,
        Client::VllmMarlin,
        Client::Tgi,
    ];

    /// The name its users know.
    pub fn name(self) -> &'static str {
        match self {
            Client::GptqModel => "GPTQModel",
            Client::Transformers => "Transformers",
            Client::ExLlama => "ExLlama",
            Client::Vllm => "vLLM",
            Client::VllmMarlin => "vLLM Marlin",
            Client::Tgi => "TGI",
        }
    }
}

/// A client's verdict on a branch.
#[derive(Clone, Debug, PartialEq)]
pub struct Support {
    /// Who.
    pub client: Client,
    /// `Err` says which rule fails.
    pub verdict: Result<(), &'static str>,
}

/// Applies every client's rules to a branch: `linears` are its quantised linears, `mixed` says that
/// they do not all share the branch's settings.
pub fn client_support(linears: &[LinearShape], sym: bool, mixed: bool) -> Vec<Support> {
    Client::ALL
        .into_iter()
        .map(|client| Support {
            client,
            verdict: linears
                .iter()
                .try_for_each(|linear| judge(client, linear, sym, mixed)),
        })
        .collect()
}

fn judge(client: Client, linear: &LinearShape, sym: bool, mixed: bool) -> Result<(), &'static str> {
    let LinearShape {
        in_features,
        out_features,
        bits,
        group_size,
    } = *linear;
    let need = |ok: bool, why| if ok { Ok(()) } else { Err(why) };
    need(
        in_features % 32 == 0 && out_features % 32 == 0,
        "dimensions are not multiples of 32",
    )?;
    let one_setting = || need(!mixed, "does not read per-module settings");
    match client {
        Client::GptqModel => Ok(()),
        Client::Transformers => one_setting(),
        Client::Vllm => need(sym, "symmetric only"),
        Client::ExLlama | Client::Tgi => {
            one_setting()?;
            need(sym, "symmetric only")?;
            need(bits == Bits::Four, "4 bits only")?;
            need(
                group_size.divides(in_features),
                "groups must divide the inputs",
            )
        }
        Client::VllmMarlin => {
            need(matches!(bits, Bits::Four | Bits::Eight), "4 or 8 bits only")?;
            need(sym, "symmetric only")?;
            need(
                matches!(
                    group_size,
                    GroupSize::Row | GroupSize::Columns(32 | 64 | 128)
                ),
                "groups of -1, 32, 64 or 128 only",
            )?;
            need(
                out_features % 64 == 0 && in_features % 128 == 0,
                "needs out % 64 = 0 and in % 128 = 0",
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaders(bits: Bits, group_size: GroupSize, sym: bool) -> Vec<Client> {
        let linear = LinearShape {
            in_features: 4096,
            out_features: 11008,
            bits,
            group_size,
        };
        client_support(&[linear], sym, false)
            .into_iter()
            .filter(|s| s.verdict.is_ok())
            .map(|s| s.client)
            .collect()
    }

    #[test]
    fn four_bit_branches_load_everywhere_and_eight_bit_not_in_exllama() {
        assert_eq!(
            loaders(Bits::Four, GroupSize::Columns(128), true),
            Client::ALL
        );
        assert!(!loaders(Bits::Eight, GroupSize::Row, true).contains(&Client::ExLlama));
        assert!(loaders(Bits::Eight, GroupSize::Row, true).contains(&Client::VllmMarlin));
        assert!(!loaders(Bits::Three, GroupSize::Columns(128), true).contains(&Client::VllmMarlin));
        assert_eq!(
            loaders(Bits::Four, GroupSize::Columns(128), false),
            [Client::GptqModel, Client::Transformers]
        );
    }
}
