//! Token windows from text: rows of files, templates, tokenizer, seeded sampling, and a manifest
//! that records exactly what was used.
//!
//! Reading order: [`CalibrationSettings`] holds the settings, with [`Source`], [`RowRange`],
//! [`Rendering`] and [`Template`] as parts; [`TextTokenizer`] encodes; [`Calibration::draw`] does
//! it all and returns a [`Manifest`] with the windows; [`evaluation_tokens`] prepares text for
//! perplexity the same way. [`ChatTemplate`] renders a conversation, and [`TextDecoder`] decodes a
//! model's answer.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

mod added_tokens;
mod chat;
mod columnar;
mod columns;
mod conversation;
mod decode;
mod documents;
mod draw;
mod error;
mod evaluation;
mod first_look;
mod jinja;
mod json;
mod lenient_json;
mod manifest;
mod overlap;
mod parquet_file;
mod reader;
mod rendering;
mod row;
mod row_range;
mod settings;
mod small_file;
mod source;
mod source_file;
mod template;
mod thrift;
mod token_file;
mod token_rows;
mod tokenizer;
mod tokenizer_class;
mod value;
mod value_budget;

pub use chat::{ChatTemplate, Message};
pub use decode::TextDecoder;
pub use draw::Calibration;
pub use error::CalibrationError;
pub use evaluation::{EvaluationText, evaluation_tokens};
pub use first_look::first_look;
pub use jinja::{is_date, now};
pub use manifest::Manifest;
pub use overlap::{Overlap, RUN};
pub use rendering::Rendering;
pub use row::{EachRow, Row};
pub use row_range::RowRange;
pub use settings::{CalibrationSettings, OnError, Sampling};
pub use source::Source;
pub use source_file::HashedFile;
pub use template::Template;
pub use tokenizer::{Difference, SpecialToken, TextTokenizer};
pub use value::{Map, Value};
