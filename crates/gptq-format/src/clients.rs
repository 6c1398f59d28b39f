//! Rules for which programs can load a branch, from shapes and settings alone, so known before any
//! work.
//!
//! [`Client::tried`] names the basis of the rules: the versions that were run on branches of every
//! kind, or whose source was read. For all of them packing needs `in % 32 == 0` and `out % 32 ==
//! 0`.

use crate::{Bits, CheckpointFormat, GroupSize, LinearShape, QuantizeConfig};

/// A program that loads GPTQ checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names are the programs")]
pub enum Client {
    GptqModel,
    Transformers,
    AutoRound,
    ExLlama,
    Vllm,
    SgLang,
    Tgi,
}

impl Client {
    /// Every client the rules cover.
    pub const ALL: [Client; 7] = [
        Client::GptqModel,
        Client::Transformers,
        Client::AutoRound,
        Client::ExLlama,
        Client::Vllm,
        Client::SgLang,
        Client::Tgi,
    ];

    /// Returns the name that its users know.
    pub fn name(self) -> &'static str {
        match self {
            Client::GptqModel => "GPTQModel",
            Client::Transformers => "Transformers",
            Client::AutoRound => "AutoRound",
            Client::ExLlama => "ExLlama",
            Client::Vllm => "vLLM",
            Client::SgLang => "SGLang",
            Client::Tgi => "TGI",
        }
    }

    /// Returns the versions that its rules are based on, and how they were checked.
    pub fn tried(self) -> &'static str {
        match self {
            Client::GptqModel => "7.7.0, run on a CPU",
            Client::Transformers => "5.23.0 with GPTQModel 7.7.0 and Optimum 2.3.0, run on a CPU",
            Client::AutoRound => "0.16.1, run on a CPU",
            Client::ExLlama => "ExLlama and ExLlamaV2, by reading",
            Client::Vllm => "0.32.0, run on a CPU; 0.32.0 and 0.33.0 for CUDA, by reading",
            Client::SgLang => "as of November 2026, by reading",
            Client::Tgi => "archived in March 2026, by reading",
        }
    }

    /// Returns true if it can split a model over several devices.
    pub fn splits(self) -> bool {
        matches!(self, Client::Vllm | Client::SgLang | Client::Tgi)
    }
}

/// Properties of a branch's files that clients depend on.
#[derive(Clone, Debug, PartialEq)]
pub struct Contents {
    /// Shapes of the quantized linear layers.
    pub linears: Vec<LinearShape>,
    /// True for symmetric codes.
    pub sym: bool,
    /// Storage of zero points.
    pub format: CheckpointFormat,
    /// `desc_act`, as declared to clients.
    pub desc_act: bool,
    /// `static_groups`, as declared to clients.
    pub static_groups: bool,
    /// True if any `g_idx` is out of order, so that groups are not contiguous.
    pub scattered: bool,
    /// True if some linear layers have settings other than the branch's.
    pub mixed: bool,
    /// True if some linear layer of a block is not quantized.
    pub skips: bool,
    /// True if a list names the quantized linear layers (`modules_in_block_to_quantize`).
    pub listed: bool,
    /// True if settings and tensors disagree on which linear layers are quantized.
    pub stray: bool,
    /// True if a quantized linear layer has another name in memory than in the files ([`is_renamed`]).
    pub renamed: bool,
    /// `damp_percent`, if declared to clients.
    pub damp_percent: Option<f64>,
}

/// Returns true if programs hold a linear layer under other names than the files do: the text model beside a vision
/// tower, and fused gate and up, which GPTQModel takes apart. Transformers maps names as it reads.
pub fn is_renamed(module: &str) -> bool {
    module.starts_with("language_model.") || module.ends_with(".gate_up_proj")
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
}

/// Applies every client's rules to a branch.
pub fn client_support(contents: &Contents) -> Vec<Support> {
    let support = |client: Client| {
        let verdict = contents.verdict(client);
        let note = contents.note(client).filter(|_| verdict.is_ok());
        Support {
            client,
            verdict,
            note,
        }
    };
    Client::ALL.into_iter().map(support).collect()
}

impl Contents {
    /// Collects the properties of a branch with these settings and linear layers.
    pub fn of(config: &QuantizeConfig, linears: Vec<LinearShape>) -> Self {
        let rules = || config.dynamic.iter().flat_map(|rules| rules.iter());
        let skips = |(pattern, _): (&str, _)| pattern.starts_with("-:");
        let groups = linears.iter().any(|l| l.group_size != GroupSize::Row);
        Contents {
            linears,
            sym: config.sym,
            format: config.checkpoint_format,
            desc_act: config.desc_act,
            static_groups: config.static_groups,
            scattered: config.desc_act && !config.static_groups && groups,
            mixed: rules().any(|rule| !skips(rule)),
            skips: rules().any(skips),
            listed: !config.listed().is_empty(),
            stray: false,
            renamed: false,
            damp_percent: config.damp_percent,
        }
    }

    fn all(
        &self,
        rule: impl Fn(&LinearShape) -> bool,
        why: &'static str,
    ) -> Result<(), &'static str> {
        need(self.linears.iter().all(rule), why)
    }

    fn verdict(&self, client: Client) -> Result<(), &'static str> {
        let one_setting = || {
            need(
                !self.mixed && !self.skips,
                "does not read per-module settings",
            )
        };
        self.all(
            |l| l.in_features % 32 == 0 && l.out_features % 32 == 0,
            "dimensions are not multiples of 32",
        )?;
        need(
            !self.stray,
            "config and tensors disagree on which linear layers are quantized",
        )?;
        // Optimum, which Transformers uses for loading, and vLLM leave unlisted modules dense.
        need(
            !self.listed || matches!(client, Client::Transformers | Client::Vllm),
            "does not read modules_in_block_to_quantize",
        )?;
        match client {
            Client::GptqModel => {
                need(
                    !self.renamed,
                    "asks for other tensor names than this model's files have",
                )?;
                self.gptqmodel()
            }
            // Loads with the kernels of GPTQModel, but with a single setting for all linear layers.
            Client::Transformers => one_setting().and_then(|()| self.gptqmodel()),
            Client::AutoRound => {
                need(
                    !self.scattered && (!self.desc_act || self.static_groups),
                    "no act order (desc_act)",
                )?;
                need(
                    self.format == CheckpointFormat::Gptq,
                    "reads zero points of gptq_v2 as gptq, one too high",
                )
            }
            // These and TGI, which uses their kernels, add one to every zero point in either
            // format.
            Client::ExLlama | Client::Tgi => {
                one_setting()?;
                need(self.sym, "symmetric only")?;
                self.all(|l| l.bits == Bits::Four, "4 bits only")?;
                self.all(
                    |l| l.group_size.divides(l.in_features),
                    "groups must divide the inputs",
                )
            }
            Client::Vllm => {
                self.all(
                    |l| matches!(l.bits, Bits::Four | Bits::Eight),
                    "4 or 8 bits only",
                )?;
                need(self.sym, "symmetric only")?;
                // vLLM's backend ignores g_idx, and also desc_act if rows are one group.
                let groups = self.linears.iter().any(|l| l.group_size != GroupSize::Row);
                need(
                    !(self.scattered || self.desc_act && groups),
                    "no act order (desc_act)",
                )?;
                self.all(
                    |l| {
                        let columns = [32, 64, 128].map(GroupSize::Columns);
                        l.group_size == GroupSize::Row || columns.contains(&l.group_size)
                    },
                    "groups of -1, 32, 64 or 128 only",
                )?;
                self.all(
                    |l| l.out_features % 64 == 0 && l.in_features % 128 == 0,
                    "needs out % 64 = 0 and in % 128 = 0",
                )
            }
            Client::SgLang => self.all(
                |l| l.group_size.divides(l.in_features),
                "groups must divide the inputs",
            ),
        }
    }

    fn gptqmodel(&self) -> Result<(), &'static str> {
        const GROUPS: [usize; 7] = [16, 32, 64, 128, 256, 512, 1024];
        self.all(
            |l| {
                l.group_size == GroupSize::Row
                    || GROUPS.map(GroupSize::Columns).contains(&l.group_size)
            },
            "groups of -1, 16, 32, 64, 128, 256, 512 or 1024 only",
        )?;
        let between = |damp: f64| damp > 0.0 && damp < 1.0;
        need(
            self.damp_percent.is_none_or(between),
            "damp_percent must be between 0 and 1",
        )
    }

    fn note(&self, client: Client) -> Option<&'static str> {
        let of_a_kernel = |l: &LinearShape| {
            let odd = matches!(l.group_size, GroupSize::Row | GroupSize::Columns(16));
            l.bits == Bits::Four && odd
        };
        let odd = self.linears.iter().any(of_a_kernel);
        match client {
            Client::GptqModel if odd => Some("on a CPU with backend=BACKEND.GPTQ_TORCH only"),
            Client::Transformers if odd => {
                Some("on a CPU with GPTQConfig(bits=4, backend=\"gptq_torch\") only")
            }
            Client::AutoRound => Some("with quantization_config=AutoRoundConfig()"),
            Client::Vllm if self.linears.iter().any(|l| l.bits == Bits::Eight) => {
                Some("8 bits on CUDA only")
            }
            Client::SgLang if self.linears.iter().any(|l| l.bits < Bits::Four) => {
                Some("2 and 3 bits with --dtype float16 only")
            }
            _ => None,
        }
    }
}

fn need(ok: bool, why: &'static str) -> Result<(), &'static str> {
    if ok { Ok(()) } else { Err(why) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Client::*;

    /// Returns a branch of one linear layer with default settings.
    fn contents(bits: Bits, group_size: i64) -> Contents {
        let linear = LinearShape {
            in_features: 4096,
            out_features: 11008,
            bits,
            group_size: GroupSize::try_from(group_size).unwrap(),
        };
        Contents {
            linears: vec![linear],
            sym: true,
            format: CheckpointFormat::Gptq,
            desc_act: false,
            static_groups: true,
            scattered: false,
            mixed: false,
            skips: false,
            listed: false,
            stray: false,
            renamed: false,
            damp_percent: Some(0.1),
        }
    }

    #[test]
    fn names_that_readers_change_are_known() {
        for (module, expected) in [
            ("model.layers.0.mlp.gate_up_proj", true),
            ("language_model.model.layers.3.self_attn.q_proj", true),
            ("model.layers.0.mlp.gate_proj", false),
            ("model.layers.0.self_attn.qkv_proj", false),
        ] {
            assert_eq!(is_renamed(module), expected, "{module}");
        }
    }

    fn loaders(contents: &Contents) -> Vec<Client> {
        let support = client_support(contents).into_iter();
        let loads = support.filter(|s| s.verdict.is_ok());
        loads.map(|s| s.client).collect()
    }

    /// Verdicts observed on 2026-11-30 for branches of a small model in the versions that `tried`
    /// names, and those from reading the source.
    #[test]
    fn verdicts_are_what_was_seen_in_each_client() {
        use Bits::*;
        let all = Client::ALL;
        let act = |bits, group| Contents {
            desc_act: true,
            static_groups: false,
            scattered: group != -1,
            ..contents(bits, group)
        };
        let asym = |desc_act| Contents {
            sym: false,
            format: CheckpointFormat::GptqV2,
            desc_act,
            scattered: desc_act,
            ..contents(Four, 128)
        };
        let flagged = Contents {
            desc_act: true,
            ..contents(Four, 128)
        };
        let mixed = |skips| Contents {
            mixed: true,
            skips,
            ..contents(Four, 128)
        };
        let skipped = Contents {
            skips: true,
            ..contents(Four, 128)
        };
        let damped = |damp| Contents {
            damp_percent: Some(damp),
            ..contents(Four, 128)
        };
        let renamed = Contents {
            renamed: true,
            ..contents(Four, 128)
        };
        for (branch, what, expected) in [
            (contents(Four, 128), "w4g128_noact", &all[..]),
            (renamed, "phi3, glm4, gemma3, mistral3", &all[1..]),
            (contents(Four, 32), "w4g32_noact", &all),
            (
                act(Four, 128),
                "w4g128_act",
                &[GptqModel, Transformers, ExLlama, SgLang, Tgi],
            ),
            (
                act(Four, -1),
                "w4g-1_act",
                &[GptqModel, Transformers, ExLlama, Vllm, SgLang, Tgi],
            ),
            (
                contents(Eight, 128),
                "w8g128_noact",
                &[GptqModel, Transformers, AutoRound, Vllm, SgLang],
            ),
            (
                act(Eight, -1),
                "w8g-1_act",
                &[GptqModel, Transformers, Vllm, SgLang],
            ),
            (
                act(Eight, 128),
                "w8g128_act",
                &[GptqModel, Transformers, SgLang],
            ),
            (
                contents(Three, 128),
                "w3g128_noact",
                &[GptqModel, Transformers, AutoRound, SgLang],
            ),
            (
                contents(Two, 64),
                "w2g64_noact",
                &[GptqModel, Transformers, AutoRound, SgLang],
            ),
            (
                asym(true),
                "w4g128_asym_act",
                &[GptqModel, Transformers, SgLang],
            ),
            (
                asym(false),
                "w4g128_asym_noact",
                &[GptqModel, Transformers, SgLang],
            ),
            (
                flagged,
                "w4g128_static_act",
                &[GptqModel, Transformers, AutoRound, ExLlama, SgLang, Tgi],
            ),
            (
                mixed(true),
                "w4_mixed4_noact",
                &[GptqModel, AutoRound, Vllm, SgLang],
            ),
            (
                mixed(false),
                "w4g128_mixed_noact",
                &[GptqModel, AutoRound, Vllm, SgLang],
            ),
            (
                skipped,
                "w4_skiponly_noact",
                &[GptqModel, AutoRound, Vllm, SgLang],
            ),
            (
                contents(Four, 16),
                "w4g16_noact",
                &[GptqModel, Transformers, AutoRound, ExLlama, SgLang, Tgi],
            ),
            (
                act(Four, 256),
                "w4g256_act",
                &[GptqModel, Transformers, ExLlama, SgLang, Tgi],
            ),
            (act(Four, 8), "w4g8_act", &[ExLlama, SgLang, Tgi]),
            (
                damped(0.0),
                "w4g128_damp0",
                &[AutoRound, ExLlama, Vllm, SgLang, Tgi],
            ),
            (
                damped(1.0),
                "w4g128_damp1",
                &[AutoRound, ExLlama, Vllm, SgLang, Tgi],
            ),
        ] {
            assert_eq!(loaders(&branch), expected, "{what}");
        }
    }

    #[test]
    fn what_a_user_has_to_do_is_said_where_it_loads() {
        let notes = |contents: &Contents| -> Vec<Client> {
            let support = client_support(contents).into_iter();
            let noted = support.filter(|s| s.note.is_some() && s.client != AutoRound);
            noted.map(|s| s.client).collect()
        };
        assert_eq!(notes(&contents(Bits::Four, 128)), []);
        assert_eq!(notes(&contents(Bits::Four, -1)), [GptqModel, Transformers]);
        assert_eq!(notes(&contents(Bits::Eight, -1)), [Vllm]);
        assert_eq!(notes(&contents(Bits::Two, 64)), [SgLang]);
    }

    #[test]
    fn dimensions_that_do_not_pack_or_fit_vllm_are_refused() {
        let shape = |in_features, out_features| {
            let mut contents = contents(Bits::Four, 32);
            contents.linears[0].in_features = in_features;
            contents.linears[0].out_features = out_features;
            loaders(&contents)
        };
        assert_eq!(shape(4096, 48), []);
        assert!(!shape(4096, 96).contains(&Vllm));
        assert!(!shape(576, 128).contains(&Vllm));
        assert!(shape(640, 128).contains(&Vllm) && shape(576, 128).contains(&ExLlama));
    }
}
