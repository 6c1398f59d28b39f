//! Text of files on its way to a terminal: control characters, which would move the cursor, change
//! colours or hide what was printed before, become escapes that a person can see.
//!
//! What a model generates is the user's own business, and is printed as it is.

use std::fmt::Write;

/// For what is one line.
pub(crate) fn line(text: &str) -> String {
    escaped(text, |_| false)
}

/// For what may have several: newlines and tabs stay.
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
