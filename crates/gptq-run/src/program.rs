//! The identity of the running program: two builds of one version may differ, while copies of one build are equal.

use std::fs::File;
use std::path::{Path, PathBuf};

use gptq_format::sha256_file;
use object::Object;
use object::read::ReadCache;

/// Returns the build ID that the linker has put into the running program, or its SHA-256 if it has none; `None` if it
/// cannot be read.
pub(crate) fn program() -> Option<String> {
    // The running executable, even if it has been replaced on disk.
    let running = PathBuf::from("/proc/self/exe");
    [Some(running), std::env::current_exe().ok()]
        .into_iter()
        .flatten()
        .find_map(|path| build_id(&path).or_else(|| sha256_file(&path).ok()))
}

/// Reads a few pages of the file, where hashing takes a tenth of a second and more.
fn build_id(path: &Path) -> Option<String> {
    let cache = ReadCache::new(File::open(path).ok()?);
    let file = object::File::parse(&cache).ok()?;
    let id = file.build_id().ok()??;
    Some(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_has_the_same_identity_each_time_and_a_text_has_no_build_id() {
        let own = program().unwrap();
        assert!(own.len() >= 16 && own.bytes().all(|it| it.is_ascii_hexdigit()));
        assert_eq!(program(), Some(own));
        let text = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(text.path(), "no program").unwrap();
        assert_eq!(build_id(text.path()), None);
    }
}
