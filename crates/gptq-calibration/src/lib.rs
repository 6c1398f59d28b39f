//! Text to token windows: rows, template, tokenizer, seeded sampling, and a manifest that says
//! exactly what went in.
//!
//! Reading order: [`CalibrationSettings`] says what is wanted, [`Template`] and [`RowRange`] are
//! its parts, [`TextTokenizer`] encodes, [`Calibration::draw`] does it all; [`evaluation_tokens`] prepares
//! text for perplexity the same way. [`ChatTemplate`] writes a conversation as a model knows it,
//! and [`TextDecoder`] turns its answer back into text.

mod chat;
mod decode;
mod draw;
mod error;
mod source;
mod template;
mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use decode::TextDecoder;
pub use draw::{Calibration, CalibrationSettings, Manifest, Sampling, evaluation_tokens};
pub use error::CalibrationError;
pub use source::RowRange;
pub use template::Template;
pub use tokenizer::TextTokenizer;
