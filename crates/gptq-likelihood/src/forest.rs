//! Texts that begin alike, as trees: what they share is run once.
//!
//! Sharing has its price, as what follows a shared part goes through attention by itself. So a beginning is shared where it
//! is at least as long as what follows it in the mean: the examples before a question, and a question before its choices,
//! but not the word that every prompt begins with.

/// A part of texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// A text that it is a part of, and the positions of its tokens there.
    pub(crate) text: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Node that it follows; `None` where it begins a text.
    pub(crate) parent: Option<usize>,
    /// True if a node follows it.
    pub(crate) continued: bool,
}

impl Node {
    /// Number of its tokens.
    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }
}

/// Trees of texts.
#[derive(Debug, Default)]
pub(crate) struct Forest {
    /// In preorder, one tree after the other.
    pub(crate) nodes: Vec<Node>,
    /// For each text, the node that it ends with.
    pub(crate) ends: Vec<usize>,
}

/// Texts that agree up to some position, which is the end of `parent`.
struct Agreeing {
    texts: Vec<usize>,
    from: usize,
    parent: Option<usize>,
}

impl Forest {
    /// Makes trees of `texts`, none of which is empty. Equal ones are one.
    pub(crate) fn grow(texts: &[&[u32]]) -> Forest {
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|text| texts[*text]);
        let mut forest = Forest {
            nodes: Vec::new(),
            ends: vec![0; texts.len()],
        };
        let mut open = vec![Agreeing {
            texts: order,
            from: 0,
            parent: None,
        }];
        while let Some(agreeing) = open.pop() {
            forest.part(texts, agreeing, &mut open);
        }
        forest
    }

    /// Makes a node of what `agreeing` have in common, or none where that does not pay, and leaves what is different
    /// `open`.
    fn part(&mut self, texts: &[&[u32]], agreeing: Agreeing, open: &mut Vec<Agreeing>) {
        let Agreeing {
            texts: own,
            from,
            mut parent,
        } = agreeing;
        let [Some(&first), Some(&last)] = [own.first(), own.last()] else {
            return;
        };
        let both = texts[first].iter().zip(texts[last]);
        // They are sorted, so that all have in common what the first and the last have.
        let common = both.take_while(|(a, b)| a == b).count();
        let rest: usize = own.iter().map(|text| texts[*text].len() - common).sum();
        let shares = common > from && (common - from) * own.len() >= rest;
        let (ending, going_on) = own.split_at(own.partition_point(|it| texts[*it].len() == common));
        let mut from = from;
        if shares || (!ending.is_empty() && common > from) {
            let node = self.nodes.len();
            self.nodes.push(Node {
                text: first,
                start: from,
                end: common,
                parent,
                continued: shares && !going_on.is_empty(),
            });
            for text in ending {
                self.ends[*text] = node;
            }
            if shares {
                (from, parent) = (common, Some(node));
            }
        } else {
            // They end where the node before them does.
            for text in ending {
                self.ends[*text] = parent.unwrap_or_default();
            }
        }
        let groups = going_on.chunk_by(|a, b| texts[*a].get(common) == texts[*b].get(common));
        let groups = groups.map(|texts| Agreeing {
            texts: texts.to_vec(),
            from,
            parent,
        });
        let groups: Vec<Agreeing> = groups.collect();
        open.extend(groups.into_iter().rev());
    }

    /// Returns the nodes of each tree.
    pub(crate) fn trees(&self) -> Vec<std::ops::Range<usize>> {
        let roots = self.nodes.iter().enumerate();
        let mut starts: Vec<usize> = roots
            .filter(|(_, node)| node.parent.is_none())
            .map(|(at, _)| at)
            .collect();
        starts.push(self.nodes.len());
        starts.windows(2).map(|pair| pair[0]..pair[1]).collect()
    }

    /// Returns the node of `text` that holds `position`.
    pub(crate) fn holding(&self, text: usize, position: usize) -> usize {
        let mut at = self.ends[text];
        while self.nodes[at].start > position {
            at = self.nodes[at]
                .parent
                .expect("only what follows others starts later");
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes as texts of their tokens, behind how many nodes they follow.
    fn shown(texts: &[&[u32]]) -> Vec<(usize, Vec<u32>)> {
        let forest = Forest::grow(texts);
        let depth = |mut at: usize| {
            let mut depth = 0;
            while let Some(parent) = forest.nodes[at].parent {
                (at, depth) = (parent, depth + 1);
            }
            depth
        };
        for (at, text) in texts.iter().enumerate() {
            // Along its nodes, a text is whole.
            let whole = (0..text.len()).map(|position| {
                let node = &forest.nodes[forest.holding(at, position)];
                assert!((node.start..node.end).contains(&position));
                texts[node.text][position]
            });
            assert_eq!(whole.collect::<Vec<u32>>(), *text);
        }
        let shown = forest.nodes.iter().enumerate();
        shown
            .map(|(at, node)| (depth(at), texts[node.text][node.start..node.end].to_vec()))
            .collect()
    }

    #[test]
    fn what_is_longer_than_the_rest_is_shared_and_a_common_word_is_not() {
        // A question with three choices, one of which begins another, and another question.
        let texts: [&[u32]; 5] = [
            &[1, 2, 3, 4, 7],
            &[1, 2, 3, 4, 7, 8],
            &[1, 2, 3, 4, 9],
            &[1, 5, 5, 5, 5],
            &[1, 5, 5, 5, 5],
        ];
        let right = [
            (0, vec![1, 2, 3, 4]),
            (1, vec![7]),
            (2, vec![8]),
            (1, vec![9]),
            (0, vec![1, 5, 5, 5, 5]),
        ];
        assert_eq!(shown(&texts), right);
    }

    #[test]
    fn examples_are_shared_by_questions_and_these_by_their_choices() {
        let shots: Vec<u32> = (100..200).collect();
        let question = |q: u32, choice: &[u32]| [&shots[..], &[q; 20], choice].concat();
        let texts = [
            question(1, &[7]),
            question(1, &[8, 8]),
            question(2, &[7]),
            question(2, &[]),
        ];
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let found: Vec<(usize, usize)> = shown(&texts).iter().map(|(d, t)| (*d, t.len())).collect();
        assert_eq!(found, [(0, 100), (1, 20), (2, 1), (2, 2), (1, 20), (2, 1)]);
        let forest = Forest::grow(&texts);
        assert_eq!(forest.trees(), vec![0..6; 1]);
        assert_eq!(
            forest.ends[3], 4,
            "a text that others go on from ends within the tree"
        );
    }

    #[test]
    fn a_short_text_that_others_begin_with_stands_alone() {
        let long: Vec<u32> = (0..50).collect();
        let other: Vec<u32> = (0..2).chain(60..100).collect();
        let found = shown(&[&long, &long[..2], &other]);
        let found: Vec<(usize, usize)> = found.iter().map(|(d, t)| (*d, t.len())).collect();
        assert_eq!(found, [(0, 2), (0, 50), (0, 42)]);
    }

    #[test]
    fn any_texts_are_whole_along_their_nodes() {
        let mut x = 1u32;
        let mut next = |n: u32| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 16) % n
        };
        for _ in 0..50 {
            let texts: Vec<Vec<u32>> = (0..next(30) + 1)
                .map(|_| (0..next(12) + 1).map(|_| next(2)).collect())
                .collect();
            let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
            let nodes = shown(&texts);
            let tokens: usize = nodes.iter().map(|(_, t)| t.len()).sum();
            assert!(tokens <= texts.iter().map(|t| t.len()).sum());
        }
    }
}
