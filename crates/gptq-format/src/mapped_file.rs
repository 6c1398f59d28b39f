//! Memory-mapped files, and a handler for files that shrink while mapped.
//!
//! Reading a mapped page beyond the end of its file raises SIGBUS, which would end the process
//! without a message. The handler installed here checks whether the address is in one of our maps;
//! if so, it prints one line with the name of the file and exits with status 1. Otherwise the
//! previous handler is called.
#![expect(unsafe_code, reason = "memory maps, and the signal they may raise")]

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

/// Maximum number of watched maps; files beyond that end the process without a message. Two
/// checkpoints with the most shards need fewer.
const WATCHED: usize = 10_000;

/// Bytes before and after an access that the kernel may map along with it: the default of
/// `fault_around_bytes`.
const AROUND: usize = 64 << 10;

/// A mapped file's bytes.
pub(crate) struct MappedFile {
    /// Declared first, so that it is dropped before the map.
    _watch: Option<Watch>,
    map: Mmap,
}

impl MappedFile {
    /// Maps a file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(crate) fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(FormatError::io(path))?;
        // SAFETY: the map is read-only and private to this value. Another process may still write
        // to the file while it is mapped, as with every program that maps checkpoints; if the file
        // is truncated, the handler ends the process.
        let map = unsafe { Mmap::map(&file) }.map_err(FormatError::io(path))?;
        let line = format!(
            "gptq: {}: was truncated while being read, or its disk failed; restore it, then run the \
             same command again\n",
            path.display()
        );
        Ok(MappedFile {
            _watch: Watch::new(&map, line),
            map,
        })
    }

    /// Drops the resident pages of this range (`MADV_DONTNEED`); they are read from the file again
    /// on access.
    pub(crate) fn give_back(&self, bytes: Range<usize>) {
        if bytes.start >= bytes.end || bytes.end > self.map.len() {
            return;
        }
        let start = bytes.start.saturating_sub(AROUND);
        let end = self.map.len().min(bytes.end.saturating_add(AROUND));
        // SAFETY: nobody writes through this map, so its pages have the file's contents before and
        // after. Pages of a neighbour that are dropped along with them are read again.
        let advised = unsafe {
            self.map
                .unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
        };
        // On failure the memory stays resident until the kernel needs it.
        let _ = advised;
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Address range of a map, and the message for a failed read. All fields are atomic, as a signal
/// handler may not take locks.
struct Slot {
    /// Start of the map, or [`FREE`] or [`TAKEN`].
    start: AtomicUsize,
    end: AtomicUsize,
    line: AtomicPtr<String>,
}

/// Marks an unused slot.
const FREE: usize = 0;
/// Marks a slot that is being filled or emptied.
const TAKEN: usize = 1;

static SLOTS: [Slot; WATCHED] = [const {
    Slot {
        start: AtomicUsize::new(FREE),
        end: AtomicUsize::new(0),
        line: AtomicPtr::new(null_mut()),
    }
}; WATCHED];

impl Slot {
    /// Returns the message if `address` is in this map.
    fn line(&self, address: usize) -> Option<&String> {
        let start = self.start.load(Ordering::SeqCst);
        let end = self.end.load(Ordering::SeqCst);
        let line = self.line.load(Ordering::SeqCst);
        // Checks that the slot did not change between the loads.
        let same = self.start.load(Ordering::SeqCst) == start;
        if !same || start <= TAKEN || !(start..end).contains(&address) {
            return None;
        }
        // SAFETY: the interrupted thread was reading `address`, so it borrows the map that contains
        // it; neither the map nor its line is dropped before this returns.
        unsafe { line.as_ref() }
    }
}

/// Registration of a map, held as long as the map.
struct Watch(&'static Slot);

impl Watch {
    /// Registers a map; `None` if all slots are taken.
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
        // SAFETY: the pointer was made by `Watch::new` from a box, and only this swap takes it out.
        drop(unsafe { Box::from_raw(line) });
        self.0.start.store(FREE, Ordering::SeqCst);
    }
}

/// Previous handler of the signal.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Installs the handler of SIGBUS described in `mapped_file.rs`: it ends the **process** if a
/// mapped weight file is truncated while being read. Programs call it at startup; a library should
/// not change its host's signal handlers, so nothing here calls it. If it cannot be installed,
/// nothing changes; a second call does nothing.
pub fn install_sigbus_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(install);
}

fn install() {
    let mut before = MaybeUninit::uninit();
    // SAFETY: reads the action into memory of its type; zeroes are a valid action, the default; the
    // handler has the signature that SA_SIGINFO requires.
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

/// Uses only async-signal-safe calls.
extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    static ENDING: AtomicBool = AtomicBool::new(false);
    // SAFETY: with SA_SIGINFO the kernel passes a valid `info`; the calls are async-signal-safe,
    // and their arguments are alive.
    unsafe {
        let of_address = (*info).si_code == libc::BUS_ADRERR;
        let address = (*info).si_addr() as usize;
        let found = SLOTS.iter().find_map(|slot| slot.line(address));
        if let (true, Some(line)) = (of_address, found) {
            // Only one of several threads prints the message.
            while ENDING.swap(true, Ordering::SeqCst) {
                libc::pause();
            }
            libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
            libc::_exit(1);
        }
        // The access faults again at once, and reaches the previous handler.
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
