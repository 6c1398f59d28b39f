//! Hidden states beyond the range of their 16-bit storage type: refused with their position, or
//! clamped to the largest number if the recipe allows it (`[numerics] overflow = "clamp"`).
//!
//! Detection is free: a non-finite state makes the diagonal of the next Gram matrix non-finite,
//! which the solver checks anyway. Only then are the states searched.

use std::ops::Range;

use burn::tensor::Tensor;
use gptq_format::Half;
use gptq_kernels::{Engine, NotFinite};
use gptq_model::Flow;
use gptq_spec::BlockSpec;
use thiserror::Error;

/// Hidden states that are not finite; the position is that of the first in the order of the
/// windows.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub struct Overflow {
    /// "residual" or "activation".
    pub tensor: &'static str,
    /// Window of the calibration data.
    pub window: usize,
    /// Token in it.
    pub token: usize,
    /// Feature.
    pub feature: usize,
    /// Number of values over all windows.
    pub count: usize,
    /// True if any of them is NaN.
    pub nan: bool,
    /// Storage type of the states.
    pub half: Half,
}

impl std::fmt::Display for Overflow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let largest = match self.half {
            Half::F16 => "65504",
            Half::Bf16 => "3.39e38",
        };
        let what = match self.nan {
            true => "that are not finite, including NaN".to_owned(),
            false => format!("beyond {}'s range of {largest}", self.half),
        };
        write!(
            f,
            "the {} before it has {} values {what}; the first is in window {}, token {}, feature {}",
            self.tensor, self.count, self.window, self.token, self.feature
        )?;
        match self.nan {
            true => write!(f, "; check the checkpoint's weights"),
            false => {
                let wider = match self.half {
                    Half::F16 => "on CUDA, dtype = \"bf16\" holds them; ",
                    Half::Bf16 => "",
                };
                write!(
                    f,
                    "; {wider}[numerics] overflow = \"clamp\" continues with {largest} instead"
                )
            }
        }
    }
}

/// Formats [`Clamped::after`].
pub(crate) fn after(block: &BlockSpec, taps: Range<usize>) -> String {
    match taps.len() {
        1 => block.tap_name(taps.start).to_owned(),
        _ => "block".to_owned(),
    }
}

/// Clamps a flow's states to the range of `half`; returns the number of values outside.
pub(crate) fn clamp<B: Engine>(flow: Flow<B>, half: Half) -> (Flow<B>, usize) {
    let (residual, mut count) = B::clamp(flow.residual, half);
    let activations = flow.activations.into_iter().map(|(register, states)| {
        let (states, more) = B::clamp(states, half);
        count += more;
        (register, states)
    });
    let flow = Flow {
        windows: flow.windows,
        residual,
        activations: activations.collect(),
        routed: flow.routed,
    };
    (flow, count)
}

/// Searches the flows, stored in `half`, in order for values that are not finite.
pub(crate) fn search<B: Engine, E>(
    half: Half,
    flows: impl Iterator<Item = Result<Flow<B>, E>>,
) -> Result<Option<Overflow>, E> {
    let mut found: Option<Overflow> = None;
    let mut windows = 0;
    for flow in flows {
        let flow = flow?;
        let activations = flow.activations.values();
        let parts = activations.map(|states| ("activation", states));
        for (tensor, states) in parts.chain([("residual", &flow.residual)]) {
            let Some(bad) = B::not_finite(states.clone()) else {
                continue;
            };
            let place = place(states, bad, flow.windows);
            let found = found.get_or_insert(Overflow {
                tensor,
                window: windows + place[0],
                token: place[1],
                feature: bad.column,
                count: 0,
                nan: false,
                half,
            });
            if found.tensor == tensor {
                found.count += bad.count;
                found.nan |= bad.nan;
            }
        }
        windows += flow.windows;
    }
    Ok(found)
}

/// Returns window and token of a row.
fn place<B: Engine>(states: &Tensor<B, 2>, bad: NotFinite, windows: usize) -> [usize; 2] {
    let seq_len = (states.dims()[0] / windows.max(1)).max(1);
    [bad.row / seq_len, bad.row % seq_len]
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, TensorData};
    use gptq_kernels::Cpu;
    use gptq_spec::{BlockBuilder, Register};

    use super::*;

    /// Makes two windows of two tokens with two features.
    fn flow(residual: [f32; 8], activation: Option<[f32; 8]>) -> Flow<Cpu> {
        let tensor = |values: [f32; 8]| {
            let data = TensorData::new(values.to_vec(), [4, 2]);
            Tensor::from_data(data, (&Default::default(), DType::F32))
        };
        let [register] = BlockBuilder::new(2).split(Register::RESIDUAL, [2]);
        Flow {
            activations: activation
                .map(|it| (register, tensor(it)))
                .into_iter()
                .collect(),
            ..Flow::new(2, tensor(residual))
        }
    }

    #[test]
    fn the_first_is_named_by_window_token_and_feature() {
        let fine = [1.0; 8];
        let mut bad = fine;
        bad[5] = f32::INFINITY;
        bad[7] = f32::INFINITY;
        let flows = [flow(fine, None), flow(bad, None), flow(bad, None)];
        let search = |flows: &[Flow<Cpu>]| {
            search(
                Half::F16,
                flows.iter().cloned().map(Ok::<_, std::convert::Infallible>),
            )
            .unwrap()
        };
        let found = search(&flows).unwrap();
        let expected = Overflow {
            tensor: "residual",
            window: 3,
            token: 0,
            feature: 1,
            count: 4,
            nan: false,
            half: Half::F16,
        };
        assert_eq!(found, expected);
        assert!(found.to_string().contains("overflow = \"clamp\""));
        assert_eq!(search(&[flow(fine, Some(fine))]), None);

        let mut nan = fine;
        nan[0] = f32::NAN;
        let found = search(&[flow(fine, Some(nan))]).unwrap();
        assert_eq!(
            (found.tensor, found.count, found.nan),
            ("activation", 1, true)
        );
        assert!(found.to_string().contains("NaN"), "{found}");
    }

    #[test]
    fn both_parts_are_clamped_and_counted() {
        let mut large = [1.0; 8];
        large[2] = 1e6;
        large[3] = -1e6;
        let (clamped, count) = clamp(flow(large, Some(large)), Half::F16);
        assert_eq!(count, 4);
        let found = search(
            Half::F16,
            [Ok::<_, ()>(clamped.cast(DType::F16))].into_iter(),
        );
        assert_eq!(found, Ok(None));
    }
}
