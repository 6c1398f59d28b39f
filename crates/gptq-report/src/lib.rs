//! The HTML report, its tables, and the model card, computed from the files of finished branches;
//! nothing here runs a model.
//!
//! Reading order: [`Matrix`] reads the branches below a directory; [`rows`] are its numbers as a
//! table, written as CSV and JSON; [`html`] is the page; [`card()`] renders the repository's
//! `README.md` from [`facts`].

#![forbid(unsafe_code)]

mod accuracy;
mod base_card;
mod branch_page;
mod card;
mod description;
mod error;
mod expert_map;
mod heat_map;
mod html;
mod matrix;
mod measured;
mod number;
mod plot;
mod prompt;
mod provenance;
mod table;

pub use accuracy::Accuracy;
pub use card::{CardSettings, Facts, card, facts};
pub use error::ReportError;
pub use html::html;
pub use matrix::{Branch, Matrix};
pub use measured::{Measured, Windows};
pub use number::decimal_size;
pub use prompt::PromptTemplate;
pub use table::{BranchRow, csv, rows};
