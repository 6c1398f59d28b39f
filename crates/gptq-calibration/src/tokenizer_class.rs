//! The tokenizer class that Transformers 5 uses for a model's files.
//!
//! For most models `AutoTokenizer` uses `tokenizer.json` as it is. For some classes it uses only
//! the vocabulary, the merges and the post-processor, and rebuilds the rest ([`Class::rebuild`]): a
//! `LlamaTokenizer` loses the file's normalizer and pre-tokenizer. Programs based on Transformers
//! (vLLM, SGLang, mlx-lm) feed a model these tokens; llama.cpp, the `tokenizers` library and
//! Transformers 4 use the file.
//!
//! Source: `models/auto/tokenization_auto.py` and the classes' own files in Transformers 5.23.

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer,
};

use crate::CalibrationError;

/// Construction of a tokenizer from its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// `tokenizer.json` as it is.
    AsFiled,
    Llama,
    CodeLlama,
    Qwen2,
    Gemma,
    Gpt2,
    GptNeoX,
}

/// Model types whose tokenizers are used as filed, whatever class they name.
const AS_FILED: [&str; 36] = [
    "arctic",
    "ernie4_5",
    "ernie4_5_moe",
    "flex_olmo",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_bigcode",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "hyperclovax",
    "internlm2",
    "internlm3",
    "jamba",
    "kimi_linear",
    "mimo_v2_flash",
    "minicpm3",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mistral",
    "mistral3",
    "mistral_large4",
    "mixtral",
    "nemotron",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "persimmon",
    "phi3",
    "phimoe",
    "stablelm",
    "step3_vl",
];

/// Model types with a registered class, used if the tokenizer names none.
const REGISTERED: [(&str, Class); 19] = [
    ("falcon_mamba", Class::GptNeoX),
    ("gemma", Class::Gemma),
    ("gemma2", Class::Gemma),
    ("gemma3", Class::Gemma),
    ("gemma3_text", Class::Gemma),
    ("gpt2", Class::Gpt2),
    ("gpt_neo", Class::Gpt2),
    ("gpt_neox", Class::GptNeoX),
    ("gptj", Class::Gpt2),
    ("code_llama", Class::CodeLlama),
    ("olmo", Class::GptNeoX),
    ("olmoe", Class::GptNeoX),
    ("phi", Class::Gpt2),
    ("qwen2", Class::Qwen2),
    ("qwen2_moe", Class::Qwen2),
    ("qwen3", Class::Qwen2),
    ("qwen3_moe", Class::Qwen2),
    ("qwen3_next", Class::Qwen2),
    ("starcoder2", Class::Gpt2),
];

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Marks a `tokenizer.json` that works on bytes.
const BYTE_LEVEL: &[u8] = b"\"ByteLevel\"";

impl Class {
    /// Returns the class for a tokenizer that names `class` beside a model of `model_type`; `json`
    /// is its `tokenizer.json`.
    pub(crate) fn of(model_type: &str, class: Option<&str>, json: &[u8]) -> Class {
        if AS_FILED.contains(&model_type) {
            return Class::AsFiled;
        }
        let registered = REGISTERED.iter().find(|(name, _)| *name == model_type);
        let registered = registered.map(|(_, class)| *class);
        let named = class.map(|class| match class.strip_suffix("Fast").unwrap_or(class) {
            "LlamaTokenizer" => Class::Llama,
            "CodeLlamaTokenizer" => Class::CodeLlama,
            "Qwen2Tokenizer" => Class::Qwen2,
            "GemmaTokenizer" => Class::Gemma,
            "GPT2Tokenizer" => Class::Gpt2,
            "GPTNeoXTokenizer" => Class::GptNeoX,
            _ => Class::AsFiled,
        });
        match named {
            // Transformers ignores the class here, as it is often wrong in the files.
            _ if model_type == "qwen2" => Class::Qwen2,
            // A tokenizer of Llama 3's kind under Llama 2's name.
            Some(Class::Llama)
                if json
                    .windows(BYTE_LEVEL.len())
                    .any(|word| word == BYTE_LEVEL) =>
            {
                Class::AsFiled
            }
            Some(named) => named,
            None => registered.unwrap_or(Class::AsFiled),
        }
    }

    /// Returns the default special tokens of a class, used if `tokenizer_config.json` names none.
    pub(crate) fn defaults(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Class::AsFiled => &[],
            Class::Llama => &[
                ("unk_token", "<unk>"),
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
            ],
            Class::CodeLlama => &[
                ("unk_token", "<unk>"),
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("prefix_token", "▁<PRE>"),
                ("middle_token", "▁<MID>"),
                ("suffix_token", "▁<SUF>"),
                ("eot_token", "▁<EOT>"),
                ("fill_token", "<FILL_ME>"),
            ],
            Class::Qwen2 => &[
                ("unk_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("pad_token", "<|endoftext|>"),
            ],
            Class::Gemma => &[
                ("unk_token", "<unk>"),
                ("bos_token", "<bos>"),
                ("eos_token", "<eos>"),
                ("pad_token", "<pad>"),
                ("mask_token", "<mask>"),
            ],
            Class::Gpt2 => &[
                ("unk_token", "<|endoftext|>"),
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
            ],
            Class::GptNeoX => &[
                ("unk_token", "<|endoftext|>"),
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("pad_token", "<|padding|>"),
            ],
        }
    }

    /// Returns the tokenizer that this class builds from `filed`, without added tokens; `None` if
    /// it is `filed` itself. `config` is `tokenizer_config.json`, `unknown` the unknown token.
    pub(crate) fn rebuild(
        self,
        filed: &Tokenizer,
        config: &Value,
        unknown: Option<&str>,
    ) -> Result<Option<Tokenizer>, CalibrationError> {
        let ModelWrapper::BPE(model) = filed.get_model() else {
            return Ok(None);
        };
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
        let spaces = |strip: bool| {
            let mut decoders = vec![
                json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                json!({"type": "ByteFallback"}),
                json!({"type": "Fuse"}),
            ];
            if strip {
                decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
            }
            json!({"type": "Sequence", "decoders": decoders})
        };
        let bytes = |space: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": regex});
        let nfc = json!({"type": "NFC"});
        let split = |pattern: Value, behavior: &str| json!({"type": "Split", "pattern": pattern, "behavior": behavior, "invert": false});
        let (normalizer, pre_tokenizer, decoder) = match self {
            Class::AsFiled => return Ok(None),
            Class::Llama => {
                let space = flag("add_prefix_space").unwrap_or(true);
                let scheme = match space {
                    false => "never",
                    true if flag("legacy").unwrap_or(false) => "always",
                    true => "first",
                };
                (None, metaspace(scheme), spaces(space))
            }
            Class::CodeLlama => {
                let space = flag("add_prefix_space").unwrap_or(true);
                (
                    None,
                    metaspace(if space { "first" } else { "never" }),
                    spaces(true),
                )
            }
            Class::Qwen2 => {
                let space = flag("add_prefix_space").unwrap_or(false);
                let parts = [
                    split(json!({"Regex": QWEN2}), "Isolated"),
                    bytes(space, false),
                ];
                let parts = json!({"type": "Sequence", "pretokenizers": parts});
                (Some(nfc), parts, bytes(true, true))
            }
            Class::Gemma => (
                Some(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})),
                split(json!({"String": " "}), "MergedWithPrevious"),
                spaces(false),
            ),
            Class::Gpt2 => (
                None,
                bytes(flag("add_prefix_space").unwrap_or(false), true),
                bytes(true, true),
            ),
            Class::GptNeoX => {
                let space = flag("add_prefix_space").unwrap_or(false);
                (Some(nfc), bytes(space, true), bytes(true, true))
            }
        };
        let mut model = model.clone();
        model.dropout = None;
        model.ignore_merges = false;
        (model.continuing_subword_prefix, model.end_of_word_suffix) = (None, None);
        let has_spaces = matches!(self, Class::Llama | Class::CodeLlama | Class::Gemma);
        (model.fuse_unk, model.byte_fallback) = (has_spaces, has_spaces);
        model.unk_token = match self {
            Class::Gemma | Class::CodeLlama => unknown.map(str::to_owned),
            _ => None,
        };
        let mut made = Tokenizer::new(model);
        made.with_normalizer(normalizer.map(part::<NormalizerWrapper>).transpose()?)
            .map_err(CalibrationError::tokenizer)?;
        made.with_pre_tokenizer(Some(part::<PreTokenizerWrapper>(pre_tokenizer)?));
        made.with_decoder(Some(part::<DecoderWrapper>(decoder)?));
        // This class adds nothing around a text, whatever the file says.
        let post_processor = filed
            .get_post_processor()
            .filter(|_| self != Class::GptNeoX);
        made.with_post_processor(post_processor.cloned() as Option<PostProcessorWrapper>);
        Ok(Some(made))
    }
}

/// Builds a part of a tokenizer from its JSON in `tokenizer.json`.
fn part<T: DeserializeOwned>(json: Value) -> Result<T, CalibrationError> {
    serde_json::from_value(json).map_err(|e| CalibrationError::tokenizer(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_type_decides_which_classes_count() {
        let llama = |model_type| Class::of(model_type, Some("LlamaTokenizer"), b"{}");
        for rebuilt in ["llama", "qwen3", "gemma", "smollm3", "olmoe", ""] {
            assert_eq!(llama(rebuilt), Class::Llama, "{rebuilt}");
        }
        for filed in ["mistral", "mixtral", "phi3", "olmo2", "granite", "glm4"] {
            assert_eq!(llama(filed), Class::AsFiled, "{filed}");
        }
        assert_eq!(llama("qwen2"), Class::Qwen2);
        let of = |model_type, class| Class::of(model_type, class, b"{}");
        assert_eq!(of("llama", Some("LlamaTokenizerFast")), Class::Llama);
        assert_eq!(of("llama", Some("PreTrainedTokenizerFast")), Class::AsFiled);
        assert_eq!(of("qwen2", Some("TokenizersBackend")), Class::Qwen2);
        assert_eq!(of("qwen3", Some("TokenizersBackend")), Class::AsFiled);
        assert_eq!(of("llama", None), Class::AsFiled);
        assert_eq!(of("qwen3", None), Class::Qwen2);
        let bytes = br#"{"decoder": {"type": "ByteLevel"}}"#;
        assert_eq!(
            Class::of("llama", Some("LlamaTokenizer"), bytes),
            Class::AsFiled
        );
    }

    #[test]
    fn every_class_can_be_made() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let path = root.join("tests/models/medi-tiny/tokenizer.json");
        let filed = Tokenizer::from_file(path).unwrap();
        for class in [
            Class::Llama,
            Class::CodeLlama,
            Class::Qwen2,
            Class::Gemma,
            Class::Gpt2,
            Class::GptNeoX,
        ] {
            let made = class
                .rebuild(&filed, &Value::Null, Some("<unk>"))
                .unwrap()
                .unwrap();
            assert!(
                !made.encode_fast("a", false).unwrap().is_empty(),
                "{class:?}"
            );
        }
        assert!(
            Class::AsFiled
                .rebuild(&filed, &Value::Null, None)
                .unwrap()
                .is_none()
        );
    }
}
