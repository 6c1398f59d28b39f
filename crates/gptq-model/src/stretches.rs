//! Texts that share their beginnings, run once for all of them.
//!
//! A text is cut where others leave it. Each *stretch* of tokens either begins a text or follows another stretch, up to
//! some position; in preorder, one follows the nearest before it that reaches its start. Everything in a block but
//! attention takes tokens by themselves, so a chunk of stretches goes through it as one window without padding. In
//! attention, stretches that begin texts are gathered into windows of nearly one length, and a stretch that follows
//! others attends over a cache of these.

use burn::tensor::{Int, Tensor};
use gptq_kernels::Engine;

use crate::experts::indices;

/// Part of a window that padding may take, one in this many tokens.
const PADDING: usize = 8;

/// Consecutive tokens of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Position of its first token in the text; 0 if it begins the text.
    pub start: usize,
    /// Number of its tokens, at least 1.
    pub len: usize,
    /// True if another stretch follows it.
    pub continued: bool,
}

/// A chunk of stretches on a device, as attention takes them.
#[derive(Clone, Debug)]
pub struct StretchLayout<B: Engine> {
    /// Position of each token in its text.
    positions: Tensor<B, 1, Int>,
    /// Number of positions that rotary tables need.
    longest: usize,
    windows: Vec<StretchWindows<B>>,
    steps: Vec<JoinStep>,
    /// For each token, its row in the outputs of the windows and then of the steps after others.
    order: Tensor<B, 1, Int>,
}

/// Beginnings of texts that are run as windows of one length, the shorter ones filled up with their last token, which no
/// token before it sees.
#[derive(Clone, Debug)]
pub(crate) struct StretchWindows<B: Engine> {
    shape: [usize; 2],
    rows: Tensor<B, 1, Int>,
}

/// A stretch that joins the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JoinStep {
    /// Row of its first token.
    pub(crate) row: usize,
    /// Number of its tokens.
    pub(crate) len: usize,
    /// Position of its first token: only what follows others attends over the cache.
    pub(crate) start: usize,
}

impl<B: Engine> StretchWindows<B> {
    /// Windows, and tokens in each.
    pub(crate) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// For each token of the windows, its row.
    pub(crate) fn rows(&self) -> Tensor<B, 1, Int> {
        self.rows.clone()
    }
}

impl<B: Engine> StretchLayout<B> {
    /// Lays out `stretches`, whose tokens are consecutive rows of a window, in preorder. No text is longer than
    /// `longest`: texts of which one part is run with another value must have the same rotary frequencies with both.
    pub fn new(stretches: &[Stretch], longest: usize, device: &B::Device) -> Self {
        let firsts = stretches.iter().scan(0, |next, stretch| {
            let first = *next;
            *next += stretch.len;
            Some(first)
        });
        let placed: Vec<(usize, Stretch)> = firsts.zip(stretches.iter().copied()).collect();
        let tokens = stretches.iter().map(|it| it.len).sum();
        let positions = stretches.iter().flat_map(|it| it.start..it.start + it.len);
        let positions = positions.map(|position| position as u32);
        let mut order = vec![0u32; tokens];
        let mut next = 0u32;
        let mut windows = Vec::new();
        for group in groups(&placed) {
            let longest = group.iter().map(|(_, it)| it.len).max().unwrap_or_default();
            let mut rows = Vec::with_capacity(group.len() * longest);
            for (first, stretch) in &group {
                for at in 0..longest {
                    let row = first + at.min(stretch.len - 1);
                    if at < stretch.len {
                        order[row] = next;
                    }
                    rows.push(row as u32);
                    next += 1;
                }
            }
            windows.push(StretchWindows {
                shape: [group.len(), longest],
                rows: indices::<B>(rows.into_iter(), device),
            });
        }
        let mut steps = Vec::new();
        for &(
            row,
            Stretch {
                start,
                len,
                continued,
            },
        ) in &placed
        {
            if start > 0 {
                for place in &mut order[row..row + len] {
                    *place = next;
                    next += 1;
                }
            }
            if start > 0 || continued {
                steps.push(JoinStep { row, len, start });
            }
        }
        StretchLayout {
            positions: indices::<B>(positions, device),
            longest,
            windows,
            steps,
            order: indices::<B>(order.into_iter(), device),
        }
    }

    pub(crate) fn positions(&self) -> Tensor<B, 1, Int> {
        self.positions.clone()
    }

    pub(crate) fn longest(&self) -> usize {
        self.longest
    }

    pub(crate) fn windows(&self) -> &[StretchWindows<B>] {
        &self.windows
    }

    pub(crate) fn steps(&self) -> &[JoinStep] {
        &self.steps
    }

    pub(crate) fn order(&self) -> Tensor<B, 1, Int> {
        self.order.clone()
    }
}

/// The beginnings of texts among `placed`, those of nearly one length together.
fn groups(placed: &[(usize, Stretch)]) -> Vec<Vec<(usize, Stretch)>> {
    let beginnings = placed.iter().filter(|(_, it)| it.start == 0);
    let mut beginnings: Vec<(usize, Stretch)> = beginnings.copied().collect();
    beginnings.sort_by_key(|(_, it)| std::cmp::Reverse(it.len));
    let mut groups: Vec<Vec<(usize, Stretch)>> = Vec::new();
    for placed in beginnings {
        let fits = |group: &Vec<(usize, Stretch)>| {
            let longest = group[0].1.len;
            (longest - placed.1.len) * PADDING <= longest
        };
        match groups.last_mut().filter(|group| fits(group)) {
            Some(group) => group.push(placed),
            None => groups.push(vec![placed]),
        }
    }
    groups
}

#[cfg(test)]
mod tests;
