//! Escapes text of files before printing: control characters, which could move the cursor, change
//! colours or hide earlier output, become visible.
//!
//! Generated text is printed unchanged.

use std::fmt::Write;

/// Escapes text for a single line.
pub(crate) fn line(text: &str) -> String {
    escaped(text, |_| false)
}

/// Escapes text that may have several lines: newlines and tabs stay.
pub(crate) fn lines(text: &str) -> String {
    escaped(text, |c| matches!(c, '\n' | '\t'))
}

fn escaped(text: &str, stays: impl Fn(char) -> bool) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() && !stays(c) {
            true => write!(shown, "{}", c.escape_default()).expect("a string takes all"),
            false => shown.push(c),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_all_others_stay() {
        assert_eq!(
            line("a\u{1b}[31m\r\n\tb\u{9b}é"),
            r"a\u{1b}[31m\r\n\tb\u{9b}é"
        );
        assert_eq!(lines("a\u{7}\n\tb\r\n"), "a\\u{7}\n\tb\\r\n");
    }
}
