//! A file mapped for reading, and what happens when it shrinks meanwhile.
//!
//! A page of a map that its file no longer has cannot be read: the kernel sends SIGBUS, which would end
//! the process without a word. The handler installed here with the first map looks whether the address
//! lies in a map of ours; then it says in one line which file that is, and ends the process with status 1.
//! Anything else is left to whoever handled the signal before.
#![expect(unsafe_code, reason = "memory maps, and the signal that comes of them")]

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::mem::MaybeUninit;
use std::ops::{Deref, Range};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Once, OnceLock};

use memmap2::{Mmap, UncheckedAdvice};

use crate::FormatError;

/// Maps that are watched at a time; further ones end the process without a line. Two checkpoints of
/// the most shards are fewer.
const WATCHED: usize = 10_000;

/// Bytes before and after one that is read which the kernel may map along with it: `fault_around_bytes`, as
/// it is unless somebody changes it.
const AROUND: usize = 64 << 10;

/// A mapped file's bytes.
pub(crate) struct MappedFile {
    /// Dropped before the map.
    _watch: Option<Watch>,
    map: Mmap,
}

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(FormatError::io(path))?;
        // SAFETY: the map is read-only and private to this value. That another process writes to the
        // file while it is mapped cannot be kept out, as in every program that maps checkpoints; if it
        // is shortened, the handler ends the process.
        let map = unsafe { Mmap::map(&file) }.map_err(FormatError::io(path))?;
        let line = format!(
            "gptq: {}: became shorter while it was read, or its disk failed; restore it, then run the \
             same command again\n",
            path.display()
        );
        Ok(MappedFile {
            _watch: Watch::new(&map, line),
            map,
        })
    }

    /// Lets the process's memory go that these bytes took; they are read from the file again if they are
    /// needed again.
    pub(crate) fn give_back(&self, bytes: Range<usize>) {
        if bytes.start >= bytes.end || bytes.end > self.map.len() {
            return;
        }
        let start = bytes.start.saturating_sub(AROUND);
        let end = self.map.len().min(bytes.end.saturating_add(AROUND));
        // SAFETY: of a map of a file that nobody writes to through it, the pages' contents are the
        // file's before and after. A neighbour's, given back along with them, are read again.
        let advised = unsafe {
            self.map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
        };
        // Without it, the memory stays until the kernel wants it.
        let _ = advised;
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// The addresses of a map, and what to say when one cannot be read. All in atomics: a signal handler may
/// take no lock.
struct Slot {
    /// Where the map starts; [`FREE`] or [`TAKEN`] where there is none.
    start: AtomicUsize,
    end: AtomicUsize,
    line: AtomicPtr<String>,
}

/// No address of a map.
const FREE: usize = 0;
/// About to be filled in.
const TAKEN: usize = 1;

static SLOTS: [Slot; WATCHED] = [const {
    Slot {
        start: AtomicUsize::new(FREE),
        end: AtomicUsize::new(0),
        line: AtomicPtr::new(null_mut()),
    }
}; WATCHED];

impl Slot {
    /// What to say about `address`, if it is one of the map's.
    fn line(&self, address: usize) -> Option<&String> {
        let start = self.start.load(Ordering::SeqCst);
        let end = self.end.load(Ordering::SeqCst);
        let line = self.line.load(Ordering::SeqCst);
        // Not changed between the three.
        let same = self.start.load(Ordering::SeqCst) == start;
        if !same || start <= TAKEN || !(start..end).contains(&address) {
            return None;
        }
        // SAFETY: the thread that is being served was reading `address`, so the map it lies in is
        // borrowed there, is not dropped before this returns, and nor is its line.
        unsafe { line.as_ref() }
    }
}

/// Held as long as a map.
struct Watch(&'static Slot);

impl Watch {
    /// `None` where too many maps are watched already.
    fn new(map: &Mmap, line: String) -> Option<Self> {
        let take = |slot: &&Slot| {
            let taken =
                (slot.start).compare_exchange(FREE, TAKEN, Ordering::SeqCst, Ordering::SeqCst);
            taken.is_ok()
        };
        let slot = SLOTS.iter().find(take)?;
        let addresses = map.as_ptr_range();
        slot.end.store(addresses.end as usize, Ordering::SeqCst);
        let line = Box::into_raw(Box::new(line));
        slot.line.store(line, Ordering::SeqCst);
        slot.start.store(addresses.start as usize, Ordering::SeqCst);
        Some(Watch(slot))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.start.store(TAKEN, Ordering::SeqCst);
        let line = self.0.line.swap(null_mut(), Ordering::SeqCst);
        // SAFETY: made by `Watch::new` of a box, and taken out by nobody else.
        drop(unsafe { Box::from_raw(line) });
        self.0.start.store(FREE, Ordering::SeqCst);
    }
}

/// Who handled the signal before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Installs the handler of SIGBUS described in `mapped_file.rs`: it ends the **process** when a mapped weight
/// file became shorter while it was read. For programs, at their start; a library has no business with its
/// host's signals, so nothing here calls it. Where it cannot be installed, all stays as it was; a second call
/// does nothing.
pub fn install_sigbus_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(install);
}

fn install() {
    let mut before = MaybeUninit::uninit();
    // SAFETY: reads the action into memory of its type; zeroes are an action, the default; the handler
    // has the signature that SA_SIGINFO asks for.
    unsafe {
        if libc::sigaction(libc::SIGBUS, std::ptr::null(), before.as_mut_ptr()) != 0 {
            return;
        }
        let _ = BEFORE.set(before.assume_init());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, null_mut());
    }
}

/// Calls nothing that a signal handler may not call.
extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    static ENDING: AtomicBool = AtomicBool::new(false);
    // SAFETY: the kernel hands a handler with SA_SIGINFO what it knows of the signal; the calls are
    // async-signal-safe, their arguments alive.
    unsafe {
        let of_address = (*info).si_code == libc::BUS_ADRERR;
        let address = (*info).si_addr() as usize;
        let found = SLOTS.iter().find_map(|slot| slot.line(address));
        if let (true, Some(line)) = (of_address, found) {
            // Several threads may read one file: one of them speaks.
            while ENDING.swap(true, Ordering::SeqCst) {
                libc::pause();
            }
            libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
            libc::_exit(1);
        }
        // Comes again at once, and meets whoever was there before.
        let default: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, BEFORE.get().unwrap_or(&default), null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_told_by_the_map_it_lies_in_and_by_none_once_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let line = |address: usize| SLOTS.iter().find_map(|slot| slot.line(address)).cloned();
        let maps = ["a", "b"].map(|name| {
            let path = dir.path().join(name);
            std::fs::write(&path, vec![1; 10_000]).unwrap();
            MappedFile::open(&path).unwrap()
        });
        for (map, name) in maps.iter().zip(["/a: ", "/b: "]) {
            for at in [0, 9_999] {
                let said = line(map.as_ptr() as usize + at).unwrap();
                assert!(said.contains(name) && said.ends_with('\n'), "{said}");
            }
        }
        let [a, b] = maps;
        let gone = a.as_ptr() as usize;
        drop(a);
        assert!(line(gone).is_none_or(|line| !line.contains("/a: ")));
        assert!(line(b.as_ptr() as usize).is_some());
    }

    #[test]
    fn bytes_that_were_given_back_are_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = MappedFile::open(&path).unwrap();
        assert!(*map == bytes[..]);
        map.give_back(5_000..90_000);
        map.give_back(99_999..100_000);
        map.give_back(99_999..100_001);
        assert!(*map == bytes[..]);
    }
}
