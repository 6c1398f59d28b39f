//! Meaning of a `quantize_config.json`'s patterns for a mixture's experts and routers, by their text alone.

/// Returns true if an exclusion names routers and gates of shared experts, which no program quantizes.
pub(crate) fn names_gates(pattern: &str) -> bool {
    let names = pattern.rsplit("\\.(").next().unwrap_or_default();
    let mut names = names.trim_end_matches(')').split('|');
    names.all(|name| name.ends_with("gate"))
}

/// Returns true if a pattern names single experts, not all of a block.
pub fn parts_experts(pattern: &str) -> bool {
    let mut parts = pattern.split("experts\\.").skip(1);
    parts.any(|part| part.starts_with(|c: char| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routers_and_single_experts_are_told_from_linear_layers() {
        let layers = "model\\.layers\\.\\d+\\.";
        for (names, gates, parted) in [
            ("(mlp\\.gate)", true, false),
            ("(mlp\\.shared_expert_gate|mlp\\.gate)", true, false),
            ("(mlp\\.gate|mlp\\.gate_proj)", false, false),
            ("(mlp\\.experts)", false, false),
            ("(mlp\\.experts\\.12\\.up_proj)", false, true),
        ] {
            assert_eq!(names_gates(&format!("-:{layers}{names}")), gates, "{names}");
            assert_eq!(
                parts_experts(&format!("+:{layers}{names}")),
                parted,
                "{names}"
            );
        }
    }
}
