//! The sliding window of each block, as a config gives it.

use crate::keys::{Keys, flag};

/// Rule of a family for which blocks have a sliding window of `sliding_window` tokens, where `layer_types`,
/// which names them, is missing.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum SlidingWindow {
    /// The family has none, whatever its config says.
    Never,
    /// Every block has a window.
    Always,
    /// Blocks from `max_window_layers` on have a window; none without `use_sliding_window`.
    Switched,
    /// `layer_types` must not be missing if `use_sliding_window` is on.
    Listed,
    /// All blocks have a window except every `n`-th; `n` is in the config, or the family's.
    Pattern {
        /// Key of `n`.
        key: Option<&'static str>,
        /// Value of `n` if the key is missing.
        every: usize,
        /// True if a `sliding_window` of `null` switches it off.
        null_is_off: bool,
    },
}

/// Returns the value of a key that is missing, by its name.
type DefaultOf<'a> = &'a dyn Fn(&str) -> Option<usize>;

/// Values of `layer_types`.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

impl SlidingWindow {
    /// Returns the sliding window of each block in tokens; `None` where a token sees all before it.
    /// `default` returns the family's values.
    pub(super) fn windows(
        self,
        default: DefaultOf<'_>,
        config: &Keys<'_>,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, String> {
        if self == SlidingWindow::Never {
            return Ok(vec![None; layers]);
        }
        let switch = matches!(self, SlidingWindow::Switched | SlidingWindow::Listed);
        let on = !switch || flag(config, "use_sliding_window")?;
        let window = config.nullable("sliding_window")?;
        let window = window.unwrap_or(default("sliding_window"));
        // Some configs write 0 for a window that is off.
        let window = window.filter(|&tokens| on && tokens > 0);
        let Some(Some(types)) = config.nullable::<Vec<String>>("layer_types")? else {
            let slides = self.without_types(default, config, window.is_some())?;
            let block = |layer: usize| window.filter(|_| slides.contains(layer));
            return Ok((0..layers).map(block).collect());
        };
        let name = config.name("layer_types");
        if types.len() != layers {
            return Err(format!(
                "{name} has {} entries for num_hidden_layers = {layers}",
                types.len()
            ));
        }
        if let Some(other) = types
            .iter()
            .find(|t| ![FULL, SLIDING].contains(&t.as_str()))
        {
            return Err(format!(
                "{name}: {other:?} is not supported; known are: {FULL}, {SLIDING}"
            ));
        }
        match types.iter().any(|t| t == SLIDING) {
            true if window.is_none() => Err(format!(
                "{name} has {SLIDING:?}, but {} switches it off; make them agree",
                config.name(if on {
                    "sliding_window"
                } else {
                    "use_sliding_window"
                })
            )),
            _ => Ok(types
                .iter()
                .map(|t| window.filter(|_| t == SLIDING))
                .collect()),
        }
    }

    /// Returns the blocks with a sliding window where `layer_types` is missing; `on`: some may have one.
    fn without_types(
        self,
        default: DefaultOf<'_>,
        config: &Keys<'_>,
        on: bool,
    ) -> Result<Blocks, String> {
        let window = "sliding_window";
        match self {
            SlidingWindow::Switched => {
                let first = config.found("max_window_layers")?;
                let first = first.or(default("max_window_layers"));
                Ok(Blocks::From(first.unwrap_or_default()))
            }
            SlidingWindow::Listed if on => {
                Err("layer_types is missing, which use_sliding_window needs".to_owned())
            }
            SlidingWindow::Pattern { null_is_off, .. }
                if !(on || null_is_off && config.nullable::<usize>(window)? == Some(None)) =>
            {
                Err(format!(
                    "{} is off, and layer_types does not say that no block slides",
                    config.name(window)
                ))
            }
            SlidingWindow::Pattern { key, every, .. } => {
                let found = match key {
                    Some(key) if on => every_so_many(config, key)?,
                    _ => None,
                };
                Ok(Blocks::ButEvery(found.unwrap_or(every)))
            }
            _ => Ok(Blocks::From(0)),
        }
    }
}

/// Blocks of a model.
enum Blocks {
    /// Blocks from this one on.
    From(usize),
    /// All blocks but every `n`-th.
    ButEvery(usize),
}

impl Blocks {
    fn contains(&self, layer: usize) -> bool {
        match *self {
            Blocks::From(first) => layer >= first,
            Blocks::ButEvery(every) => !(layer + 1).is_multiple_of(every),
        }
    }
}

/// Reads a key that says which blocks differ from the others: each so-and-so-many-th.
pub(super) fn every_so_many(config: &Keys<'_>, key: &str) -> Result<Option<usize>, String> {
    match config.found(key)? {
        Some(0) => Err(format!("{} = 0 is not positive", config.name(key))),
        found => Ok(found),
    }
}
