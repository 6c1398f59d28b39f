//! Rules for branches in compressed-tensors' `pack-quantized`.

use super::contents::{Contents, need};
use super::table::Client;
use crate::{Bits, GroupSize};

pub(super) fn verdict(contents: &Contents, client: Client) -> Result<(), &'static str> {
    match client {
        // The library gives the zero points of an empty model another shape than those of a file.
        Client::Transformers => need(contents.sym, "symmetric only"),
        Client::Vllm => {
            contents.all(
                |l| contents.sym || matches!(l.bits, Bits::Four | Bits::Eight),
                "asymmetric at 4 or 8 bits only",
            )?;
            contents.all(
                |l| {
                    let columns = [32, 64, 128].map(GroupSize::Columns);
                    l.group_size == GroupSize::Row || columns.contains(&l.group_size)
                },
                "groups of -1, 32, 64 or 128 only",
            )?;
            contents.all(
                |l| l.out_features % 64 == 0 && l.in_features % 128 == 0,
                "needs out % 64 = 0 and in % 128 = 0",
            )
        }
        Client::SgLang => {
            need(contents.sym, "symmetric only")?;
            contents.all(
                |l| matches!(l.bits, Bits::Four | Bits::Eight),
                "4 or 8 bits only",
            )
        }
        Client::LlamaCpp => {
            contents.all(|l| l.bits != Bits::Three, "2, 4 or 8 bits only")?;
            need(!contents.mixed, "does not read several config_groups")?;
            contents.all(|l| l.group_size != GroupSize::Row, "no groups of -1")
        }
        _ => Err("does not read compressed-tensors"),
    }
}

pub(super) fn note(contents: &Contents, client: Client) -> Option<&'static str> {
    let few = contents.linears.iter().any(|l| l.bits < Bits::Four);
    match client {
        Client::Transformers => Some("with the package compressed-tensors"),
        Client::LlamaCpp => {
            Some("through its converter, as 16 bits; gptq export --to gguf keeps the codes")
        }
        Client::Vllm if few => Some("2 and 3 bits with the package humming-kernels"),
        _ => None,
    }
}
