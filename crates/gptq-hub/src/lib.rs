//! Downloads of models and datasets from the Hugging Face Hub, into the cache that all Hugging Face
//! tools share, and uploads of finished branches.
//!
//! `hf-hub` handles requests, pagination, redirects, retries and credentials. Its own file download
//! neither resumes a file nor verifies it, so the bytes are streamed here, resumed after
//! interruptions, and compared with git's hash of them.
//!
//! Reading order: [`RepoId`] names a repository, [`Hub`] is the connection, [`Hub::model`] and
//! [`Hub::dataset`] return a [`Snapshot`]; [`upload`] uploads a list of [`LocalFile`]s.

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
mod repo_id;

pub use download::DownloadProgress;
pub use error::HubError;
pub use files::DataFiles;
pub use hub::{Hub, HubSettings, STALL, Snapshot};
pub use publish::{Changes, LocalFile, changes, create_repo, create_revision, upload};
pub use repo_id::{RepoId, RepoKind};
