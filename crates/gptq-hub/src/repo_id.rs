//! Names and kinds of repositories.

use std::fmt;

/// `owner/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoId {
    owner: String,
    name: String,
}

/// Kind of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepoKind {
    /// Weights, config, tokenizer.
    Model,
    /// Rows.
    Dataset,
}

impl RepoId {
    /// Parses `owner/name`, both of letters, digits, `-`, `_` and `.`, starting with a letter or
    /// digit; otherwise `None`.
    pub fn parse(text: &str) -> Option<Self> {
        let (owner, name) = text.split_once('/')?;
        let valid = |part: &str| {
            part.len() <= 96
                && part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
                && !part.contains("..")
        };
        (valid(owner) && valid(name)).then(|| RepoId {
            owner: owner.into(),
            name: name.into(),
        })
    }

    /// Returns the part before the slash.
    pub(crate) fn owner(&self) -> &str {
        &self.owner
    }

    /// Returns the part after the slash.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RepoKind::Model => "model",
            RepoKind::Dataset => "dataset",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_owner_and_name_make_a_repository() {
        for text in ["epfl-llm/meditron-7b", "a/b", "TheBloke/Llama-2-7B.GPTQ_x"] {
            assert_eq!(RepoId::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "meditron", "a/b/c", "/a", "a/", "./a", "../a", "a/..", "a b/c", "a/.b", "a/b..c",
            "a\\b/c",
        ] {
            assert!(RepoId::parse(text).is_none(), "{text}");
        }
    }
}
