//! Agreement between ranks: decisions of rank 0, told to the others, and limits that hold for all.

use gptq_plan::Places;
use gptq_ranks::{Collective, RankError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::RunError;
use crate::lanes::least_of_ranks;

/// Returns what rank 0 tells: its own `value`.
pub(crate) fn told<T: DeserializeOwned>(
    ranks: &dyn Collective,
    value: impl Serialize,
) -> Result<T, RunError> {
    let own = serde_json::to_vec(&value).expect("plain values always serialize");
    let text = ranks.broadcast(own)?;
    serde_json::from_slice(&text).map_err(|_| {
        RunError::Ranks(RankError::Length {
            from: 0,
            found: text.len(),
            wanted: 0,
        })
    })
}

/// Places with a limit that holds for all ranks: they take experts in the same slices.
pub(crate) fn agreed(places: Places, ranks: &dyn Collective) -> Result<Places, RunError> {
    let gram_bytes = least_of_ranks(places.gram_bytes, ranks)?;
    Ok(Places {
        gram_bytes,
        ..places
    })
}
