//! Models and datasets from the Hugging Face Hub, into the cache that every Hugging Face tool
//! shares; finished branches to it.
//!
//! Requests, pages, redirects, retries and credentials are `hf-hub`'s. Its own file download
//! neither resumes a file nor checks what came, so the bytes are streamed here, resumed where they
//! broke off, and compared with the hash that git has of them.
//!
//! Reading order: [`RepoId`] names a repository, [`Hub`] is the connection, [`Hub::model`] and
//! [`Hub::dataset`] make a [`Snapshot`]; [`Hub::upload`] brings a [`LocalFile`] list there.

#![forbid(unsafe_code)]

mod cache;
mod content;
mod download;
mod error;
mod files;
mod hub;
mod listing;
mod publish;
mod repo;

pub use download::Progress;
pub use error::HubError;
pub use files::DataFiles;
pub use hub::{Hub, HubSettings, STALL, Snapshot};
pub use publish::{Changes, LocalFile};
pub use repo::{Kind, RepoId};
