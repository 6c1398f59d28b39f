//! Sums over chunks of a tap's inputs, their Gram matrices among them: chunk by chunk, lane by lane, and over all ranks.

use burn::tensor::Tensor;
use gptq_kernels::Engine;
use gptq_ranks::RankError;

use crate::RunError;
use crate::peers::Peers;
use crate::rank_sums::{SumPart, Summand, sum_ranks};

/// Gram matrices of an input, f32 `[in, in]` each.
#[derive(Clone)]
pub(crate) struct Grams<B: Engine> {
    /// `XᵀX` of all tokens, upper triangle.
    pub(crate) all: Tensor<B, 2>,
    pub(crate) mismatch: Option<Drift<B>>,
    /// Number of rows that were summed.
    pub(crate) tokens: usize,
}

/// Sums over the tokens that the dense model was given too, f32.
#[derive(Clone)]
pub(crate) struct Drift<B: Engine> {
    /// `XᵀX [in, in]`, upper triangle.
    pub(crate) gram: Tensor<B, 2>,
    /// `(X_d - X)ᵀX [in, in]`.
    pub(crate) cross: Tensor<B, 2>,
    /// `(R_d - R)ᵀX [hidden, in]` of the residual stream before the tap, if its outputs are added to that.
    pub(crate) residual: Option<Tensor<B, 2>>,
}

impl<B: Engine> std::ops::Add for Drift<B> {
    type Output = Drift<B>;

    fn add(self, other: Drift<B>) -> Drift<B> {
        Drift {
            gram: self.gram + other.gram,
            cross: self.cross + other.cross,
            residual: sum(self.residual, other.residual),
        }
    }
}

/// Sums over chunks of one input. Tokens that the dense model was given too are summed apart.
pub(crate) struct GramSums<B: Engine> {
    apart: Option<Drift<B>>,
    rest: Option<Tensor<B, 2>>,
    /// Number of rows.
    pub(crate) tokens: usize,
}

impl<B: Engine> Default for GramSums<B> {
    fn default() -> Self {
        GramSums {
            apart: None,
            rest: None,
            tokens: 0,
        }
    }
}

/// States of the dense model, for the tokens of a chunk.
pub(crate) struct DenseStates<B: Engine> {
    /// Input of the tap.
    pub(crate) x: Tensor<B, 2>,
    /// Its residual stream and the branch's, if the tap's outputs are to make up for the difference.
    pub(crate) residuals: Option<[Tensor<B, 2>; 2]>,
}

/// Weights of rows in the sums, `[rows, 1]` in compute dtype.
pub(crate) struct RowWeights<B: Engine> {
    /// Square root of the weight.
    pub(crate) root: Tensor<B, 2>,
    /// The weight, and that in the sum with the residual streams; where the dense model was given the rows too.
    pub(crate) drift: Option<[Tensor<B, 2>; 2]>,
}

/// Adds a chunk's inputs to the sums of each of some inputs: rows `starts[i]..starts[i + 1]` of `x` to the `i`-th, with
/// their weights where these are not 1, and the dense model's states for the same rows.
pub(crate) fn add_each<B: Engine>(
    sums: &mut [GramSums<B>],
    starts: &[usize],
    x: Tensor<B, 2>,
    weights: Option<RowWeights<B>>,
    dense: Option<DenseStates<B>>,
) {
    let n = x.dims()[1];
    let zeros = |rows| B::gram_zeros([rows, n], &x.device());
    let runs = sums.iter_mut().zip(starts.windows(2));
    let mut given: Vec<_> = (runs.filter(|(_, run)| run[0] < run[1]))
        .map(|(sums, run)| {
            sums.tokens += run[1] - run[0];
            sums
        })
        .collect();
    let mut starts = starts.to_vec();
    starts.dedup();
    let weighted = |weights: Option<&Tensor<B, 2>>| match weights {
        Some(weights) => x.clone() * weights.clone(),
        None => x.clone(),
    };
    let root = weighted(weights.as_ref().map(|it| &it.root));
    // Sums are taken out, so that the engine owns them alone and can add in place.
    let Some(dense) = dense else {
        let rest = given.iter_mut().map(|it| it.rest.take());
        let rest = rest.map(|rest| rest.unwrap_or_else(|| zeros(n)));
        let rest = B::gram_add_each(rest.collect(), root, &starts);
        for (sums, rest) in given.iter_mut().zip(rest) {
            sums.rest = Some(rest);
        }
        return;
    };
    let [whole, shares] = [0, 1].map(|at| {
        let drift = weights.as_ref().and_then(|it| it.drift.as_ref());
        weighted(drift.map(|drift| &drift[at]))
    });
    let (mut grams, mut crosses, mut residuals) = (Vec::new(), Vec::new(), Vec::new());
    for sums in &mut given {
        let apart = sums.apart.take();
        let (gram, cross, residual) = match apart {
            Some(drift) => (drift.gram, drift.cross, drift.residual),
            None => (zeros(n), zeros(n), None),
        };
        grams.push(gram);
        crosses.push(cross);
        residuals.push(residual);
    }
    let residuals: Vec<_> = match dense.residuals {
        None => residuals,
        Some(pair) => {
            let hidden = pair[0].dims()[1];
            let sums = residuals.into_iter();
            let sums = sums.map(|sum| sum.unwrap_or_else(|| zeros(hidden)));
            let sums = B::cross_add_each(sums.collect(), pair, shares, &starts);
            sums.into_iter().map(Some).collect()
        }
    };
    let grams = B::gram_add_each(grams, root, &starts);
    let crosses = B::cross_add_each(crosses, [dense.x, x], whole, &starts);
    let drifts = grams.into_iter().zip(crosses).zip(residuals);
    for (sums, ((gram, cross), residual)) in given.iter_mut().zip(drifts) {
        sums.apart = Some(Drift {
            gram,
            cross,
            residual,
        });
    }
}

/// Adds up all ranks' sums over each of some inputs of `n` features, on each rank.
///
/// # Errors
/// The end of the run on another rank, or a failure of the link.
pub(crate) fn over_ranks<B: Engine>(
    sums: Vec<GramSums<B>>,
    [n, hidden]: [usize; 2],
    peers: &Peers<'_, B>,
    device: &B::Device,
) -> Result<Vec<GramSums<B>>, RunError> {
    if peers.share().size == 1 {
        return Ok(sums);
    }
    let own = sums.iter().flat_map(|sums| {
        let residual = sums.apart.as_ref().is_some_and(|it| it.residual.is_some());
        let flags = [sums.apart.is_some(), residual, sums.rest.is_some()].map(u8::from);
        flags.into_iter().chain((sums.tokens as u64).to_le_bytes())
    });
    let all = peers.all_gather(own.collect())?;
    let count = sums.len();
    if let Some(from) = all.iter().position(|it| it.len() != count * RECORD) {
        return Err(RunError::Ranks(RankError::Length {
            from,
            found: all[from].len(),
            wanted: count * RECORD,
        }));
    }
    let record = |rank: usize, at: usize| &all[rank][at * RECORD..(at + 1) * RECORD];
    let given = |at: usize, flag: usize| -> Vec<bool> {
        (0..all.len())
            .map(|rank| record(rank, at)[flag] == 1)
            .collect()
    };
    let mut summands = Vec::new();
    for (at, sums) in sums.into_iter().enumerate() {
        let (gram, cross, residual) = match sums.apart {
            Some(sums) => (Some(sums.gram), Some(sums.cross), sums.residual),
            None => (None, None, None),
        };
        for (own, flag, part, rows) in [
            (gram, 0, SumPart::Upper, n),
            (cross, 0, SumPart::Whole, n),
            (residual, 1, SumPart::Whole, hidden),
            (sums.rest, 2, SumPart::Upper, n),
        ] {
            summands.push(Summand {
                own,
                given: given(at, flag),
                part,
                shape: [rows, n],
            });
        }
    }
    let mut summed = sum_ranks(summands, peers, device)?.into_iter();
    let sums = (0..count).map(|at| {
        let mut next = || summed.next().flatten();
        let (gram, cross, residual) = (next(), next(), next());
        let tokens = (0..all.len()).map(|rank| {
            let bytes = record(rank, at)[3..].try_into();
            u64::from_le_bytes(bytes.expect("eight bytes")) as usize
        });
        GramSums {
            apart: gram.zip(cross).map(|(gram, cross)| Drift {
                gram,
                cross,
                residual,
            }),
            rest: next(),
            tokens: tokens.sum(),
        }
    });
    Ok(sums.collect())
}

/// Bytes of what ranks tell each other of a [`GramSums`]: which sums there are, and the number of tokens.
const RECORD: usize = 3 + 8;

impl<B: Engine> GramSums<B> {
    /// Adds a chunk's input, and the dense model's states for the same tokens.
    pub(crate) fn add(&mut self, x: Tensor<B, 2>, dense: Option<DenseStates<B>>) {
        let starts = [0, x.dims()[0]];
        add_each(std::slice::from_mut(self), &starts, x, None, dense);
    }

    /// Returns the sums; `None` if nothing was added.
    pub(crate) fn finish(self) -> Option<Grams<B>> {
        let of_dense = self.apart.as_ref().map(|sums| sums.gram.clone());
        Some(Grams {
            all: sum(of_dense, self.rest)?,
            mismatch: self.apart,
            tokens: self.tokens,
        })
    }
}

impl<B: Engine> std::ops::Add for GramSums<B> {
    type Output = GramSums<B>;

    fn add(self, other: GramSums<B>) -> GramSums<B> {
        GramSums {
            apart: sum(self.apart, other.apart),
            rest: sum(self.rest, other.rest),
            tokens: self.tokens + other.tokens,
        }
    }
}

fn sum<T: std::ops::Add<Output = T>>(a: Option<T>, b: Option<T>) -> Option<T> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (one, other) => one.or(other),
    }
}
