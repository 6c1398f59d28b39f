//! Keys of a config that say how many experts there are, how they are chosen, and which blocks have them.

use crate::keys::Keys;
use crate::{Activation, BlockBuilder, Register, Routing, Scoring};

/// Limit on the experts of a block, above that of any model: each is listed in plans and reports.
const MAX_EXPERTS: usize = 512;

/// Linears of experts, and the router, under a family's names.
pub(super) struct Names {
    /// Module of the router.
    pub(super) router: &'static str,
    /// Module of the experts, which have their numbers for names.
    pub(super) experts: &'static str,
    /// Gate, up and down.
    pub(super) linears: [&'static str; 3],
}

impl Names {
    /// Names of most families.
    pub(super) const PLAIN: Names = Names {
        router: "mlp.gate",
        experts: "mlp.experts",
        linears: ["gate_proj", "up_proj", "down_proj"],
    };
}

/// Values of keys that are left out.
pub(super) struct Defaults {
    /// Names of the number of experts, any of which may be in a config; the first is the usual one.
    pub(super) counts: &'static [&'static str],
    pub(super) experts: usize,
    pub(super) top_k: usize,
}

/// Reads the number of experts, and of those for a token, which have softmax scores that are not renormalised.
pub(super) fn routing(keys: &Keys<'_>, defaults: &Defaults) -> Result<Routing, String> {
    let mut count: Option<(&str, usize)> = None;
    for name in defaults.counts {
        match (count, keys.found(name)?) {
            (Some((first, one)), Some(other)) if one != other => {
                let (first, name) = (keys.name(first), keys.name(name));
                return Err(format!(
                    "{first} = {one} and {name} = {other} disagree; remove one"
                ));
            }
            (None, Some(found)) => count = Some((*name, found)),
            _ => {}
        }
    }
    let (name, experts) = count.unwrap_or((defaults.counts[0], defaults.experts));
    let name = keys.name(name);
    if !(1..=MAX_EXPERTS).contains(&experts) {
        return Err(format!(
            "{name} = {experts} is not between 1 and {MAX_EXPERTS}"
        ));
    }
    let top_k = keys.found("num_experts_per_tok")?.unwrap_or(defaults.top_k);
    if !(1..=experts).contains(&top_k) {
        return Err(format!(
            "{} = {top_k} is not between 1 and {name} = {experts}",
            keys.name("num_experts_per_tok")
        ));
    }
    Ok(Routing {
        experts,
        top_k,
        scoring: Scoring::Softmax,
        renormalize: false,
        scale: 1.0,
    })
}

/// Reads a width that no other key bounds.
pub(super) fn width(keys: &Keys<'_>, key: &str, default: usize) -> Result<usize, String> {
    match keys.found(key)?.unwrap_or(default) {
        width if (1..=1 << 24).contains(&width) => Ok(width),
        width => Err(format!(
            "{} = {width} is not between 1 and 2^24",
            keys.name(key)
        )),
    }
}

/// Returns true if block `layer` has experts by `mlp_only_layers` and `decoder_sparse_step`.
pub(super) fn is_sparse(keys: &Keys<'_>, layer: usize) -> Result<bool, String> {
    let dense: Option<Vec<usize>> = keys.nullable("mlp_only_layers")?.flatten();
    let step = keys.found("decoder_sparse_step")?.unwrap_or(1);
    if step == 0 {
        return Err(format!(
            "{} = 0 is not positive",
            keys.name("decoder_sparse_step")
        ));
    }
    let dense = dense.unwrap_or_default().contains(&layer);
    Ok(!dense && (layer + 1).is_multiple_of(step))
}

/// Adds a linear of SiLU-gated experts of `width` for `x`, by the choice `routing`, to the residual stream.
pub(super) fn add_experts(
    block: &mut BlockBuilder,
    names: &Names,
    x: Register,
    routing: Register,
    [width, hidden]: [usize; 2],
) {
    let [gate, up, down] = names.linears;
    let [gate, up] = block.dispatch(x, routing, names.experts, [gate, up], width);
    let gated = block.gate(Activation::Silu, gate, up);
    let sum = block.combine([gated, x], routing, names.experts, down, hidden);
    block.add(sum, 1.0);
}
