//! Reads the settings of the rotary embedding from a config: the base of the frequencies, and their scaling
//! by its `rope_type`.
//!
//! Transformers 4 has `rope_theta` at the top and `rope_scaling` for the rest, Transformers 5 all of it in
//! `rope_parameters`. Transformers 5 reads both as follows (`convert_rope_params_to_dict`): a `rope_scaling`
//! that is not empty replaces `rope_parameters` as a whole; the base is the one inside the object, else the one
//! at the top; `rope_type` takes precedence over `type`, its older name. Some families have such an object for
//! each kind of attention, or a separate key for the base; an old `rope_scaling` is that of full attention.

use serde_json::{Map, Value, json};

use crate::RopeScaling;
use crate::families::{Family, Rotary, family_of, language_model};
use crate::keys::{Keys, positive};

/// The context that was trained on first.
const ORIGINAL: &str = "original_max_position_embeddings";

/// The share of a head that is rotated.
const PARTIAL: &str = "partial_rotary_factor";

/// Settings of the rotary embedding of some blocks, as read from a config.
#[derive(Debug, PartialEq)]
pub(crate) struct RotarySettings {
    pub(crate) theta: f64,
    pub(crate) scaling: RopeScaling,
    /// The share of a head that is rotated.
    pub(crate) partial: f64,
}

/// An object with rotary settings, and the config around it.
struct RopeObject<'a> {
    rope: Keys<'a>,
    config: &'a Keys<'a>,
    family: &'a Family,
    max_positions: usize,
}

/// The object that counts, if either does.
fn rope<'a>(config: &Keys<'a>) -> Result<Option<Keys<'a>>, String> {
    match config.inside("rope_scaling")? {
        Some(rope) => Ok(Some(rope)),
        None => config.inside("rope_parameters"),
    }
}

/// Returns the rotary settings of the blocks with one kind of attention.
fn rope_of<'a>(config: &Keys<'a>, sliding: bool) -> Result<Option<Keys<'a>>, String> {
    let parameters = config.inside("rope_parameters")?;
    let kind = match sliding {
        true => "sliding_attention",
        false => "full_attention",
    };
    let within = match &parameters {
        Some(all) => all.inside(kind)?,
        None => None,
    };
    if let (None, Some(all)) = (&within, &parameters)
        && all.value(kind).is_none()
    {
        return Err(format!("{} is missing", all.name(kind)));
    }
    match config.inside("rope_scaling")? {
        Some(_) if within.is_some() => Err(
            "rope_scaling and rope_parameters both have rotary settings; keep one of them"
                .to_owned(),
        ),
        // Transformers passes over the older name here.
        Some(rope) if rope.value("rope_type").is_none() && rope.value("type").is_some() => {
            let name = rope.name("type");
            Err(format!("{name} is not supported; write rope_type"))
        }
        Some(rope) if !sliding => Ok(Some(rope)),
        _ => Ok(within),
    }
}

/// Returns the context the model was trained for, in tokens.
pub(crate) fn max_positions(config: &Keys<'_>, family: &Family) -> Result<usize, String> {
    let key = "max_position_embeddings";
    let found = config.found(key)?.or(family.default(key));
    found.ok_or_else(|| format!("{key} is missing"))
}

/// The rotary settings of blocks with full attention and of those with a sliding window, the same in most families;
/// the error is a sentence.
pub(crate) fn rotary(
    config: &Keys<'_>,
    family: &Family,
    max_positions: usize,
) -> Result<[RotarySettings; 2], String> {
    let Rotary { theta, sliding, .. } = family.rotary;
    let empty = Map::new();
    let of = |rope: Option<Keys<'_>>, key: &str, theta: f64| {
        let rope = rope.unwrap_or(Keys::new(&empty));
        let found = RopeObject {
            rope,
            config,
            family,
            max_positions,
        };
        found.settings(key, theta)
    };
    match sliding {
        None => {
            let [full, same] = [(); 2].map(|()| of(rope(config)?, "rope_theta", theta));
            Ok([full?, same?])
        }
        Some((key, sliding)) => Ok([
            of(rope_of(config, false)?, "rope_theta", theta)?,
            of(rope_of(config, true)?, key, sliding)?,
        ]),
    }
}

impl RopeObject<'_> {
    /// The settings, with the base by `key` of the config, else `theta`, where the object has none.
    fn settings(&self, key: &str, theta: f64) -> Result<RotarySettings, String> {
        let RopeObject { rope, config, .. } = self;
        if let Some((layers, _)) = rope
            .iter()
            .find(|(key, it)| it.is_object() && key.ends_with("_attention"))
        {
            let name = rope.name(layers);
            return Err(format!(
                "{name}: rotary settings of their own for some blocks are not supported"
            ));
        }
        let base = match rope.value("rope_theta") {
            Some(_) => positive(rope, "rope_theta")?,
            None => positive(config, key)?,
        };
        let scaling = self.scaling()?;
        let mut share = None;
        for keys in [rope, config] {
            let part = keys.nullable::<f64>(PARTIAL)?.flatten();
            if let Some(part) = part.filter(|&part| !(part > 0.0 && part <= 1.0)) {
                return Err(format!(
                    "{} = {part} is not between 0 and 1",
                    keys.name(PARTIAL)
                ));
            }
            // Where there is no scaling, Transformers does not look at it in other families.
            if let (None, Some(part)) = (self.family.rotary.partial, part)
                && part != 1.0
                && scaling != RopeScaling::Default
            {
                let name = keys.name(PARTIAL);
                return Err(format!("{name} = {part} is not supported, only 1"));
            }
            share = share.or(part);
        }
        let partial = self.family.rotary.partial;
        Ok(RotarySettings {
            theta: base.unwrap_or(theta),
            scaling,
            partial: partial.map_or(1.0, |partial| share.unwrap_or(partial)),
        })
    }

    fn scaling(&self) -> Result<RopeScaling, String> {
        let rope = &self.rope;
        let (name, kind) = kind(rope)?;
        let kind = match self.family.rotary.renamed.iter().find(|it| it.0 == kind) {
            Some((_, kind)) => (*kind).to_owned(),
            None => kind,
        };
        let kinds = self.family.rotary.kinds;
        if !kinds.contains(&kind.as_str()) {
            return Err(format!(
                "{} {kind:?} is not supported; known are: {}",
                rope.name(name),
                kinds.join(", ")
            ));
        }
        let missing = |key: &str| {
            format!(
                "{} is missing, which rope_type {kind:?} needs",
                rope.name(key)
            )
        };
        let needed = |key: &str| positive(rope, key)?.ok_or_else(|| missing(key));
        match kind.as_str() {
            "linear" => Ok(RopeScaling::Linear {
                factor: needed("factor")?,
            }),
            "dynamic" => Ok(RopeScaling::Dynamic {
                factor: needed("factor")?,
                positions: self.max_positions as f64,
            }),
            "llama3" => {
                let low_freq_factor = needed("low_freq_factor")?;
                let high_freq_factor = needed("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    return Err(format!(
                        "{} = {high_freq_factor} is not above low_freq_factor = {low_freq_factor}",
                        rope.name("high_freq_factor")
                    ));
                }
                Ok(RopeScaling::Llama3 {
                    factor: needed("factor")?,
                    low_freq_factor,
                    high_freq_factor,
                    original_positions: self.original()?,
                })
            }
            "yarn" => self.yarn(),
            "longrope" => {
                let list = |key| {
                    let list: Option<Vec<f64>> = rope.found(key)?;
                    let list = list.ok_or_else(|| missing(key))?;
                    match list.iter().all(|&factor| factor > 0.0) {
                        true => Ok::<_, String>(list.iter().map(|&it| it as f32).collect()),
                        false => Err(format!("{} has what is not positive", rope.name(key))),
                    }
                };
                let original_positions = self.original()?;
                let factor = self.factor(original_positions)?;
                let scale = match factor <= 1.0 {
                    true => 1.0,
                    false => (1.0 + factor.ln() / original_positions.ln()).sqrt(),
                };
                Ok(RopeScaling::LongRope {
                    short: list("short_factor")?,
                    long: list("long_factor")?,
                    original_positions,
                    attention_factor: optional(rope, "attention_factor")?.unwrap_or(scale),
                })
            }
            _ => Ok(RopeScaling::Default),
        }
    }

    fn yarn(&self) -> Result<RopeScaling, String> {
        let rope = &self.rope;
        let original_positions = self.original()?;
        let factor = self.factor(original_positions)?;
        let scale = |by: f64| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * by * factor.ln() + 1.0,
        };
        let mscales = ["mscale", "mscale_all_dim"].map(|key| rope.nullable::<f64>(key));
        let [own, all] = mscales.map(|it| it.map(Option::flatten));
        let inferred = match (own?, all?) {
            (Some(own), Some(all)) if own != 0.0 && all != 0.0 => scale(own) / scale(all),
            _ => scale(1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            fast: optional(rope, "beta_fast")?.unwrap_or(32.0),
            slow: optional(rope, "beta_slow")?.unwrap_or(1.0),
            original_positions,
            attention_factor: optional(rope, "attention_factor")?.unwrap_or(inferred),
            truncate: rope.found("truncate")?.unwrap_or(true),
        })
    }

    /// The context trained on first; one at the top of the file replaces that beside the factors.
    fn original(&self) -> Result<f64, String> {
        let default = self.family.default(ORIGINAL).map(|it| it as f64);
        let found = match self.config.value(ORIGINAL) {
            Some(_) => positive(self.config, ORIGINAL)?,
            None if default.is_some() => default,
            None => positive(&self.rope, ORIGINAL)?,
        };
        Ok(found.unwrap_or(self.max_positions as f64))
    }

    /// Returns the factor by which the context was stretched.
    fn factor(&self, original_positions: f64) -> Result<f64, String> {
        let found = optional(&self.rope, "factor")?;
        Ok(found.unwrap_or(self.max_positions as f64 / original_positions))
    }
}

/// The key that says the kind, and the kind.
fn kind(rope: &Keys<'_>) -> Result<(&'static str, String), String> {
    let name = match rope.value("rope_type") {
        Some(_) => "rope_type",
        None => "type",
    };
    let kind: Option<String> = rope.found(name)?;
    Ok((name, kind.unwrap_or("default".to_owned())))
}

/// A number over zero, or nothing, which `null` is too.
fn optional(keys: &Keys<'_>, key: &str) -> Result<Option<f64>, String> {
    match keys.value(key) {
        Some(Value::Null) => Ok(None),
        _ => positive(keys, key),
    }
}

/// Gives `config` its rotary settings in both spellings, each complete, and with both names of the type:
/// programs read the one or the other, and Transformers 5 the same from the two together. Of families
/// whose old spelling says less, or is read by other rules, they stay as they are.
///
/// # Errors
/// The same errors as [`ModelConfig::from_json`](crate::ModelConfig::from_json).
pub fn spell_out_rotary(config: &mut Map<String, Value>) -> Result<(), String> {
    let keys = Keys::new(config);
    let outer = family_of(&keys)?;
    let (_, family) = language_model(outer, keys)?;
    let Some(config) = outer.text_mut(config) else {
        return Ok(());
    };
    let keys = Keys::new(config);
    let [RotarySettings { theta, scaling, .. }, _] =
        rotary(&keys, family, max_positions(&keys, family)?)?;
    let long = matches!(scaling, RopeScaling::LongRope { .. });
    if family.rotary.sliding.is_some() || long {
        return Ok(());
    }
    // As it was typed: some readers take a base that is a whole number, and some only one that is not.
    let found = rope(&keys)?;
    let within = found
        .as_ref()
        .and_then(|rope| rope.value("rope_theta").cloned());
    let theta = within
        .or(keys.value("rope_theta").cloned())
        .unwrap_or(theta.into());
    let mut parameters = json!({});
    let mut kind = "default".to_owned();
    if let (Some(found), true) = (&found, scaling != RopeScaling::Default) {
        (_, kind) = self::kind(found)?;
        for (key, value) in found.iter() {
            parameters[key] = value.clone();
        }
        if let Some(object) = parameters.as_object_mut() {
            object.remove("type");
            object.remove("rope_theta");
        }
    }
    if let RopeScaling::Llama3 {
        original_positions, ..
    }
    | RopeScaling::Yarn {
        original_positions, ..
    } = scaling
    {
        // Tokens: readers want a whole number.
        parameters[ORIGINAL] = match original_positions.fract() == 0.0 {
            true => json!(original_positions as u64),
            false => json!(original_positions),
        };
    }
    if let (Some(_), Some(part)) = (
        family.rotary.partial,
        (found.as_ref().and_then(|it| it.value(PARTIAL))).or(keys.value(PARTIAL)),
    ) {
        parameters[PARTIAL] = part.clone();
    }
    parameters["rope_type"] = kind.as_str().into();
    let old = match scaling {
        RopeScaling::Default => Value::Null,
        _ => {
            let mut old = parameters.clone();
            old["type"] = kind.into();
            old
        }
    };
    parameters["rope_theta"] = theta.clone();
    if let Some(part) = parameters.get(PARTIAL) {
        config.insert(PARTIAL.to_owned(), part.clone());
    }
    config.insert("rope_theta".to_owned(), theta);
    config.insert("rope_scaling".to_owned(), old);
    config.insert("rope_parameters".to_owned(), parameters);
    Ok(())
}

#[cfg(test)]
mod tests;
