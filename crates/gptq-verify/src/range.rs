//! Checks that f16 programs can run the model: no intermediate value may exceed 65504.
//!
//! This program computes in f32 on the CPU, and attention accumulates scores in f32 everywhere, so
//! an overflow in f16 would go unnoticed. Transformers' eager attention computes `q kᵀ` in the
//! model's own dtype and scales it afterwards: one score beyond the range is an infinity, and its
//! row becomes NaN.

use burn::tensor::{DType, ElementConversion, Tensor};
use gptq_format::Half;
use gptq_kernels::Engine;
use gptq_model::{Block, Flow, Seen};
use gptq_plan::{F16Overflow, F16Range};

/// Score matrices checked per block and chunk: those of the heads with the longest queries and
/// keys.
const MATRICES: usize = 8;

/// Place of a value, for messages.
pub(crate) fn place(layer: Option<usize>, what: &str) -> String {
    match layer {
        Some(layer) => format!("{what} of block {layer}"),
        None => what.to_owned(),
    }
}

/// Largest magnitude of one kind, and the number of values beyond the range of f16.
#[derive(Clone, Debug, PartialEq)]
struct Magnitude {
    what: String,
    largest: f64,
    over: u64,
}

/// Magnitudes of a block or of the head.
#[derive(Clone, Debug, Default)]
pub(crate) struct Magnitudes(Vec<Magnitude>);

impl Magnitudes {
    /// Runs a block on `flow` and reads its intermediate values.
    pub(crate) fn of<B: Engine>(block: &Block<B>, flow: Flow<B>) -> (Flow<B>, Magnitudes) {
        let mut magnitudes = Magnitudes::default();
        let flow = block.observed(flow, &mut |seen| magnitudes.see(block, seen));
        (flow, magnitudes)
    }

    fn see<B: Engine>(&mut self, block: &Block<B>, seen: Seen<B>) {
        let name = |linear: usize| {
            let linear = block.spec().linears().get(linear);
            output(linear.map_or("", |linear| &linear.name))
        };
        match seen {
            Seen::Output(linear, y) => self.read(&name(linear), y),
            Seen::Experts(experts) => {
                for (linear, rows) in experts.runs {
                    let y = experts.outputs.clone();
                    self.read(&name(linear), y.narrow(0, rows.start, rows.len()));
                }
            }
            Seen::Gated(y) => self.read("gated activations", y),
            Seen::Residual(y) => self.read("hidden states", y),
            Seen::Rotated(q, k) => {
                let flat = |x: &Tensor<B, 4>| {
                    let [windows, seq, heads, dim] = x.dims();
                    x.clone().reshape([windows * seq, heads * dim])
                };
                self.read("rotated queries", flat(&q));
                self.read("rotated keys", flat(&k));
                self.scores(q, k);
            }
        }
    }

    /// Adds the magnitudes of `x`.
    pub(crate) fn read<B: Engine>(&mut self, what: &str, x: Tensor<B, 2>) {
        let limit = Half::F16.largest();
        let magnitudes = x.abs();
        let largest: f64 = magnitudes.clone().max_dim(1).max().into_scalar().elem();
        // Values computed in 16 bits are already infinite, and later NaN.
        let over = match largest <= limit {
            true => 0,
            false => count(magnitudes.lower_equal_elem(limit).bool_not().int().sum()),
        };
        self.add(Magnitude {
            what: what.to_owned(),
            largest,
            over,
        });
    }

    /// Adds the scores `q·k` of every query with every key, including keys that are masked later,
    /// as adding the mask leaves an infinity infinite. Large negative scores are ignored: such a
    /// key gets no weight either way.
    fn scores<B: Engine>(&mut self, q: Tensor<B, 4>, k: Tensor<B, 4>) {
        let limit = Half::F16.largest();
        let [_, seq, heads, dim] = q.dims();
        let kv_heads = k.dims()[2];
        let shared = heads / kv_heads;
        // |q·k| is at most |q||k|.
        let longest = |x: &Tensor<B, 4>| -> Vec<f64> {
            let x = x.clone().cast(DType::F32);
            let squares = (x.clone() * x).sum_dim(3).max_dim(1);
            squares.into_data().iter::<f64>().collect()
        };
        let (of_q, of_k) = (longest(&q), longest(&k));
        let bounds = of_k.iter().zip(of_q.chunks(shared)).enumerate();
        let mut bounds: Vec<(usize, f64)> = bounds
            .map(|(at, (k, q))| {
                let q = q.iter().copied().fold(0.0, f64::max);
                (at, (q * k).sqrt())
            })
            .filter(|&(_, bound)| bound > limit && bound.is_finite())
            .collect();
        bounds.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut magnitude = Magnitude {
            what: "attention scores before scaling".to_owned(),
            largest: 0.0,
            over: 0,
        };
        for (at, _) in bounds.into_iter().take(MATRICES) {
            let (window, head) = (at / kv_heads, at % kv_heads);
            let part = |x: &Tensor<B, 4>, first: usize, n: usize| {
                let part = x
                    .clone()
                    .slice([window..window + 1, 0..seq, first..first + n, 0..dim]);
                part.cast(DType::F32)
                    .swap_dims(1, 2)
                    .reshape([n * seq, dim])
            };
            let (q, k) = (part(&q, head * shared, shared), part(&k, head, 1));
            let scores = q.matmul(k.transpose());
            let largest: f64 = scores.clone().max_dim(1).max().into_scalar().elem();
            magnitude.largest = magnitude.largest.max(largest);
            if largest > limit {
                magnitude.over += count(scores.greater_elem(limit).int().sum());
            }
        }
        self.add(magnitude);
    }

    fn add(&mut self, new: Magnitude) {
        match self
            .0
            .iter_mut()
            .find(|magnitude| magnitude.what == new.what)
        {
            Some(magnitude) => {
                if new.largest > magnitude.largest || new.largest.is_nan() {
                    magnitude.largest = new.largest;
                }
                magnitude.over += new.over;
            }
            None => self.0.push(new),
        }
    }

    /// Adds the magnitudes of another chunk.
    pub(crate) fn merge(&mut self, other: Magnitudes) {
        other
            .0
            .into_iter()
            .for_each(|magnitude| self.add(magnitude));
    }

    /// Returns true if any value is beyond the range.
    pub(crate) fn overflow(&self) -> bool {
        self.0.iter().any(|magnitude| magnitude.over > 0)
    }

    fn is_over(&self, what: &str) -> bool {
        self.0.iter().any(|r| r.what == what && r.over > 0)
    }
}

fn count<B: Engine>(sum: Tensor<B, 1, burn::tensor::Int>) -> u64 {
    let sum: i64 = sum.into_scalar().elem();
    sum.unsigned_abs()
}

/// Describes the output of a linear layer, by its module's name.
fn output(module: &str) -> String {
    match module.rsplit('.').next().unwrap_or(module) {
        "q_proj" => "queries".to_owned(),
        "k_proj" => "keys".to_owned(),
        "v_proj" => "values".to_owned(),
        linear => format!("outputs of {linear}"),
    }
}

/// Adds to `range` what the whole text showed in block `layer`, or in the head; `dense` is what the dense model
/// showed there, where it was looked at.
pub(crate) fn add(
    range: &mut F16Range,
    layer: Option<usize>,
    magnitudes: &Magnitudes,
    dense: Option<&Magnitudes>,
) {
    for magnitude in &magnitudes.0 {
        if magnitude.over > 0 {
            range.overflows.push(F16Overflow {
                layer,
                what: magnitude.what.clone(),
                values: magnitude.over,
                largest: Some(magnitude.largest).filter(|l| l.is_finite()),
                dense: dense.map(|dense| dense.is_over(&magnitude.what)),
            });
        } else if magnitude.largest > range.largest {
            range.largest = magnitude.largest;
            range.at = place(layer, &magnitude.what);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;
    use gptq_kernels::Cpu;

    use super::*;

    fn heads(values: Vec<f32>, shape: [usize; 4], dtype: DType) -> Tensor<Cpu, 4> {
        let data = TensorData::new(values, shape);
        Tensor::<Cpu, 4>::from_data(data, (&Default::default(), DType::F32)).cast(dtype)
    }

    #[test]
    fn scores_are_those_of_every_pair_of_a_query_and_a_key() {
        // One window of two tokens, two query heads on one key head of dimension 2. Only the first
        // query of the second head exceeds the range, with the second key, which is masked for it:
        // 300 * 300.
        let q = vec![1.0, 0.0, 300.0, 0.0, 2.0, 0.0, -300.0, 0.0];
        let k = vec![1.0, 1.0, 300.0, -5.0];
        for dtype in [DType::F32, DType::F16] {
            let mut magnitudes = Magnitudes::default();
            magnitudes.scores(
                heads(q.clone(), [1, 2, 2, 2], dtype),
                heads(k.clone(), [1, 2, 1, 2], dtype),
            );
            let [magnitude] = &magnitudes.0[..] else {
                panic!("one magnitude")
            };
            assert_eq!((magnitude.largest, magnitude.over), (9e4, 1), "{dtype:?}");
        }
    }

    #[test]
    fn scores_that_cannot_reach_the_range_are_not_computed() {
        let mut magnitudes = Magnitudes::default();
        magnitudes.scores(
            heads(vec![250.0, 0.0], [1, 1, 1, 2], DType::F32),
            heads(vec![250.0, 0.0], [1, 1, 1, 2], DType::F32),
        );
        assert_eq!(magnitudes.0[0].largest, 0.0);
        assert!(!magnitudes.overflow());
    }

    #[test]
    fn values_beyond_the_range_are_counted_also_where_they_are_infinite_already() {
        let values = vec![1.0, -7e4, 65504.0, f32::INFINITY, -2.0, 3.0];
        for dtype in [DType::F32, DType::F16] {
            let data = TensorData::new(values.clone(), [2, 3]);
            let x = Tensor::<Cpu, 2>::from_data(data, (&Default::default(), DType::F32));
            let mut magnitudes = Magnitudes::default();
            magnitudes.read("values", x.cast(dtype));
            let mut range = F16Range::default();
            add(&mut range, Some(3), &magnitudes, None);
            let found = &range.overflows[0];
            assert_eq!((found.values, found.largest), (2, None), "{dtype:?}");
            assert_eq!(place(found.layer, &found.what), "values of block 3");
        }
    }
}
