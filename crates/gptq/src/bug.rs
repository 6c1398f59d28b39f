//! Reports panics, which are bugs of this program: one line with what to report instead of a
//! backtrace.
//!
//! The panic hook records where each panic happened. Panics caught on the way up (a damaged Parquet
//! file, a device without memory) are never shown; one that reaches the top becomes the line. With
//! `RUST_BACKTRACE`, Rust's own report is printed as well.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe, PanicHookInfo};
use std::path::Path;
use std::sync::{Mutex, Once, PoisonError};

use crate::environment;

/// A recorded panic.
struct SeenPanic {
    message: String,
    place: String,
}

static SEEN: Mutex<Vec<SeenPanic>> = Mutex::new(Vec::new());

/// Maximum number of recorded panics: one leads to others, and the first ones matter most.
const KEPT: usize = 64;

/// Start of `std`'s panic message if standard output is closed, as by `| head`.
const CLOSED_OUTPUT: &str = "failed printing to stdout";

/// Panic message of `std::thread::scope` after a panic in one of its threads.
const SCOPE: &str = "a scoped thread panicked";

/// Records panics instead of printing them, and turns panics of device threads into errors.
pub(crate) fn watch() {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            remember(panic);
            let closed =
                (panic.payload_as_str()).is_some_and(|text| text.starts_with(CLOSED_OUTPUT));
            if !closed && environment::text("RUST_BACKTRACE").is_some_and(|value| value != "0") {
                print(panic);
            }
        }));
        gptq_kernels::install_panic_hook();
    });
}

/// Runs `work`; a panic becomes the line to print. `about` describes the command.
pub(crate) fn guard<T>(about: &str, work: impl FnOnce() -> T) -> Result<T, String> {
    watch();
    panic::catch_unwind(AssertUnwindSafe(work)).map_err(|payload| line(about, payload.as_ref()))
}

/// Returns a recipe or directory for a bug report, without local directories.
pub(crate) fn public(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn seen() -> std::sync::MutexGuard<'static, Vec<SeenPanic>> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remember(panic: &PanicHookInfo<'_>) {
    let mut seen = seen();
    if seen.len() < KEPT {
        seen.push(SeenPanic {
            message: panic.payload_as_str().unwrap_or("no message").to_owned(),
            place: panic.location().map_or_else(String::new, |at| {
                // Relative to this project or a registry, without the build directory.
                let file = at.file().replace('\\', "/");
                let mut parts: Vec<&str> = file.rsplit('/').take(4).collect();
                parts.reverse();
                format!("{}:{}", parts.join("/"), at.line())
            }),
        });
    }
}

fn line(about: &str, payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    if let Some(text) = text.filter(|text| text.starts_with(CLOSED_OUTPUT)) {
        return text.to_owned();
    }
    let seen = seen();
    // Prefers the panic that reached the top; otherwise the last one that was not a consequence.
    let exact = |seen: &&SeenPanic| Some(seen.message.as_str()) == text && text != Some(SCOPE);
    let (message, place) = match seen
        .iter()
        .rev()
        .find(exact)
        .or_else(|| seen.iter().rev().find(|seen| seen.message != SCOPE))
    {
        Some(seen) => (seen.message.as_str(), seen.place.as_str()),
        None => (text.unwrap_or("no message"), "an unknown place"),
    };
    format!(
        "this is a bug in gptq {}, please report it with this line and the file that caused it: \
         {about}: {} at {place}",
        env!("CARGO_PKG_VERSION"),
        message.replace('\n', "; "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_one_line_with_version_recipe_and_place() {
        let about = format!("quantize {}", public(Path::new("/home/me/tiny.toml")));
        let line = guard(&about, || -> u8 { panic!("index 5\nof 3") }).unwrap_err();
        for part in [
            env!("CARGO_PKG_VERSION"),
            "quantize tiny.toml",
            "index 5; of 3",
            "src/bug.rs:",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(!line.contains('\n') && !line.contains("/home"), "{line}");
        assert_eq!(guard("", || 5), Ok(5));
    }

    #[test]
    fn the_panic_of_a_thread_is_told_instead_of_what_it_led_to() {
        let line = guard("verify", || {
            std::thread::scope(|scope| {
                scope.spawn(|| panic!("on a thread of its own"));
            });
        });
        let line = line.unwrap_err();
        assert!(line.contains("on a thread of its own at"), "{line}");
    }

    #[test]
    fn a_closed_standard_output_is_no_bug() {
        let line = guard("", || -> u8 {
            panic!("failed printing to stdout: Broken pipe (os error 32)")
        });
        assert_eq!(
            line.unwrap_err(),
            "failed printing to stdout: Broken pipe (os error 32)"
        );
    }
}
