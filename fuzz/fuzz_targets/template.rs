//! Any text as the template of a row and, before its first line break, as the range of rows.
#![no_main]

use gptq_calibration::{RowRange, Template};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let (range, template) = text.split_once('\n').unwrap_or(("0:", text));
    if let Ok(range) = range.parse::<RowRange>() {
        let again: RowRange = range.to_string().parse().expect("it was written by us");
        assert_eq!(again, range);
    }
    let Ok(template) = Template::parse(template) else {
        return;
    };
    let row = ["input", "output", "text"].map(|name| (name.to_owned(), name.into()));
    let _ = template.render(0, &row.into_iter().collect());
});
