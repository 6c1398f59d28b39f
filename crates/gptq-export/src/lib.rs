//! Finished branches in other formats: codes and scales as they are, nothing rounded again.
//!
//! Reading order: [`ExportSource`] is a quantized checkpoint of any tool, opened and compared with its config;
//! [`check`] says beforehand whether a format can hold it; [`write_directory`] writes a directory,
//! [`write_gguf`] one file for llama.cpp.

#![forbid(unsafe_code)]

mod batches;
mod directory;
mod error;
mod gguf;
mod pre_tokenizer;
mod sentencepiece;
mod source;
mod vocabulary;

pub use directory::{check, write_directory};
pub use error::ExportError;
pub use gguf::{check_gguf, check_tokenizer, write_gguf};
pub use gptq_spec::TableType;
pub use source::ExportSource;
