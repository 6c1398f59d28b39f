//! Content hashes as git computes them.
//!
//! Git names a file by the SHA-1 of `"blob {size}\0"` and its bytes. A large file is held as a
//! pointer, a small text with the SHA-256 and the size of the content
//! (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>), and the tree lists the pointer's
//! hash, which therefore also follows from the content.
//!
//! The Hub's listing has the SHA-256 itself, as `lfs.oid`; `hf-hub` looks for it as `lfs.sha256`
//! and so drops it. The pointer is rebuilt instead of trusting the download's headers: its hash
//! comes with the listing, before the download, and from the Hub rather than from the storage
//! server.

use std::io::{self, Read};

use gptq_format::hexadecimal;
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::repo::Entry;

/// Both hashes of a content as it is read.
pub(crate) struct ContentHasher {
    git: Sha1,
    sha256: Sha256,
}

impl ContentHasher {
    /// Starts the hashes of a content of `size` bytes.
    pub(crate) fn new(size: u64) -> Self {
        let mut git = Sha1::new();
        git.update(format!("blob {size}\0"));
        ContentHasher {
            git,
            sha256: Sha256::new(),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        self.git.update(bytes);
        self.sha256.update(bytes);
    }

    /// Hashes all of `reader`; returns its length.
    pub(crate) fn update_from(&mut self, reader: &mut impl Read) -> io::Result<u64> {
        let mut piece = vec![0; 1 << 20];
        let mut total = 0;
        loop {
            let n = reader.read(&mut piece)?;
            if n == 0 {
                return Ok(total);
            }
            self.update(&piece[..n]);
            total += n as u64;
        }
    }

    pub(crate) fn sha256(self) -> String {
        hexadecimal(&self.sha256.finalize())
    }

    /// Returns the content's name in the cache if it matches `entry`: the SHA-256 of a large file,
    /// git's hash of any other.
    pub(crate) fn matches(self, entry: &Entry) -> Option<String> {
        let name = match entry.pointer {
            true => hexadecimal(&self.sha256.finalize()),
            false => hexadecimal(&self.git.finalize()),
        };
        is_named(&name, entry).then_some(name)
    }
}

/// Returns true if the cached content of this name belongs to `entry`.
pub(crate) fn is_named(name: &str, entry: &Entry) -> bool {
    match entry.pointer {
        true => pointer_oid(name, entry.size) == entry.oid,
        false => name == entry.oid,
    }
}

/// Returns git's hash of the pointer to a content.
fn pointer_oid(sha256: &str, size: u64) -> String {
    let pointer =
        format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
    let mut git = Sha1::new();
    git.update(format!("blob {}\0", pointer.len()));
    git.update(pointer);
    hexadecimal(&git.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_ones_git_gives() {
        // `printf 'hello\n' | git hash-object --stdin`.
        let entry = Entry {
            path: "a".into(),
            size: 6,
            oid: "ce013625030ba8dba906f756967f9e9ca394464a".into(),
            pointer: false,
        };
        let hash = |content: &[u8]| {
            let mut hasher = ContentHasher::new(content.len() as u64);
            hasher.update(content);
            hasher
        };
        assert_eq!(hash(b"hello\n").matches(&entry), Some(entry.oid.clone()));
        assert_eq!(hash(b"hallo\n").matches(&entry), None);
    }
}
