//! Verified storage of compiled kernels, so that no process passes truncated, changed or unfinished
//! files to the driver.
//!
//! ```text
//! HOME/                     one build of the program, one compute capability
//!   set-{pid}-{time}/       a finished set of files, never written to again
//!     seal                  a line per file: SHA-256, length, path
//!   run-{pid}-{time}/       one process's own copy, which it adds to
//!     lock                  held as long as that process lives
//! ```
//!
//! A process reads the newest set, checks every file against the seal, and works on a copy of the
//! checked bytes. The kernels it compiled become a new set, synced before it is renamed. An invalid
//! set is removed, and its kernels are compiled again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use gptq_format::sha256;

const SEAL: &str = "seal";
const LOCK: &str = "lock";
/// File whose modification time shows when a build was last used.
const USED: &str = "used";
/// Age below which a directory without a lock may belong to a process that is about to lock it.
const YOUNG: Duration = Duration::from_secs(3600);

/// Files by path within a set.
type Files = BTreeMap<String, Vec<u8>>;

/// A process's own copy of the cached kernels.
pub(crate) struct KernelStore {
    home: PathBuf,
    own: PathBuf,
    /// Prevents other processes from removing `own`.
    _lock: File,
}

impl KernelStore {
    /// Copies the newest valid set of `home`; an empty store if there is none.
    ///
    /// # Errors
    /// `home` cannot be written to.
    pub(crate) fn open(home: &Path) -> io::Result<Self> {
        fs::create_dir_all(home)?;
        remove_abandoned(home);
        let own = home.join(unique("run"));
        fs::create_dir(&own)?;
        let lock = File::create(own.join(LOCK))?;
        lock.try_lock()?;
        let store = KernelStore {
            home: home.to_owned(),
            own,
            _lock: lock,
        };
        for set in sets(home) {
            match read(&set).and_then(|files| store.fill(&files)) {
                Ok(()) => break,
                // Another process may remove it at the same time; errors are ignored.
                Err(_) => drop(fs::remove_dir_all(&set)),
            }
        }
        Ok(store)
    }

    /// Returns the directory of this process's kernels.
    pub(crate) fn directory(&self) -> &Path {
        &self.own
    }

    /// Saves the current files as a new set, unless the newest set is equal.
    pub(crate) fn seal(&self) -> io::Result<()> {
        let files = files_below(&self.own)?;
        let sets = sets(&self.home);
        let same = |set: &PathBuf| fs::read_to_string(set.join(SEAL)).ok() == Some(lines(&files));
        if files.is_empty() || sets.first().is_some_and(same) {
            return Ok(());
        }
        let place = self.home.join(unique("set"));
        let part = place.with_extension("partial");
        write(&part, &files)
            .and_then(|()| fs::rename(&part, &place))
            .and_then(|()| File::open(&self.home)?.sync_all())
            .inspect_err(|_| drop(fs::remove_dir_all(&part)))?;
        for old in sets {
            let _ = fs::remove_dir_all(old);
        }
        Ok(())
    }

    fn fill(&self, files: &Files) -> io::Result<()> {
        for (name, bytes) in files {
            let path = self.own.join(name);
            path.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(path, bytes)?;
        }
        Ok(())
    }
}

impl Drop for KernelStore {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.own);
    }
}

/// Records that a build is in use, and removes sibling builds unused for `most`.
pub(crate) fn expire(build: &Path, most: Duration) {
    let _ = fs::create_dir_all(build).and_then(|()| fs::write(build.join(USED), ""));
    let beside = build.parent().map(fs::read_dir);
    for other in beside.into_iter().flatten().flatten().flatten() {
        let path = other.path();
        let name = other.file_name();
        if path != build && name.to_str().is_some_and(is_build) && age(&path) > Some(most) {
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// Returns true for names of this program's builds: `{version}-{hex}-{hex}`.
fn is_build(name: &str) -> bool {
    let hex = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
    let mut parts = name.rsplitn(3, '-');
    let (time, size, version) = (parts.next(), parts.next(), parts.next());
    time.is_some_and(hex)
        && size.is_some_and(hex)
        && version.is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()))
}

/// Returns the time since a build was used, or, for old builds without that record, created.
fn age(build: &Path) -> Option<Duration> {
    let used = fs::metadata(build.join(USED)).or_else(|_| fs::metadata(build));
    used.ok()?.modified().ok()?.elapsed().ok()
}

/// Returns a name that is unique among processes.
fn unique(kind: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default().as_nanos();
    format!("{kind}-{}-{now:032x}", std::process::id())
}

fn entries(home: &Path, kind: &str) -> Vec<PathBuf> {
    let all = fs::read_dir(home).into_iter().flatten().flatten();
    let of_kind = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(kind) && !name.ends_with(".partial"))
    };
    all.map(|entry| entry.path()).filter(of_kind).collect()
}

/// Returns the finished sets, the newest first.
fn sets(home: &Path) -> Vec<PathBuf> {
    let mut sets = entries(home, "set-");
    let time = |path: &PathBuf| path.to_string_lossy().rsplit('-').next().map(str::to_owned);
    sets.sort_by_key(|path| std::cmp::Reverse(time(path)));
    sets
}

/// Removes the copies of processes that have ended.
fn remove_abandoned(home: &Path) {
    for run in entries(home, "run-") {
        let gone = match File::open(run.join(LOCK)) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(_) => age(&run) > Some(YOUNG),
        };
        if gone {
            let _ = fs::remove_dir_all(run);
        }
    }
}

/// Reads the files of a set, each verified against the seal.
fn read(set: &Path) -> io::Result<Files> {
    let seal = fs::read_to_string(set.join(SEAL))?;
    let mut files = Files::new();
    for line in seal.lines() {
        let mut words = line.splitn(3, ' ');
        let mut word = || words.next().ok_or(io::ErrorKind::InvalidData);
        let (digest, length, name) = (word()?, word()?, word()?);
        let inside = |part| matches!(part, Component::Normal(_));
        if !Path::new(name).components().all(inside) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let path = set.join(name);
        let meta = fs::symlink_metadata(&path)?;
        if !meta.is_file() || meta.len().to_string() != length {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let bytes = fs::read(&path)?;
        if sha256(&bytes) != digest {
            return Err(io::ErrorKind::InvalidData.into());
        }
        files.insert(name.to_owned(), bytes);
    }
    // The seal may be truncated at the end of a line.
    if lines(&files) != seal {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(files)
}

/// Writes and syncs a set.
fn write(set: &Path, files: &Files) -> io::Result<()> {
    let mut directories = vec![set.to_owned()];
    for (name, bytes) in files {
        let path = set.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
            directories.push(parent.to_owned());
        }
        write_synced(&path, bytes)?;
    }
    fs::create_dir_all(set)?;
    write_synced(&set.join(SEAL), lines(files).as_bytes())?;
    directories
        .iter()
        .try_for_each(|it| File::open(it)?.sync_all())
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    fs::write(path, bytes)?;
    File::open(path)?.sync_all()
}

/// Formats the seal of these files: their number, then each.
fn lines(files: &Files) -> String {
    let lines = files.iter().map(|(name, bytes)| {
        let digest = sha256(bytes);
        format!("{digest} {} {name}\n", bytes.len())
    });
    lines.collect()
}

/// Reads every file below a process's own directory except its lock.
fn files_below(own: &Path) -> io::Result<Files> {
    let mut files = Files::new();
    let mut directories = vec![own.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let name = path.strip_prefix(own).ok().and_then(Path::to_str);
            if let Some(name) = name.filter(|name| *name != LOCK) {
                files.insert(name.to_owned(), fs::read(&path)?);
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &[u8] = b".version 8.0\n.entry f() {}\0";

    /// Makes a home with one set of two files.
    fn home() -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        let store = KernelStore::open(home.path()).unwrap();
        fs::write(store.directory().join("f.ptx"), PTX).unwrap();
        fs::create_dir_all(store.directory().join("cuda/ptx")).unwrap();
        fs::write(store.directory().join("cuda/ptx/chunk0.cbor"), b"abc").unwrap();
        store.seal().unwrap();
        home
    }

    fn set(home: &Path) -> PathBuf {
        let [set] = &sets(home)[..] else {
            panic!("one set: {:?}", sets(home));
        };
        set.clone()
    }

    #[test]
    fn a_sealed_set_comes_back_byte_for_byte_and_an_unsealed_one_not_at_all() {
        let home = home();
        let store = KernelStore::open(home.path()).unwrap();
        let files = files_below(store.directory()).unwrap();
        assert_eq!(files["f.ptx"], PTX);
        assert_eq!(files["cuda/ptx/chunk0.cbor"], b"abc");
        // Files added by a killed process stay in its own directory.
        fs::write(store.directory().join("g.ptx"), b"half").unwrap();
        let own = store.directory().to_owned();
        drop(store);
        assert!(!own.exists());
        let store = KernelStore::open(home.path()).unwrap();
        assert_eq!(files_below(store.directory()).unwrap(), files);
        // Without new files no new set is made.
        let before = set(home.path());
        store.seal().unwrap();
        assert_eq!(set(home.path()), before);
        fs::write(store.directory().join("g.ptx"), PTX).unwrap();
        store.seal().unwrap();
        assert_ne!(set(home.path()), before);
    }

    #[test]
    fn a_set_that_was_damaged_anywhere_is_not_used_and_is_removed() {
        type Damage = fn(&Path);
        let damages: [(&str, Damage); 8] = [
            ("cut", |set| {
                fs::write(set.join("f.ptx"), &PTX[..9]).unwrap()
            }),
            ("empty", |set| fs::write(set.join("f.ptx"), b"").unwrap()),
            ("without its NUL", |set| {
                fs::write(set.join("f.ptx"), &PTX[..PTX.len() - 1]).unwrap();
            }),
            ("flipped", |set| {
                let mut bytes = PTX.to_vec();
                bytes[3] ^= 1;
                fs::write(set.join("f.ptx"), bytes).unwrap();
            }),
            ("gone", |set| fs::remove_file(set.join("f.ptx")).unwrap()),
            ("a longer chunk", |set| {
                fs::write(set.join("cuda/ptx/chunk0.cbor"), b"abcd").unwrap();
            }),
            ("no seal", |set| fs::remove_file(set.join(SEAL)).unwrap()),
            ("a cut seal", |set| {
                let seal = fs::read_to_string(set.join(SEAL)).unwrap();
                fs::write(set.join(SEAL), &seal[..seal.len() - 5]).unwrap();
            }),
        ];
        for (what, damage) in damages {
            let home = home();
            damage(&set(home.path()));
            let store = KernelStore::open(home.path()).unwrap();
            let left = files_below(store.directory()).unwrap();
            assert!(left.is_empty(), "{what}: {left:?}");
            assert!(sets(home.path()).is_empty(), "{what}");
            // The kernels compiled instead are cached again.
            fs::write(store.directory().join("f.ptx"), PTX).unwrap();
            store.seal().unwrap();
            assert!(set(home.path()).join(SEAL).is_file(), "{what}");
        }
    }

    #[test]
    fn a_seal_leads_to_no_file_outside_its_set() {
        let home = home();
        fs::write(home.path().join("outside"), PTX).unwrap();
        let seal = format!("{} {} ../outside\n", sha256(PTX), PTX.len());
        fs::write(set(home.path()).join(SEAL), seal).unwrap();
        let store = KernelStore::open(home.path()).unwrap();
        assert!(files_below(store.directory()).unwrap().is_empty());
        assert!(home.path().join("outside").is_file());
    }

    #[test]
    fn two_processes_at_once_have_a_copy_each_and_a_dead_ones_is_removed() {
        let home = home();
        let [a, b] = [(); 2].map(|()| KernelStore::open(home.path()).unwrap());
        fs::write(a.directory().join("a.ptx"), PTX).unwrap();
        fs::write(b.directory().join("b.ptx"), PTX).unwrap();
        a.seal().unwrap();
        b.seal().unwrap();
        // The last set is complete.
        let files = read(&set(home.path())).unwrap();
        assert!(files.contains_key("b.ptx") && files.contains_key("f.ptx"));
        // Directory of a killed process, whose lock was released.
        let dead = home.path().join("run-1-0");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();
        let c = KernelStore::open(home.path()).unwrap();
        assert!(!dead.exists());
        for alive in [&a, &b, &c] {
            assert!(alive.directory().is_dir());
        }
    }

    #[test]
    fn builds_expire_by_age_and_nothing_else_is_touched() {
        let root = tempfile::tempdir().unwrap();
        let make = |name: &str, days: u64| {
            let path = root.path().join(name);
            fs::create_dir_all(path.join("sm_90")).unwrap();
            fs::write(path.join(USED), "").unwrap();
            let then = SystemTime::now() - Duration::from_secs(days * 86_400);
            let used = File::options().write(true).open(path.join(USED));
            used.unwrap().set_modified(then).unwrap();
            path
        };
        let own = root.path().join("0.1.0-5a-6b");
        let young = make("0.1.0-1a-2b", 29);
        let old = make("0.0.9-3c-4d", 31);
        let other = make("something-else", 1000);
        expire(&own, Duration::from_secs(30 * 86_400));
        assert!(own.join(USED).is_file() && young.is_dir() && other.is_dir());
        assert!(!old.exists());
    }
}
