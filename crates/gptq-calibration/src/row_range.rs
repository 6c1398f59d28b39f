//! `rows = "0:1000"`.

use std::fmt;
use std::str::FromStr;

use crate::CalibrationError;

/// A half-open range of rows, written `"0:1000"`, `"500:"` or `":1000"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowRange {
    start: usize,
    end: Option<usize>,
}

impl FromStr for RowRange {
    type Err = CalibrationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || CalibrationError::Rows { text: text.into() };
        let bound = |text: &str| match text {
            "" => Ok(None),
            n => n.parse().map(Some).map_err(|_| error()),
        };
        let (start, end) = text.split_once(':').ok_or_else(error)?;
        let range = RowRange {
            start: bound(start)?.unwrap_or(0),
            end: bound(end)?,
        };
        match range.end {
            Some(end) if end <= range.start => Err(error()),
            _ => Ok(range),
        }
    }
}

impl RowRange {
    /// Returns the position of row `index`: before the range, in it, or past its end.
    pub(crate) fn place(&self, index: usize) -> RangePosition {
        match self.end {
            _ if index < self.start => RangePosition::Before,
            Some(end) if index >= end => RangePosition::Past,
            _ => RangePosition::Inside,
        }
    }
}

/// Position of a row relative to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangePosition {
    Before,
    Inside,
    Past,
}

impl fmt::Display for RowRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.start)?;
        self.end.iter().try_for_each(|end| end.fmt(f))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_parse_as_they_print_and_wrong_ones_are_refused() {
        for text in ["0:1000", "5:", "7:8"] {
            assert_eq!(text.parse::<RowRange>().unwrap().to_string(), text);
        }
        assert_eq!(":9".parse::<RowRange>().unwrap().to_string(), "0:9");
        for text in ["", "5", "9:9", "9:3", "a:b", "-1:4", "1:2:3"] {
            assert!(text.parse::<RowRange>().is_err(), "{text}");
        }
    }
}
