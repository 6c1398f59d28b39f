//! SIGINT and SIGTERM. Most commands have nothing to lose and end at once; while a run is under way
//! the first signal asks it to stop where it can be gone on with, and only the second ends it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Installed once, at the program's start.
pub(crate) struct Signals {
    /// Whether a signal ends the program there and then.
    at_once: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    /// The last signal; 0 for none.
    number: Arc<AtomicUsize>,
}

impl Signals {
    /// Takes the signals over: they end the program with status 130 or 143.
    pub(crate) fn install() -> io::Result<Self> {
        let signals = Signals {
            at_once: Arc::new(AtomicBool::new(true)),
            stop: Arc::default(),
            number: Arc::default(),
        };
        for signal in [SIGINT, SIGTERM] {
            // In this order: what the first signal sets, the second one meets.
            flag::register_conditional_shutdown(signal, 128 + signal, signals.at_once.clone())?;
            flag::register(signal, signals.at_once.clone())?;
            flag::register_usize(signal, signals.number.clone(), signal as usize)?;
            flag::register(signal, signals.stop.clone())?;
        }
        Ok(signals)
    }

    /// From now on the first signal only asks.
    pub(crate) fn hold(&self) {
        self.at_once.store(false, Ordering::SeqCst);
    }

    /// From now on a signal ends the program at once.
    pub(crate) fn release(&self) {
        self.at_once.store(true, Ordering::SeqCst);
    }

    /// True once a signal asked.
    pub(crate) fn stop(&self) -> &AtomicBool {
        &self.stop
    }

    /// The exit status that says which signal came, if one did.
    pub(crate) fn status(&self) -> Option<u8> {
        match self.number.load(Ordering::SeqCst) {
            0 => None,
            number => Some(128 + number as u8),
        }
    }
}
