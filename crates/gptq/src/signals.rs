//! SIGINT and SIGTERM. Most commands have nothing to lose and end at once; during a run, the first
//! signal asks it to stop where it can be resumed, and only the second ends it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Signal handlers, installed once at startup.
pub(crate) struct Signals {
    /// True if a signal ends the program at once.
    at_once: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    /// The last signal; 0 for none.
    number: Arc<AtomicUsize>,
}

impl Signals {
    /// Installs the handlers: signals end the program with status 130 or 143.
    pub(crate) fn install() -> io::Result<Self> {
        let signals = Signals {
            at_once: Arc::new(AtomicBool::new(true)),
            stop: Arc::default(),
            number: Arc::default(),
        };
        for signal in [SIGINT, SIGTERM] {
            // The order matters: the first signal sets the flag that the second one finds.
            flag::register_conditional_shutdown(signal, 128 + signal, signals.at_once.clone())?;
            flag::register(signal, signals.at_once.clone())?;
            flag::register_usize(signal, signals.number.clone(), signal as usize)?;
            flag::register(signal, signals.stop.clone())?;
        }
        Ok(signals)
    }

    /// Makes the first signal only request a stop.
    pub(crate) fn hold(&self) {
        self.at_once.store(false, Ordering::SeqCst);
    }

    /// Makes a signal end the program at once.
    pub(crate) fn release(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }

    /// Becomes true once a signal has requested a stop.
    pub(crate) fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    /// Returns the exit status for the signal that arrived, if any.
    pub(crate) fn status(&self) -> Option<u8> {
        match self.number.load(Ordering::SeqCst) {
            0 => None,
            number => Some(128 + number as u8),
        }
    }
}
