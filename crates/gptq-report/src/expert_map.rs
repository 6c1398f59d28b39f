//! A map of experts and blocks, coloured by the calibration tokens that each expert was given.

use std::fmt::Write;

use gptq_plan::{BlockReport, ExpertSpread, FEW_TOKENS};
use minijinja::Value;
use serde::Serialize;

/// Side of an expert's square.
const SIDE: usize = 7;
/// Shades, from few tokens to the most.
const SHADES: usize = 9;

/// Tokens of the experts of a branch.
#[derive(Serialize)]
pub(crate) struct ExpertMap {
    /// A row for each block, a square for each expert (SVG).
    pub map: Value,
    pub experts: usize,
    pub few: usize,
    /// Limit of what is few.
    pub limit: usize,
    /// The least and the most tokens of an expert.
    pub least: usize,
    pub most: usize,
    pub warning: Option<String>,
}

/// Draws the experts of the blocks that have any.
pub(crate) fn expert_map(blocks: &[BlockReport]) -> Option<ExpertMap> {
    let spread = ExpertSpread::of(blocks)?;
    let tokens = || blocks.iter().flat_map(|block| block.expert_tokens.iter());
    let most = tokens().copied().max().unwrap_or_default();
    let rows: Vec<&BlockReport> = blocks
        .iter()
        .filter(|block| !block.expert_tokens.is_empty())
        .collect();
    let columns = rows.iter().map(|block| block.expert_tokens.len()).max();
    let (width, height) = (columns.unwrap_or_default() * SIDE, rows.len() * SIDE);
    let mut map = format!(
        "<svg class=\"experts\" viewBox=\"0 0 {width} {height}\" style=\"max-width:{}px\" role=\"img\">",
        2 * width
    );
    for (row, block) in rows.iter().enumerate() {
        let own = ExpertSpread::of([*block]).map_or(0, |own| own.least.2);
        let _ = write!(
            map,
            "<g transform=\"translate(0 {})\"><title>block {}: at least {own} tokens</title>",
            row * SIDE,
            block.layer
        );
        for (expert, &tokens) in block.expert_tokens.iter().enumerate() {
            let _ = write!(
                map,
                "<rect x=\"{}\" class=\"e{}\"/>",
                expert * SIDE,
                shade(tokens, most)
            );
        }
        map += "</g>";
    }
    map += "</svg>";
    Some(ExpertMap {
        map: Value::from_safe_string(map),
        experts: spread.experts,
        few: spread.few,
        limit: FEW_TOKENS,
        least: spread.least.2,
        most,
        warning: spread.warning(),
    })
}

/// The shade of an expert: 0 for few tokens, then by the logarithm.
fn shade(tokens: usize, most: usize) -> usize {
    if tokens < FEW_TOKENS {
        return 0;
    }
    let place = |tokens: usize| (tokens as f64 / FEW_TOKENS as f64).ln();
    match place(most) {
        top if top > 0.0 => 1 + ((SHADES - 1) as f64 * place(tokens) / top).round() as usize,
        _ => SHADES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(layer: usize, expert_tokens: Vec<usize>) -> BlockReport {
        BlockReport {
            layer,
            output_error: 0.1,
            tuning: None,
            expert_tokens,
        }
    }

    #[test]
    fn experts_with_few_tokens_have_a_shade_of_their_own() {
        let blocks = [block(0, Vec::new()), block(1, vec![63, 64, 640, 6400])];
        let map = expert_map(&blocks).unwrap();
        assert_eq!(
            (map.experts, map.few, map.least, map.most),
            (4, 1, 63, 6400)
        );
        let svg = map.map.to_string();
        for part in [
            "block 1: at least 63 tokens",
            "x=\"0\" class=\"e0\"",
            "x=\"21\" class=\"e9\"",
        ] {
            assert!(svg.contains(part), "{svg}");
        }
        assert!(map.warning.unwrap().contains("1 of 4 experts"));
        assert!(expert_map(&blocks[..1]).is_none());
    }

    #[test]
    fn a_map_of_94_blocks_of_128_experts_is_small() {
        let blocks: Vec<BlockReport> = (0..94)
            .map(|layer| block(layer, (0..128).map(|expert| 100 + 97 * expert).collect()))
            .collect();
        let svg = expert_map(&blocks).unwrap().map.to_string();
        assert!(svg.len() < 600_000, "{}", svg.len());
    }
}
