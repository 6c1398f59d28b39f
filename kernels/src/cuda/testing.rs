//! Helpers of the device tests: seeded inputs, poisoned outputs, skipping without a device.

use burn::tensor::{DType, Element, Tensor, TensorData};
use cudarc::driver;

use super::{Cuda, Device, buffer::Buffer, error::Error, solve, stream::on_stream};
use crate::{HessianOptions, Mismatch, Problem, Request, Subset};

/// Returns the first device, or prints that there is none.
pub(crate) fn device() -> Option<Device> {
    if crate::Device::Cuda(0).resolve().is_err() {
        println!("skipped: no CUDA device");
        return None;
    }
    Some(Device::new(0))
}

/// Fills a new buffer with 0xff, NaN in every float type, so that elements a kernel does not write
/// are noticed.
pub(crate) fn poison(buffer: &Buffer) {
    let bytes = buffer.handle.size_in_used() as usize;
    on_stream(&[buffer], |libraries, pointers| {
        // SAFETY: the buffer has this many bytes.
        unsafe { driver::result::memset_d8_async(pointers[0], 0xff, bytes, libraries.stream) }
            .map_err(|source| Error::Driver {
                operation: "cuMemsetD8Async",
                source,
            })
    })
    .unwrap();
}

/// Solves the linears of one input.
pub(crate) fn solve_one(
    gram: Tensor<Cuda, 2>,
    mismatch: Option<Mismatch<Cuda>>,
    hessian: HessianOptions,
    requests: &[Request<Cuda>],
) -> Result<Subset<Cuda>, Error> {
    let problem = Problem {
        gram,
        mismatch,
        requests: requests.to_vec(),
    };
    let subsets = solve(vec![problem], hessian).map_err(|failed| failed.error)?;
    Ok(subsets.into_iter().next().unwrap())
}

/// A small seeded generator (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number uniform in [0, 1).
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Returns a standard normal number.
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Returns normal values of this standard deviation, rounded to f16 or bf16.
    pub(crate) fn halves<E: Element>(&mut self, count: usize, deviation: f64) -> Vec<E> {
        (0..count)
            .map(|_| E::from_elem(self.normal() * deviation))
            .collect()
    }
}

/// Converts to f64.
pub(crate) fn wide<E: Element>(value: E) -> f64 {
    value.elem()
}

/// Returns the maximum relative rounding error of a type.
pub(crate) fn rounding<E: Element>() -> f64 {
    match E::dtype() {
        DType::BF16 => 2.0_f64.powi(-8),
        _ => 2.0_f64.powi(-11),
    }
}

/// Makes a tensor of f16 or bf16 values on the device.
pub(crate) fn tensor<E: Element, const D: usize>(
    values: &[E],
    shape: [usize; D],
    device: &Device,
) -> Tensor<Cuda, D> {
    Tensor::from_data(
        TensorData::new(values.to_vec(), shape),
        (device, E::dtype()),
    )
}

/// Makes a tensor of f32 values on the device.
pub(crate) fn tensor_f32<const D: usize>(
    values: &[f32],
    shape: [usize; D],
    device: &Device,
) -> Tensor<Cuda, D> {
    Tensor::from_data(
        TensorData::new(values.to_vec(), shape),
        (device, DType::F32),
    )
}

/// Returns a float tensor's values.
pub(crate) fn values<const D: usize>(tensor: Tensor<Cuda, D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Returns `‖found - expected‖ / ‖expected‖`; NaN if any value is.
pub(crate) fn distance(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let norm = square(&mut expected.iter().copied());
    if norm == 0.0 {
        difference.sqrt()
    } else {
        (difference / norm).sqrt()
    }
}
