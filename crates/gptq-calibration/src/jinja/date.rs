//! `strftime_now`: the date of a rendering, which the caller sets so that results can be
//! reproduced.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chrono::{Local, NaiveDate, NaiveDateTime};
use minijinja::{Environment, Error, State};

use super::python::refusal;

/// Format of dates in recipes and manifests, to the second.
const WRITTEN: &str = "%Y-%m-%dT%H:%M:%S";

/// Name of the date among a rendering's values; not an identifier.
pub(super) const NOW: &str = ".now";

/// Returns the current time, to the second.
pub fn now() -> String {
    Local::now().naive_local().format(WRITTEN).to_string()
}

/// Returns true for a date, `2026-11-30`, or one with a time, `2026-11-30T08:15:00`.
pub fn is_date(text: &str) -> bool {
    parse(text).is_some()
}

fn parse(text: &str) -> Option<NaiveDateTime> {
    let date = NaiveDateTime::parse_from_str(text, WRITTEN);
    let day = || NaiveDate::parse_from_str(text, "%Y-%m-%d").ok();
    date.ok().or_else(|| day()?.and_hms_opt(0, 0, 0))
}

/// Adds the function, which sets `asked` when called.
pub(super) fn add_to(environment: &mut Environment<'static>, asked: Arc<AtomicBool>) {
    environment.add_function(
        "strftime_now",
        move |state: &State<'_, '_>, format: &str| {
            asked.store(true, Ordering::Relaxed);
            let now = state.lookup(NOW);
            let now = now.as_ref().and_then(|now| parse(now.as_str()?));
            strftime(now.ok_or_else(|| refusal("strftime_now: no date"))?, format)
        },
    );
}

/// Formats like Python for a date without a time zone.
fn strftime(date: NaiveDateTime, format: &str) -> Result<String, Error> {
    // The time zone of such a date is empty; `%%` is a literal %.
    let format = format
        .replace("%%", "\0")
        .replace("%Z", "")
        .replace("%z", "");
    let format = format.replace("%f", "000000").replace('\0', "%%");
    let mut text = String::new();
    write!(text, "{}", date.format(&format))
        .map_err(|_| refusal(format!("strftime_now cannot write {format:?}")))?;
    Ok(text)
}
