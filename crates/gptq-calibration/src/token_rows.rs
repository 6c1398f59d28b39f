//! Rows of token ids: removal of masked positions, and checks against the model.
//!
//! Rows of a tokenized data set may be padded. If an `attention_mask` column is present, the
//! positions that it masks are removed. Otherwise a row that begins or ends with padding is
//! refused, as padding must not be calibrated on.

use std::collections::BTreeMap;

use crate::json::kind;
use crate::value::Value;

/// Column with 1 for a token and 0 for padding.
pub(crate) const MASK: &str = "attention_mask";

/// Number of equal special tokens at the end of a row that counts as padding. Joined documents
/// never have so many: they are separated by one, or by an end and a beginning.
const RUN: usize = 8;

/// Constraints on rows of token ids.
#[derive(Debug, Default)]
pub(crate) struct TokenRules {
    /// Size of the model's vocabulary, if known.
    pub vocabulary: Option<u32>,
    /// The tokenizer's padding token.
    pub padding: Option<u32>,
    /// The tokenizer's end token, which some use for padding.
    pub end: Option<u32>,
    /// Special tokens and their texts.
    pub special: BTreeMap<u32, String>,
}

/// Returns the ids of a row without masked positions, and the number of those.
///
/// # Errors
/// A description of what is wrong with the cell.
pub(crate) fn ids(
    cell: &Value,
    mask: Option<&Value>,
    rules: &TokenRules,
) -> Result<(Vec<u32>, usize), String> {
    let list = cell.as_array();
    let list = list.ok_or_else(|| format!("it is {}", kind(cell)))?;
    let mask = mask.filter(|mask| !mask.is_null());
    let kept = match mask {
        Some(mask) => masked(list, mask)?,
        None => list.iter().collect(),
    };
    let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
    let ids = kept
        .iter()
        .map(|value| id(value).ok_or_else(|| format!("{value} is not a token id")));
    let ids: Vec<u32> = ids.collect::<Result<_, _>>()?;
    if mask.is_none() {
        rules.check_padding(&ids)?;
    }
    let most = rules.vocabulary.unwrap_or(u32::MAX);
    match ids.iter().find(|id| **id >= most) {
        Some(id) => Err(format!(
            "token {id} is beyond the model's vocabulary of {most}"
        )),
        None => Ok((ids, list.len() - kept.len())),
    }
}

/// Returns the ids that `mask` keeps. The masked ids may have any value.
fn masked<'a>(ids: &'a [Value], mask: &Value) -> Result<Vec<&'a Value>, String> {
    let flags = mask.as_array();
    let flags = flags.ok_or_else(|| format!("its {MASK} is {}", kind(mask)))?;
    if flags.len() != ids.len() {
        let (ids, flags) = (ids.len(), flags.len());
        return Err(format!(
            "its {MASK} has {flags} entries for {ids} token ids"
        ));
    }
    let mut kept = Vec::with_capacity(ids.len());
    for (id, flag) in ids.iter().zip(flags) {
        match flag {
            Value::Bool(true) => kept.push(id),
            Value::Bool(false) => {}
            Value::Number(n) if n.as_f64() == Some(1.0) => kept.push(id),
            Value::Number(n) if n.as_f64() == Some(0.0) => {}
            other => return Err(format!("its {MASK} has {other}, neither 0 nor 1")),
        }
    }
    Ok(kept)
}

impl TokenRules {
    /// Refuses ids that begin or end with padding.
    fn check_padding(&self, ids: &[u32]) -> Result<(), String> {
        let run = |ids: &mut dyn Iterator<Item = &u32>| {
            let first = *ids.next()?;
            Some((first, 1 + ids.take_while(|id| **id == first).count()))
        };
        for (place, found) in [
            ("ends", run(&mut ids.iter().rev())),
            ("begins", run(&mut ids.iter())),
        ] {
            let Some((id, length)) = found else { continue };
            let is_padding = match self.padding == Some(id) && self.end != Some(id) {
                true => length > 1,
                false => length >= RUN && self.special.contains_key(&id),
            };
            if is_padding {
                let text = self.special.get(&id).map(|text| format!(" ({text:?})"));
                return Err(format!(
                    "it {place} with {length} times the token {id}{}, which is padding, and there is no \
                     {MASK} column",
                    text.unwrap_or_default()
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! json {
        ($($json:tt)*) => {
            Value::from(serde_json::json!($($json)*))
        };
    }

    fn rules() -> TokenRules {
        TokenRules {
            vocabulary: Some(4096),
            padding: Some(3),
            end: Some(2),
            special: [(0, "<unk>".to_owned()), (2, "</s>".to_owned())].into(),
        }
    }

    #[test]
    fn masked_positions_are_dropped_wherever_they_are() {
        let row = json!([3, 3, 1, 400, 2, 3, 9]);
        for mask in [
            json!([0, 0, 1, 1, 1, 0, 1]),
            json!([false, false, true, true, true, false, true]),
        ] {
            assert_eq!(
                ids(&row, Some(&mask), &rules()),
                Ok((vec![1, 400, 2, 9], 3))
            );
        }
        let ignored = json!([-100, -100, 1, 400, 2, null, 9]);
        let mask = json!([0, 0, 1, 1, 1, 0, 1]);
        assert_eq!(
            ids(&ignored, Some(&mask), &rules()),
            Ok((vec![1, 400, 2, 9], 3))
        );
        let all = json!([0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(ids(&row, Some(&all), &rules()), Ok((vec![], 7)));
        for (mask, words) in [
            (json!([1, 1]), "2 entries for 7"),
            (json!(1), "is a number"),
            (json!([1, 1, 1, 1, 1, 1, 2]), "neither 0 nor 1"),
        ] {
            let why = ids(&row, Some(&mask), &rules()).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn evident_padding_is_refused_and_what_may_be_text_is_not() {
        let padded = |with: u32, times: usize| -> Vec<u32> {
            [1, 400, 2]
                .into_iter()
                .chain(std::iter::repeat_n(with, times))
                .collect()
        };
        let check = |row: Vec<u32>| ids(&json!(row), None, &rules());
        let ends = check(padded(3, 2)).unwrap_err();
        assert!(ends.contains("ends with 2 times the token 3"), "{ends}");
        let ends = check(padded(0, 8)).unwrap_err();
        assert!(ends.contains("8 times the token 0 (\"<unk>\")"), "{ends}");
        let begins = check(padded(3, 5).into_iter().rev().collect()).unwrap_err();
        assert!(begins.contains("begins with 5 times"), "{begins}");
        for row in [
            padded(3, 1),
            padded(0, 7),
            padded(2, 6),
            padded(77, 500),
            vec![],
            vec![3],
        ] {
            assert_eq!(check(row.clone()), Ok((row, 0)));
        }
        assert!(check(padded(2, 7)).is_err(), "eight end tokens");
        // A null mask is no mask.
        assert!(ids(&json!(padded(3, 9)), Some(&Value::Null), &rules()).is_err());
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_refused_unless_masked() {
        let row = json!([1, 4096]);
        let why = ids(&row, None, &rules()).unwrap_err();
        assert!(
            why.contains("4096 is beyond the model's vocabulary of 4096"),
            "{why}"
        );
        assert_eq!(ids(&row, Some(&json!([1, 0])), &rules()), Ok((vec![1], 1)));
        assert!(ids(&row, None, &TokenRules::default()).is_ok());
    }
}
