//! Environment variables, which are read only in this module.
//!
//! Values may come from `.env` files, mounted secrets and YAML blocks with white space at their
//! ends; it is trimmed, and an empty value counts as not set. An invalid value is refused with the
//! variable's name.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

/// Values that the Hub's own client takes as "on", in any letter case.
const ON: [&str; 4] = ["1", "ON", "YES", "TRUE"];
/// Values taken as "off".
const OFF: [&str; 4] = ["0", "OFF", "NO", "FALSE"];

/// Returns a variable's text.
pub(crate) fn text(name: &str) -> Option<String> {
    trimmed(&env::var(name).ok()?)
}

/// Returns a variable's path, of any encoding. A leading `~/` is the home directory, as in the
/// Hub's own client: no shell expands it in a settings file.
pub(crate) fn path(name: &str) -> Option<PathBuf> {
    to_path(env::var_os(name)?, env::home_dir())
}

/// Returns true if a variable is on; unset means off.
///
/// # Errors
/// A value that is neither on nor off.
pub(crate) fn is_on(name: &str) -> Result<bool> {
    switch(name, text(name))
}

/// Returns a variable's server address, without trailing slashes.
///
/// # Errors
/// A value that is not an address.
pub(crate) fn address(name: &str) -> Result<Option<String>> {
    to_address(name, text(name))
}

/// Returns a variable's whole seconds; `None` if it is unset or 0.
///
/// # Errors
/// A value that is not a whole number.
pub(crate) fn seconds(name: &str) -> Result<Option<Duration>> {
    to_seconds(name, text(name))
}

/// Returns the user's cache directory by the XDG specification, which ignores relative paths.
pub(crate) fn cache_directory() -> Option<PathBuf> {
    let own = path("XDG_CACHE_HOME").filter(|path| path.is_absolute());
    own.or_else(|| {
        let home = path("HOME").or_else(env::home_dir);
        Some(home.filter(|path| path.is_absolute())?.join(".cache"))
    })
}

fn trimmed(value: &str) -> Option<String> {
    let value = value.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

fn to_path(value: OsString, home: Option<PathBuf>) -> Option<PathBuf> {
    let Some(text) = value.to_str() else {
        return Some(value.into());
    };
    let text = trimmed(text)?;
    match (text.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => Some(home.join(rest)),
        _ => Some(text.into()),
    }
}

fn switch(name: &str, value: Option<String>) -> Result<bool> {
    let Some(value) = value else {
        return Ok(false);
    };
    let upper = value.to_uppercase();
    if ON.contains(&upper.as_str()) {
        return Ok(true);
    }
    if OFF.contains(&upper.as_str()) {
        return Ok(false);
    }
    bail!("{name} is \"{value}\"; set it to 1 or 0, or unset it")
}

fn to_address(name: &str, value: Option<String>) -> Result<Option<String>> {
    let Some(value) = value else {
        return Ok(None);
    };
    let address = value.trim_end_matches('/');
    let host = ["https://", "http://"]
        .iter()
        .find_map(|scheme| address.strip_prefix(scheme));
    ensure!(
        host.is_some_and(|host| !host.is_empty() && !host.contains(char::is_whitespace)),
        "{name} is \"{value}\"; set it to an address such as https://huggingface.co, or unset it"
    );
    Ok(Some(address.to_owned()))
}

fn to_seconds(name: &str, value: Option<String>) -> Result<Option<Duration>> {
    let Some(value) = value else {
        return Ok(None);
    };
    match value.parse::<u64>() {
        Ok(0) => Ok(None),
        Ok(seconds) => Ok(Some(Duration::from_secs(seconds))),
        Err(_) => bail!("{name} is \"{value}\"; set it to a whole number of seconds, or unset it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(text: &str) -> Option<String> {
        trimmed(text)
    }

    #[test]
    fn blanks_and_line_breaks_around_a_value_do_not_count() {
        for value in ["hf_abc", "hf_abc\n", " hf_abc\r\n", "\thf_abc "] {
            assert_eq!(trimmed(value).as_deref(), Some("hf_abc"), "{value:?}");
        }
        for empty in ["", "\n", " \r\n\t"] {
            assert_eq!(trimmed(empty), None, "{empty:?}");
            assert_eq!(to_path(empty.into(), None), None, "{empty:?}");
        }
        assert_eq!(to_path("/cache \n".into(), None), Some("/cache".into()));
        let home = || Some("/home/me".into());
        assert_eq!(to_path("~/hf\n".into(), home()), Some("/home/me/hf".into()));
        assert_eq!(to_path("/a/~/b".into(), home()), Some("/a/~/b".into()));
    }

    #[test]
    #[cfg(unix)]
    fn a_path_may_have_any_bytes() {
        use std::os::unix::ffi::OsStringExt;
        let value = OsString::from_vec(b"/caf\xe9".to_vec());
        assert_eq!(to_path(value.clone(), None), Some(value.into()));
    }

    #[test]
    fn switches_have_the_spellings_of_the_hubs_client_and_others_are_refused_by_name() {
        for on in ["1", "on", "Yes", "TRUE", " true\n"] {
            assert!(switch("HF_HUB_OFFLINE", some(on)).unwrap(), "{on:?}");
        }
        for off in ["0", "off", "No", "FALSE", "", "\n"] {
            assert!(!switch("HF_HUB_OFFLINE", some(off)).unwrap(), "{off:?}");
        }
        for wrong in ["y", "2", "offline"] {
            let line = switch("HF_HUB_OFFLINE", some(wrong)).unwrap_err();
            let line = line.to_string();
            assert!(
                line.contains(&format!("HF_HUB_OFFLINE is \"{wrong}\"")),
                "{line}"
            );
        }
    }

    #[test]
    fn addresses_and_seconds_are_judged_by_name() {
        let address = |value| to_address("HF_ENDPOINT", some(value));
        for value in [
            "http://127.0.0.1:9",
            "http://127.0.0.1:9/\n",
            " http://127.0.0.1:9//",
        ] {
            let found = address(value).unwrap();
            assert_eq!(found.as_deref(), Some("http://127.0.0.1:9"), "{value:?}");
        }
        for wrong in ["huggingface.co", "https://", "https://a b"] {
            let line = address(wrong).unwrap_err().to_string();
            assert!(
                line.contains("HF_ENDPOINT is") && !line.contains('\n'),
                "{line}"
            );
        }
        let seconds = |value| to_seconds("HF_HUB_DOWNLOAD_TIMEOUT", some(value));
        assert_eq!(seconds(" 30\n").unwrap(), Some(Duration::from_secs(30)));
        assert_eq!(seconds("0").unwrap(), None);
        assert_eq!(seconds("").unwrap(), None);
        for wrong in ["abc", "-5", "1.5", "10s"] {
            let line = seconds(wrong).unwrap_err().to_string();
            assert!(line.contains("HF_HUB_DOWNLOAD_TIMEOUT is"), "{line}");
        }
    }
}
