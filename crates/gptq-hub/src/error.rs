//! Errors of this crate: each message is one line and ends with a remedy.

use std::io;
use std::path::PathBuf;

use gptq_format::FormatError;
use hf_hub::HFError;
use thiserror::Error;

use crate::RepoKind;

/// Maximum number of characters quoted from a server's message.
const MOST_SAID: usize = 200;

/// Reason why a download from or an upload to the Hub failed.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum HubError {
    #[error(
        "no {kind} {id} at {endpoint}, and no such local path; check its name, or set HF_TOKEN if it \
         is private"
    )]
    NoRepo {
        id: String,
        kind: RepoKind,
        endpoint: String,
    },
    #[error("{id} has no revision {revision:?}; name a branch, tag or commit of it")]
    NoRevision { id: String, revision: String },
    #[error(
        "{id} is gated, and this account has no access; accept its terms at {page}, then set HF_TOKEN"
    )]
    Gated { id: String, page: String },
    #[error(
        "{id} is not accessible to this account, or does not exist; check its name, and set HF_TOKEN to a \
         token that may read it (or write it, to publish)"
    )]
    Closed { id: String },
    #[error(
        "{endpoint} limits the rate of requests; run again {when}: the partial download is kept"
    )]
    Slower { endpoint: String, when: String },
    #[error(
        "{endpoint} cannot be reached ({reason}); check the network and HF_ENDPOINT; the partial download is \
         kept"
    )]
    Unreachable { endpoint: String, reason: String },
    #[error(
        "{endpoint} has sent nothing for {seconds} s; check the network, and run again: the partial download \
         is kept"
    )]
    Silent { endpoint: String, seconds: u64 },
    #[error("{endpoint} answered {status} for {id}; run again later: the partial download is kept")]
    Refused {
        endpoint: String,
        id: String,
        status: u16,
    },
    #[error(
        "{endpoint} answered {status} for {id}{said}; retrying will not help: check its \
         name, its revision and HF_ENDPOINT, or name another copy of it"
    )]
    Denied {
        endpoint: String,
        id: String,
        status: u16,
        said: String,
    },
    #[error(
        "HF_HUB_OFFLINE is set, and {id} at {revision:?} is not complete in {} ({missing}); run once \
         without it",
        cache.display()
    )]
    Offline {
        id: String,
        revision: String,
        cache: PathBuf,
        missing: String,
    },
    #[error("{repo} lists a file named {path:?}, which is not a safe path; nothing was downloaded")]
    Entry { repo: String, path: String },
    #[error("{repo} lists more than {most} files; nothing was downloaded")]
    TooManyFiles { repo: String, most: usize },
    #[error("{repo} has neither safetensors nor PyTorch weights; name another model")]
    NoWeights { repo: String },
    #[error("{repo} has no {file}, which its index names; name another revision")]
    Missing { repo: String, file: String },
    #[error("{repo} has no file of rows in a supported format; download it and name a local file")]
    NoRows { repo: String },
    #[error("{repo} has files of several kinds ({kinds}); choose some with files = \"*.{first}\"")]
    SeveralKinds {
        repo: String,
        kinds: String,
        first: String,
    },
    #[error("{repo} has rows in several directories; choose one of {choices}")]
    SeveralPlaces { repo: String, choices: String },
    #[error("files = {pattern:?}: {reason}")]
    Pattern { pattern: String, reason: String },
    #[error(
        "{repo}: {file} was received {} its {size} bytes; run again, or check for a proxy between this machine and the Hub",
        if *too_long { "longer than" } else { "with a wrong hash, in" }
    )]
    Content {
        repo: String,
        file: String,
        size: u64,
        too_long: bool,
    },
    #[error("{file} ended after {at} of {size} bytes; run again: the partial download is kept")]
    Short { file: String, size: u64, at: u64 },
    #[error(
        "{}: the disk is full; make room, or set HF_HUB_CACHE (or HF_HOME) to a disk with space: the \
         partial download is kept",
        path.display()
    )]
    Full { path: PathBuf },
    #[error(
        "another process holds the lock {} of a needed file, and the cache is not growing; wait \
         for it to end, then run again",
        path.display()
    )]
    Busy { path: PathBuf },
    #[error(
        "{id}: the server offers its files only by the Xet protocol, which failed ({reason}); run \
         again, or download {id} with another tool and name its directory"
    )]
    Xet { id: String, reason: String },
    #[error(
        "the token (HF_TOKEN, or the login file) is not valid: {why}; set HF_TOKEN to the token alone, \
         such as hf_..."
    )]
    Token { why: &'static str },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("{id}: {reason}")]
    Other { id: String, reason: String },
}

/// Context of a request, for error messages.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub id: String,
    pub kind: RepoKind,
    pub revision: String,
    pub endpoint: String,
}

impl HubError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl Fn(io::Error) -> Self {
        let path: PathBuf = path.into();
        move |source| {
            let path = path.clone();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    HubError::Full { path }
                }
                _ => HubError::Io { path, source },
            }
        }
    }

    /// Converts an error of the client into a message for the user.
    pub(crate) fn from_hub(error: HFError, context: Context) -> Self {
        let Context {
            id,
            kind,
            revision,
            endpoint,
        } = context;
        if let Some(reason) = xet(&error) {
            return HubError::Xet { id, reason };
        }
        let no_repo = |code: &Option<String>| code.as_deref() == Some("RepoNotFound");
        match error {
            HFError::RevisionNotFound {
                context: Some(http),
                ..
            } if !no_repo(&http.error_code) => HubError::NoRevision { id, revision },
            HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } => {
                HubError::NoRepo { id, kind, endpoint }
            }
            HFError::AuthRequired { context: http } | HFError::Forbidden { context: http } => {
                match http.error_code.as_deref() {
                    Some("GatedRepo") => HubError::Gated {
                        page: match kind {
                            RepoKind::Model => format!("{endpoint}/{id}"),
                            RepoKind::Dataset => format!("{endpoint}/datasets/{id}"),
                        },
                        id,
                    },
                    _ => HubError::Closed { id },
                }
            }
            HFError::RateLimited { retry_after, .. } => HubError::Slower {
                endpoint,
                when: match retry_after {
                    Some(wait) => format!("in {} s", wait.as_secs()),
                    None => "later".to_owned(),
                },
            },
            HFError::Http { context: http } => match http.status.as_u16() {
                404 if http.error_code.as_deref() == Some("RevisionNotFound") => {
                    HubError::NoRevision { id, revision }
                }
                404 => HubError::NoRepo { id, kind, endpoint },
                // Timeout, too early and rate limit are temporary.
                status @ 400..500 if ![408, 425, 429].contains(&status) => HubError::Denied {
                    endpoint,
                    id,
                    status,
                    said: said(http.server_message.as_deref()),
                },
                status => HubError::Refused {
                    endpoint,
                    id,
                    status,
                },
            },
            HFError::Request { source, .. } => HubError::Unreachable {
                endpoint,
                reason: innermost(&source),
            },
            other => HubError::Other {
                id,
                reason: other.to_string().replace('\n', "; "),
            },
        }
    }

    /// Returns true if the Hub could not be reached at all.
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(self, HubError::Unreachable { .. } | HubError::Silent { .. })
    }
}

/// Returns the reason if the Xet protocol failed. The client switches to it by itself where the
/// storage server names a Xet hash, and first asks the Hub for a token.
fn xet(error: &HFError) -> Option<String> {
    let http = match error {
        HFError::Xet { source, .. } => return Some(innermost(source.as_ref())),
        HFError::Http { context }
        | HFError::AuthRequired { context }
        | HFError::Forbidden { context }
        | HFError::RepoNotFound {
            context: Some(context),
            ..
        } => context,
        _ => return None,
    };
    let asked = http.url.contains("/xet-read-token/");
    asked.then(|| format!("{} for a token", http.status.as_u16()))
}

/// Formats a server's own message as a suffix in parentheses.
fn said(message: Option<&str>) -> String {
    let message = message.unwrap_or_default().trim();
    let line: String = message
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MOST_SAID)
        .collect();
    match line.is_empty() {
        true => line,
        false => format!(" ({line})"),
    }
}

/// Returns the innermost message of an error: "connection refused" rather than "request failed".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string().replace('\n', "; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named_with_where_to_go() {
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
            let line = HubError::io("/cache/blobs/1")(kind.into()).to_string();
            for word in ["/cache/blobs/1", "full", "HF_HUB_CACHE", "HF_HOME"] {
                assert!(line.contains(word), "{line}");
            }
        }
    }

    #[test]
    fn a_server_s_own_words_stay_within_the_line() {
        assert_eq!(said(None), "");
        assert_eq!(said(Some("not\nhere\u{1b}[0m")), " (not here [0m)");
        assert_eq!(said(Some(&"a".repeat(900))).len(), MOST_SAID + 3);
    }
}
