//! Trees of texts cut into chunks: tokens that go through a block at once.
//!
//! Small trees of nearly one size share a chunk. A tree that is larger than a chunk becomes several, which share a cache;
//! and where it is much larger than the part that all of it follows, that part is repeated, so that its pieces do not wait for each other.

use std::cmp::Reverse;

use gptq_model::Stretch;

use crate::forest::Forest;

/// Pieces of a large tree have at least this many times the tokens that they repeat.
const REPEAT: usize = 8;

/// Tokens that go through a block at once.
#[derive(Debug, Default)]
pub(crate) struct TextChunk {
    /// The tokens of its stretches, one after the other.
    pub(crate) tokens: Vec<u32>,
    pub(crate) stretches: Vec<Stretch>,
}

/// Chunks that share a cache, in their order.
pub(crate) type Bundle = Vec<TextChunk>;

/// Place of a node's first token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodePlace {
    pub(crate) bundle: usize,
    pub(crate) chunk: usize,
    pub(crate) row: usize,
}

/// All trees of a forest in bundles.
#[derive(Debug, Default)]
pub(crate) struct Chunks {
    pub(crate) bundles: Vec<Bundle>,
    /// For each node.
    pub(crate) places: Vec<NodePlace>,
}

impl Chunks {
    /// Cuts the trees of `forest`, which is of `texts`, into chunks of about `most` tokens.
    pub(crate) fn cut(forest: &Forest, texts: &[&[u32]], most: usize) -> Chunks {
        let mut chunks = Chunks {
            bundles: Vec::new(),
            places: vec![NodePlace::default(); forest.nodes.len()],
        };
        let size = |tree: &std::ops::Range<usize>| -> usize {
            forest.nodes[tree.clone()].iter().map(|it| it.len()).sum()
        };
        let mut trees = forest.trees();
        trees.sort_by_key(|tree| Reverse((size(tree), forest.nodes[tree.start].len())));
        // Those that fill chunks of their own come first.
        let small = trees.partition_point(|tree| size(tree) > most);
        for tree in &trees[..small] {
            chunks.large(forest, texts, tree.clone(), most);
        }
        let mut trees = trees[small..].to_vec();
        trees.sort_by_key(|tree| Reverse(forest.nodes[tree.start].len()));
        let mut held = usize::MAX;
        for tree in trees {
            let size = size(&tree);
            if held.saturating_add(size) > most {
                chunks.bundles.push(vec![TextChunk::default()]);
                held = 0;
            }
            held += size;
            for node in tree {
                chunks.add(forest, texts, node);
            }
        }
        chunks
    }

    fn large(
        &mut self,
        forest: &Forest,
        texts: &[&[u32]],
        tree: std::ops::Range<usize>,
        most: usize,
    ) {
        let root = tree.start;
        let enough = most.max(REPEAT * forest.nodes[root].len());
        self.bundles.push(vec![TextChunk::default()]);
        let (mut in_bundle, mut in_chunk) = (0, 0);
        for node in tree {
            let len = forest.nodes[node].len();
            if forest.nodes[node].parent == Some(root) && in_bundle >= enough {
                self.bundles.push(vec![TextChunk::default()]);
                let first = self.places[root];
                self.add(forest, texts, root);
                self.places[root] = first;
                in_bundle = forest.nodes[root].len();
                in_chunk = in_bundle;
            }
            if in_chunk > 0 && in_chunk + len > most {
                self.bundles
                    .last_mut()
                    .expect("one was begun")
                    .push(TextChunk::default());
                in_chunk = 0;
            }
            self.add(forest, texts, node);
            in_bundle += len;
            in_chunk += len;
        }
    }

    /// Adds a node to the last chunk.
    fn add(&mut self, forest: &Forest, texts: &[&[u32]], node: usize) {
        let it = &forest.nodes[node];
        let bundle = self.bundles.len() - 1;
        let chunks = self.bundles.last_mut().expect("one was begun");
        let at = chunks.len() - 1;
        let chunk = chunks.last_mut().expect("a bundle has a chunk");
        self.places[node] = NodePlace {
            bundle,
            chunk: at,
            row: chunk.tokens.len(),
        };
        chunk
            .tokens
            .extend_from_slice(&texts[it.text][it.start..it.end]);
        chunk.stretches.push(Stretch {
            start: it.start,
            len: it.len(),
            continued: it.continued,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(bundle: &Bundle) -> Vec<usize> {
        bundle.iter().map(|chunk| chunk.tokens.len()).collect()
    }

    #[test]
    fn short_texts_share_a_chunk_the_longest_first() {
        let texts: Vec<Vec<u32>> = [5, 9, 3, 8, 2]
            .map(|n| (n as u32..).step_by(7).take(n).collect())
            .to_vec();
        let texts: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let forest = Forest::grow(&texts);
        let chunks = Chunks::cut(&forest, &texts, 12);
        let sizes: Vec<Vec<usize>> = chunks.bundles.iter().map(tokens).collect();
        assert_eq!(sizes, [vec![9], vec![8], vec![10]]);
        let places = forest.ends.iter().map(|end| chunks.places[*end]);
        let rows: Vec<(usize, usize)> = places.map(|it| (it.bundle, it.row)).collect();
        assert_eq!(rows, [(2, 0), (0, 0), (2, 5), (1, 0), (2, 8)]);
    }

    #[test]
    fn pieces_of_a_large_tree_repeat_what_all_of_it_follows() {
        let shots: Vec<u32> = (1000..1010).collect();
        let questions: Vec<Vec<u32>> = (0..40)
            .map(|q| [&shots[..], &[q, q, q, q, q]].concat())
            .collect();
        let texts: Vec<&[u32]> = questions.iter().map(Vec::as_slice).collect();
        let forest = Forest::grow(&texts);
        let chunks = Chunks::cut(&forest, &texts, 40);
        // At least 80 tokens each, in chunks of up to 40, of which 10 are repeated.
        let sizes: Vec<Vec<usize>> = chunks.bundles.iter().map(tokens).collect();
        assert_eq!(sizes, [vec![40, 40], vec![40, 40], vec![40, 30]]);
        for (text, end) in texts.iter().zip(&forest.ends) {
            let place = chunks.places[*end];
            let chunk = &chunks.bundles[place.bundle][place.chunk];
            assert_eq!(chunk.tokens[place.row..place.row + 5], text[10..]);
            assert_eq!(chunks.bundles[place.bundle][0].tokens[..10], shots);
            let rows: usize = chunk.stretches.iter().map(|it| it.len).sum();
            assert_eq!(rows, chunk.tokens.len());
        }
    }
}
