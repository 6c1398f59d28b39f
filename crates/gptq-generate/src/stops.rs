//! Stop strings in streamed text: text that may begin one is held back until that is decided.

/// Watches for the first of several strings.
#[derive(Clone, Debug)]
pub struct Stops {
    strings: Vec<String>,
    /// Text that may still turn out to begin a stop string.
    held: String,
}

impl Stops {
    /// Ignores empty strings, which would match everywhere.
    pub fn new(strings: &[String]) -> Self {
        Stops {
            strings: strings.iter().filter(|s| !s.is_empty()).cloned().collect(),
            held: String::new(),
        }
    }

    /// Takes more text; returns the text that may be shown, and true if a stop string was reached.
    /// The stop string itself is not shown.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held += text;
        let found = self.strings.iter().filter_map(|s| self.held.find(s));
        if let Some(at) = found.min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        // Holds back the longest tail that begins a stop string.
        let may_begin = |at: &usize| {
            let tail = &self.held[*at..];
            self.strings.iter().any(|s| s.starts_with(tail))
        };
        let keep = self.held.char_indices().map(|(at, _)| at).find(may_begin);
        let tail = self.held.split_off(keep.unwrap_or(self.held.len()));
        (std::mem::replace(&mut self.held, tail), false)
    }

    /// Returns the text that was held back, at the end of the stream.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(strings: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let strings: Vec<String> = strings.iter().map(|s| s.to_string()).collect();
        let mut stops = Stops::new(&strings);
        let mut shown = Vec::new();
        for piece in pieces {
            let (text, stopped) = stops.push(piece);
            shown.push(text);
            if stopped {
                return (shown, true);
            }
        }
        shown.push(stops.finish());
        (shown, false)
    }

    #[test]
    fn a_stop_string_is_found_across_pieces_and_not_shown() {
        let (shown, stopped) = run(&["<|im_end|>"], &["fine.<|", "im_e", "nd|>\nmore"]);
        assert!(stopped);
        assert_eq!(shown, ["fine.", "", ""]);
    }

    #[test]
    fn a_false_start_is_given_out_once_it_is_known() {
        let (shown, stopped) = run(&["END"], &["E", "N", "ENE", "N"]);
        assert!(!stopped);
        assert_eq!(shown, ["", "", "ENEN", "", "EN"]);
    }

    #[test]
    fn the_earliest_of_several_counts() {
        let (shown, stopped) = run(&["b", "abc"], &["xabc"]);
        assert!(stopped);
        assert_eq!(shown, ["x"]);
        assert_eq!(run(&[""], &["é"]).0.concat(), "é");
    }
}
