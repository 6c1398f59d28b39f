//! The table of readers: each program and format, which branches of it are loaded, and what that was tried with.

use crate::CheckpointFormat;

/// A program that loads branches.
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
    LlamaCpp,
    OnnxRuntime,
    OpenVino,
    MlxLm,
    MistralRs,
}

impl Client {
    /// Every client the rules cover.
    pub const ALL: [Client; 12] = [
        Client::GptqModel,
        Client::Transformers,
        Client::AutoRound,
        Client::ExLlama,
        Client::Vllm,
        Client::SgLang,
        Client::Tgi,
        Client::LlamaCpp,
        Client::OnnxRuntime,
        Client::OpenVino,
        Client::MlxLm,
        Client::MistralRs,
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
            Client::LlamaCpp => "llama.cpp",
            Client::OnnxRuntime => "ONNX Runtime GenAI",
            Client::OpenVino => "OpenVINO",
            Client::MlxLm => "mlx-lm",
            Client::MistralRs => "mistral.rs",
        }
    }

    /// Returns programs that stand on it and load the same branches.
    pub fn stands_below(self) -> &'static [&'static str] {
        match self {
            Client::ExLlama => &["text-generation-webui", "TabbyAPI", "KoboldAI", "LoLLMS"],
            Client::LlamaCpp => &["Ollama", "LM Studio"],
            _ => &[],
        }
    }

    /// Returns the versions that its rules for `format` are based on, and how they were checked.
    pub fn tried(self, format: CheckpointFormat) -> &'static str {
        let format = match format {
            CheckpointFormat::GptqV2 => CheckpointFormat::Gptq,
            other => other,
        };
        self.tried_with(format.name())
    }

    /// Returns the same for the format called `name`.
    pub(super) fn tried_with(self, name: &str) -> &'static str {
        let mut rows = READERS.iter();
        let row = rows.find(|row| row.client == self && row.format == name);
        row.map_or(BY_READING, |row| row.tried)
    }

    /// Returns true if it can split a model over several devices.
    pub fn splits(self) -> bool {
        matches!(self, Client::Vllm | Client::SgLang | Client::Tgi)
    }
}

/// Basis of rules that come from a program's source or its documentation.
const BY_READING: &str = "as of November 2026, by reading";

/// A program's reading of a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reader {
    /// The program.
    pub client: Client,
    /// Name of the format.
    pub format: &'static str,
    /// The branches that it loads.
    pub branches: &'static str,
    /// Versions, and how they were checked.
    pub tried: &'static str,
}

const fn row(
    client: Client,
    format: &'static str,
    branches: &'static str,
    tried: &'static str,
) -> Reader {
    Reader {
        client,
        format,
        branches,
        tried,
    }
}

/// Every program that reads a format. Those that are missing for a format do not read it.
pub const READERS: &[Reader] = &[
    row(
        Client::GptqModel,
        "gptq",
        "groups of -1, 16, 32, 64, 128, 256, 512 or 1024; 4 bits in groups of -1 or 16 on a CPU only with \
         `backend=BACKEND.GPTQ_TORCH`; not Gemma 3 with its vision tower, Mistral 3, Phi-3 and GLM-4, which Transformers loads, nor Mixtral",
        "7.7.0, run on a CPU",
    ),
    row(
        Client::Transformers,
        "gptq",
        "with GPTQModel **and** Optimum: the same groups, every dense family; no overrides, no size budget",
        "5.23.0 with GPTQModel 7.7.0 and Optimum 2.3.0, run on a CPU",
    ),
    row(
        Client::AutoRound,
        "gptq",
        "symmetric, no act order; with `quantization_config=AutoRoundConfig()`",
        "0.16.1, run on a CPU",
    ),
    row(
        Client::ExLlama,
        "gptq",
        "4 bits, symmetric, groups that divide the inputs, no overrides or budget",
        "ExLlama and ExLlamaV2, by reading",
    ),
    row(
        Client::Vllm,
        "gptq",
        "4 and 8 bits, symmetric, **no act order** (but with groups of -1), groups of -1, 32, 64 or 128, `out % 64 = 0`, \
         `in % 128 = 0`; 8 bits on CUDA, 4 bits on CPUs with AVX-512",
        "0.32.0, run on a CPU; 0.32.0 and 0.33.0 for CUDA, by reading",
    ),
    row(
        Client::SgLang,
        "gptq",
        "2, 3, 4 and 8 bits, symmetric or not, groups that divide the inputs",
        BY_READING,
    ),
    row(
        Client::Tgi,
        "gptq",
        "as ExLlama",
        "archived in March 2026, by reading",
    ),
    row(
        Client::LlamaCpp,
        "gptq",
        "2, 4 and 8 bits, of one width throughout, through its converter, which makes 16 bits of them; \
         `gptq export --to gguf` keeps the codes",
        "converter of commit 0c1e57098, run",
    ),
    row(
        Client::OnnxRuntime,
        "gptq",
        "2, 4 and 8 bits, symmetric, groups that are powers of two, no skipped linear layers; act order at 4 bits only, and slow",
        "0.18.0 with ONNX Runtime 1.32.0, run on a CPU",
    ),
    row(
        Client::OpenVino,
        "gptq",
        "4 bits, symmetric, `g_idx` in order, no overrides or budget",
        "2026.4.1 with optimum-intel 2.2.0, run on a CPU",
    ),
    row(
        Client::Transformers,
        "compressed-tensors",
        "symmetric, with the package compressed-tensors",
        "5.23.0 with compressed-tensors 0.20.0, run on a CPU",
    ),
    row(
        Client::Vllm,
        "compressed-tensors",
        "symmetric, and asymmetric at 4 and 8 bits; groups of -1, 32, 64 or 128, `out % 64 = 0`, `in % 128 = 0`; 2 and 3 bits \
         with humming-kernels",
        BY_READING,
    ),
    row(
        Client::SgLang,
        "compressed-tensors",
        "4 and 8 bits, symmetric",
        BY_READING,
    ),
    row(
        Client::LlamaCpp,
        "compressed-tensors",
        "2, 4 and 8 bits, one setting throughout, not groups of -1, through its converter, which makes 16 bits of them",
        "converter of commit 0c1e57098, run",
    ),
    row(
        Client::MlxLm,
        "mlx",
        "all",
        "0.32.2 with mlx 0.32.4, run on a CPU",
    ),
    row(
        Client::LlamaCpp,
        "gguf",
        "all",
        "llama-cpp-python 0.3.36 and the package gguf 0.19.0, run on a CPU",
    ),
];
