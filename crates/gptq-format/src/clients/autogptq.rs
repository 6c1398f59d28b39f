//! Rules for branches in AutoGPTQ's layout.

use super::contents::{Contents, need};
use super::table::Client;
use crate::{Bits, CheckpointFormat, GroupSize, LinearShape};

pub(super) fn verdict(contents: &Contents, client: Client) -> Result<(), &'static str> {
    let one_setting = || {
        need(
            !contents.mixed && !contents.skips,
            "does not read per-module settings",
        )
    };
    // Optimum, which Transformers uses for loading, and vLLM leave unlisted modules dense.
    need(
        !contents.listed || matches!(client, Client::Transformers | Client::Vllm),
        "does not read modules_in_block_to_quantize",
    )?;
    match client {
        Client::GptqModel => {
            need(
                !contents.names.renamed,
                "asks for other tensor names than this model's files have",
            )?;
            gptqmodel(contents)
        }
        // Loads with the kernels of GPTQModel, but with a single setting for all linear layers.
        Client::Transformers => {
            need(
                !contents.names.experts,
                "leaves experts as they were initialized, without an error",
            )?;
            one_setting().and_then(|()| gptqmodel(contents))
        }
        Client::AutoRound => {
            need(
                !contents.scattered && (!contents.desc_act || contents.static_groups),
                "no act order (desc_act)",
            )?;
            need(
                contents.format == CheckpointFormat::Gptq,
                "reads zero points of gptq_v2 as gptq, one too high",
            )
        }
        // These and TGI, which uses their kernels, add one to every zero point in either
        // format.
        Client::ExLlama | Client::Tgi => {
            one_setting()?;
            need(contents.sym, "symmetric only")?;
            contents.all(|l| l.bits == Bits::Four, "4 bits only")?;
            contents.all(
                |l| l.group_size.divides(l.in_features),
                "groups must divide the inputs",
            )
        }
        Client::Vllm => {
            contents.all(
                |l| matches!(l.bits, Bits::Four | Bits::Eight),
                "4 or 8 bits only",
            )?;
            need(contents.sym, "symmetric only")?;
            // vLLM's backend ignores g_idx, and also desc_act if rows are one group.
            let groups = contents
                .linears
                .iter()
                .any(|l| l.group_size != GroupSize::Row);
            need(
                !(contents.scattered || contents.desc_act && groups),
                "no act order (desc_act)",
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
        Client::SgLang => contents.all(
            |l| l.group_size.divides(l.in_features),
            "groups must divide the inputs",
        ),
        Client::LlamaCpp if contents.gguf => Ok(()),
        Client::LlamaCpp => {
            contents.all(|l| l.bits != Bits::Three, "2, 4 or 8 bits only")?;
            need(contents.one_width(), "does not read per-module bits")
        }
        Client::OnnxRuntime => {
            need(contents.sym, "symmetric only")?;
            contents.all(|l| l.bits != Bits::Three, "2, 4 or 8 bits only")?;
            need(!contents.skips, "needs every linear layer quantized")?;
            let ordered = contents.scattered || contents.desc_act;
            contents.all(
                |l| !ordered || l.bits == Bits::Four,
                "act order (desc_act) at 4 bits only",
            )?;
            contents.all(
                |l| l.group_size.columns(l.in_features).is_power_of_two(),
                "groups must be powers of two",
            )
        }
        Client::OpenVino => {
            one_setting()?;
            need(contents.sym, "symmetric only")?;
            contents.all(|l| l.bits == Bits::Four, "4 bits only")?;
            need(!contents.scattered, "no act order (desc_act)")
        }
        Client::MlxLm => Err("does not read gptq; gptq export --to mlx makes files that it reads"),
        Client::MistralRs => Err("on CUDA only, which was not tried"),
    }
}

fn gptqmodel(contents: &Contents) -> Result<(), &'static str> {
    const GROUPS: [usize; 7] = [16, 32, 64, 128, 256, 512, 1024];
    contents.all(
        |l| {
            l.group_size == GroupSize::Row || GROUPS.map(GroupSize::Columns).contains(&l.group_size)
        },
        "groups of -1, 16, 32, 64, 128, 256, 512 or 1024 only",
    )?;
    let between = |damp: f64| damp > 0.0 && damp < 1.0;
    need(
        contents.damp_percent.is_none_or(between),
        "damp_percent must be between 0 and 1",
    )
}

pub(super) fn note(contents: &Contents, client: Client) -> Option<&'static str> {
    let of_a_kernel = |l: &LinearShape| {
        let odd = matches!(l.group_size, GroupSize::Row | GroupSize::Columns(16));
        l.bits == Bits::Four && odd
    };
    let odd = contents.linears.iter().any(of_a_kernel);
    match client {
        Client::GptqModel if odd => Some("on a CPU with backend=BACKEND.GPTQ_TORCH only"),
        Client::Transformers if odd => {
            Some("on a CPU with GPTQConfig(bits=4, backend=\"gptq_torch\") only")
        }
        Client::AutoRound => Some("with quantization_config=AutoRoundConfig()"),
        Client::LlamaCpp if contents.gguf => Some("its gguf file"),
        Client::LlamaCpp => {
            Some("through its converter, as 16 bits; gptq export --to gguf keeps the codes")
        }
        Client::OnnxRuntime if contents.scattered || contents.desc_act => {
            Some("slow with act order")
        }
        Client::OpenVino => Some("through optimum-intel 2.2, where gptqmodel is imported first"),
        Client::Vllm if contents.linears.iter().any(|l| l.bits == Bits::Eight) => {
            Some("8 bits on CUDA only")
        }
        Client::SgLang if contents.linears.iter().any(|l| l.bits < Bits::Four) => {
            Some("2 and 3 bits with --dtype float16 only")
        }
        _ => None,
    }
}
