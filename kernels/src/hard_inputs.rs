//! Extreme inputs and weights, on every engine: each gives finite weights with an error no larger
//! than round-to-nearest's, or an error message with the reason.

use burn::tensor::{DType, Tensor, TensorData};
use gptq_format::{Bits, GroupSize};
use gptq_solver::{Settings, SolverError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cuda::testing;
use crate::{Cpu, Cuda, Engine, HessianOptions, Problem, Request, Subset};

const TOKENS: usize = 256;
const IN: usize = 64;
const OUT: usize = 32;

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// An engine under test.
struct On<B: Engine> {
    device: B::Device,
    /// Dtype of inputs and weights.
    dtype: DType,
    /// A value barely above 0 in that dtype.
    tiny: f32,
    /// The largest weights: dequantized values may be 8 / 7.5 times as large, and must also fit
    /// that dtype.
    huge: f32,
    /// Allowed error above round-to-nearest's, relative to it: both are quotients of sums, in f64
    /// or in f32.
    noise: f64,
}

fn cpu() -> On<Cpu> {
    On {
        device: Default::default(),
        dtype: DType::F32,
        tiny: 6e-8,
        huge: 65504.0,
        noise: 1e-9,
    }
}

/// Returns `None` without a device.
fn cuda() -> Option<On<Cuda>> {
    testing::device().map(|device| On {
        device,
        dtype: DType::F16,
        tiny: 2e-5,
        huge: 50000.0,
        noise: 1e-4,
    })
}

impl<B: Engine> On<B> {
    /// Quantizes weights `w [OUT, IN]` on inputs `x [TOKENS, IN]` at 4 bits in groups of 32.
    fn solve(
        &self,
        x: Vec<f32>,
        w: Vec<f32>,
        damping: f64,
        sym: bool,
    ) -> Result<Subset<B>, SolverError> {
        let tensor = |values: Vec<f32>, rows| -> Tensor<B, 2> {
            let data = TensorData::new(values, [rows, IN]).convert_dtype(self.dtype);
            Tensor::from_data(data, (&self.device, self.dtype))
        };
        let gram = B::gram_zeros([IN, IN], &self.device);
        let request = Request {
            weight: tensor(w, OUT),
            settings: Settings {
                bits: Bits::Four,
                group_size: GroupSize::Columns(32),
                sym,
                static_groups: false,
                scale_search: true,
                f16_scales: true,
                refine: 0,
            },
            residual: None,
            keep_unrounded: false,
        };
        let hessian = HessianOptions {
            act_order: true,
            damping,
        };
        let gram = B::gram_add(gram, tensor(x, TOKENS));
        let problem = Problem {
            gram,
            mismatch: None,
            requests: vec![request],
        };
        B::solve(problem, hessian)
    }

    /// Returns the single linear layer, after checking that all its values are finite and no worse
    /// than rounding.
    fn sound(&self, what: &str, subset: &Subset<B>) -> (f64, Vec<f32>) {
        let solved = &subset.solved[0];
        let weights = solved.weight.clone().into_data().convert::<f32>();
        let weights: Vec<f32> = weights.iter().collect();
        assert!(weights.iter().all(|w| w.is_finite()), "{what}");
        let (error, rtn) = (solved.relative_error, solved.rtn_error);
        assert!(
            error.is_finite() && rtn.is_finite(),
            "{what}: {error} {rtn}"
        );
        let most = rtn * (1.0 + self.noise) + 1e-12;
        assert!(error <= most, "{what}: {error} {rtn}");
        (error, weights)
    }

    fn extreme_inputs(&self) {
        let scaled = |by: f32| random(1, TOKENS * IN).iter().map(|v| v * by).collect();
        let constant = vec![1.0; TOKENS * IN];
        // 8 directions for 64 columns.
        let (left, right) = (random(2, TOKENS * 8), random(3, 8 * IN));
        let rank_8 = (0..TOKENS * IN)
            .map(|at| {
                let (t, j) = (at / IN, at % IN);
                (0..8).map(|k| left[t * 8 + k] * right[k * IN + j]).sum()
            })
            .collect();
        let mut outlier = random(1, TOKENS * IN);
        outlier
            .iter_mut()
            .skip(5)
            .step_by(IN)
            .for_each(|v| *v *= 1000.0);
        let inputs: [(&str, Vec<f32>); 6] = [
            ("huge", scaled(65504.0)),
            ("tiny", scaled(self.tiny)),
            ("constant", constant),
            ("rank 8", rank_8),
            ("outlier channel", outlier),
            ("one token", {
                let mut x = vec![0.0; TOKENS * IN];
                x[..IN].copy_from_slice(&random(4, IN));
                x
            }),
        ];
        for (what, x) in inputs {
            for sym in [true, false] {
                let subset = self.solve(x.clone(), random(5, OUT * IN), 0.1, sym);
                let subset = subset.unwrap_or_else(|error| panic!("{what}: {error}"));
                let (error, _) = self.sound(what, &subset);
                assert_eq!((subset.damping, subset.dead_columns), (0.1, 0), "{what}");
                assert!(error < 0.05, "{what}: {error}");
            }
        }
    }

    fn raised_damping(&self) {
        // All columns are equal: without damping the second pivot is 0, up to rounding.
        let constant = vec![1.0; TOKENS * IN];
        let subset = self
            .solve(constant, random(5, OUT * IN), 0.0, true)
            .unwrap();
        self.sound("constant", &subset);
        assert_eq!(subset.damping, 0.01, "the first step");
    }

    fn dead_columns(&self) {
        let zero = vec![0.0; TOKENS * IN];
        let subset = self.solve(zero, random(5, OUT * IN), 0.1, true).unwrap();
        let (error, weights) = self.sound("zero", &subset);
        assert_eq!((subset.dead_columns, error), (IN, 0.0));
        assert!(weights.iter().all(|&w| w == 0.0));

        let mut x = random(1, TOKENS * IN);
        x.iter_mut().skip(7).step_by(IN).for_each(|v| *v = 0.0);
        let subset = self.solve(x, random(5, OUT * IN), 0.1, true).unwrap();
        let (_, weights) = self.sound("one dead column", &subset);
        assert_eq!(subset.dead_columns, 1);
        assert!(weights.iter().skip(7).step_by(IN).all(|&w| w == 0.0));
    }

    fn inputs_that_are_not_finite(&self) {
        // The last is infinite in f16.
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            let mut x = random(1, TOKENS * IN);
            x[3 * IN + 9] = value;
            let ended = self.solve(x, random(5, OUT * IN), 0.1, true);
            let error = ended.map(|_| ()).unwrap_err();
            let refused = matches!(error, SolverError::NonFiniteGram { .. });
            assert!(refused, "{value}: {error}");
        }
    }

    fn extreme_weights(&self) {
        let scaled = |by: f32| -> Vec<f32> { random(5, OUT * IN).iter().map(|v| v * by).collect() };
        let mut outlier = random(5, OUT * IN);
        outlier[17] = 1000.0;
        for (what, w, most) in [
            ("huge", scaled(self.huge), 0.05),
            ("zero", scaled(0.0), 0.0),
            // Smaller than the smallest f16 scale can resolve: all is lost, and nothing more.
            ("tiny", scaled(6e-8), 1.0),
            ("outlier weight", outlier, 0.05),
        ] {
            for sym in [true, false] {
                let subset = self.solve(random(1, TOKENS * IN), w.clone(), 0.1, sym);
                let (error, _) = self.sound(what, &subset.unwrap());
                assert!(error <= most + self.noise, "{what}: {error}");
            }
        }
    }
}

#[test]
fn extreme_inputs_are_solved_no_worse_than_by_rounding() {
    cpu().extreme_inputs();
}

#[test]
fn extreme_inputs_are_solved_no_worse_than_by_rounding_on_the_device() {
    cuda().iter().for_each(On::extreme_inputs);
}

#[test]
fn damping_is_raised_where_the_inputs_allow_no_factor_and_what_was_used_is_told() {
    cpu().raised_damping();
}

#[test]
fn damping_is_raised_on_the_device_too() {
    cuda().iter().for_each(On::raised_damping);
}

#[test]
fn zero_inputs_are_dead_columns() {
    cpu().dead_columns();
}

#[test]
fn zero_inputs_are_dead_columns_on_the_device_too() {
    cuda().iter().for_each(On::dead_columns);
}

#[test]
fn inputs_that_are_not_finite_are_refused() {
    cpu().inputs_that_are_not_finite();
}

#[test]
fn inputs_that_are_not_finite_are_refused_on_the_device_too() {
    cuda().iter().for_each(On::inputs_that_are_not_finite);
}

#[test]
fn extreme_weights_stay_finite() {
    cpu().extreme_weights();
}

#[test]
fn extreme_weights_stay_finite_on_the_device_too() {
    cuda().iter().for_each(On::extreme_weights);
}
