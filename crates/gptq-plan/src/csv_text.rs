//! Tables as CSV (RFC 4180, lines ending in `\n`).

/// Formats a heading and rows of as many fields.
pub fn csv_text<const N: usize>(
    heading: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = csv::Writer::from_writer(Vec::new());
    let written = table.write_record(heading).and_then(|()| {
        rows.into_iter()
            .try_for_each(|row| table.write_record(&row))
    });
    written.expect("memory takes every row, and all have the heading's length");
    let bytes = table.into_inner().expect("memory is flushed");
    String::from_utf8(bytes).expect("fields are text")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas_quotes_and_line_breaks_are_quoted() {
        let row = ["a,b", "say \"x\"", "1"].map(str::to_owned);
        let text = csv_text(["one", "two", "three"], [row]);
        assert_eq!(text, "one,two,three\n\"a,b\",\"say \"\"x\"\"\",1\n");
    }
}
