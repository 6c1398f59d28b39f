//! Whether, and where, a token sees only so many before it.

use super::{Family, flag};
use crate::keys::Keys;

/// How a family writes that tokens see only so many before them: `sliding_window` tokens, in the blocks
/// that `layer_types` names. Where that is left out:
#[derive(Clone, Copy, PartialEq)]
pub(super) enum SlidingWindow {
    /// The family has none, whatever its config says.
    Never,
    /// In every block.
    Always,
    /// In blocks from `max_window_layers` on; and nowhere without `use_sliding_window`.
    Switched,
}

/// Values of `layer_types`.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

impl SlidingWindow {
    /// How many tokens one sees in the blocks that see the fewest, if that is not all.
    pub(super) fn tokens(
        self,
        family: &Family,
        config: &Keys<'_>,
        layers: usize,
    ) -> Result<Option<usize>, String> {
        if self == SlidingWindow::Never {
            return Ok(None);
        }
        let switch = self == SlidingWindow::Switched;
        let on = !switch || flag(config, "use_sliding_window")?;
        let window = config.nullable("sliding_window")?;
        let window = window.unwrap_or(family.default("sliding_window"));
        // Some configs write 0 for a window that is off.
        let window = window.filter(|&tokens| on && tokens > 0);
        let Some(Some(types)) = config.nullable::<Vec<String>>("layer_types")? else {
            let first = match switch {
                true => config.found("max_window_layers")?,
                false => Some(0),
            };
            let first = first.or(family.default("max_window_layers"));
            return Ok(window.filter(|_| first.unwrap_or_default() < layers));
        };
        if types.len() != layers {
            return Err(format!(
                "layer_types has {} entries for num_hidden_layers = {layers}",
                types.len()
            ));
        }
        if let Some(other) = types
            .iter()
            .find(|t| ![FULL, SLIDING].contains(&t.as_str()))
        {
            return Err(format!(
                "layer_types: {other:?} is not supported; known are: {FULL}, {SLIDING}"
            ));
        }
        match types.iter().any(|t| t == SLIDING) {
            true if window.is_none() => Err(format!(
                "layer_types has {SLIDING:?}, but {} switches it off; make them agree",
                if on {
                    "sliding_window"
                } else {
                    "use_sliding_window"
                }
            )),
            slides => Ok(window.filter(|_| slides)),
        }
    }
}
