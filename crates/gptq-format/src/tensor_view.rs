//! A tensor in a mapped file, and its conversion to f16 or bf16.
//!
//! Element `(i_0, ..., i_n)` is at `Σ i_k strides_k` of the storage. safetensors stores every
//! tensor row-major; PyTorch stores views with any strides, on storages that several tensors may
//! share.

use std::borrow::Cow;

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::{FormatError, Half};

/// Elements converted by one task.
const PIECE: usize = 1 << 18;
/// Elements widened at a time, to fit the nearest cache.
const RUN: usize = 1024;

/// One tensor in a mapped file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'a [usize],
    /// Stride of each dimension in elements; `None` for row-major without gaps.
    pub(crate) strides: Option<&'a [usize]>,
    /// Little-endian elements from the tensor's first to its last; may be unaligned.
    pub(crate) storage: &'a [u8],
}

/// Index of the first bad element, and their number.
type Found = Option<(usize, usize)>;

/// Elements that a 16-bit float cannot hold.
#[derive(Default)]
struct Flaws {
    /// Not finite in the file.
    non_finite: Found,
    /// Finite in the file only.
    overflow: Found,
}

impl<'a> TensorView<'a> {
    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns little-endian elements, row-major: borrowed from the file if they are stored so.
    pub fn bytes(&self) -> Cow<'a, [u8]> {
        match self.strides {
            None => Cow::Borrowed(self.storage),
            Some(strides) => {
                let size = self.dtype.bitsize() / 8;
                let mut bytes = Vec::with_capacity(self.elements() * size);
                for at in offsets(self.shape, strides, 0).take(self.elements()) {
                    let element = self.storage.get(at * size..(at + 1) * size);
                    bytes.extend_from_slice(element.unwrap_or_default());
                }
                Cow::Owned(bytes)
            }
        }
    }

    /// Returns true if `other`, of the same shape, has the same values in any float type.
    pub fn same_values(&self, other: &TensorView<'_>) -> bool {
        if self.dtype == other.dtype && self.strides.is_none() && other.strides.is_none() {
            return self.storage == other.storage;
        }
        let (Ok(one), Ok(two)) = (Float::of(self), Float::of(other)) else {
            return self.dtype == other.dtype && self.bytes() == other.bytes();
        };
        (0..self.elements().div_ceil(PIECE))
            .into_par_iter()
            .all(|piece| {
                let first = piece * PIECE;
                let len = PIECE.min(self.elements() - first);
                let (mut a, mut b) = (vec![0f32; len], vec![0f32; len]);
                self.widen(one, first, &mut a);
                other.widen(two, first, &mut b);
                a == b
            })
    }

    /// Returns true if all elements are zero.
    pub fn is_zero(&self) -> bool {
        match Float::of(self) {
            Ok(float) => {
                let mut values = vec![0f32; self.elements()];
                self.widen(float, 0, &mut values);
                values.iter().all(|value| *value == 0.0)
            }
            Err(_) => self.bytes().iter().all(|byte| *byte == 0),
        }
    }

    /// Fills `out` with the elements from `first` on, in f32.
    fn widen(&self, float: Float, first: usize, out: &mut [f32]) {
        match float {
            Float::F32 => self.copy(first, out, f32::from_le_bytes),
            Float::F16 => self.copy(first, out, |b| f16::from_le_bytes(b).to_f32()),
            Float::Bf16 => self.copy(first, out, |b| bf16::from_le_bytes(b).to_f32()),
        }
    }

    /// Writes all elements as the bits of `half`, row-major, into `out`; other floats are rounded
    /// to nearest even. Runs in parallel.
    ///
    /// # Errors
    /// A dtype that is not a float, a value that is not finite, or one beyond the range of `half`.
    ///
    /// # Panics
    /// The length of `out` is not the number of elements.
    pub fn halves_into(&self, half: Half, out: &mut [u16]) -> Result<(), FormatError> {
        assert_eq!(out.len(), self.elements(), "{}", self.name);
        let float = Float::of(self)?;
        self.verdict(half, self.stretch(float, half, 0, out))
    }

    /// Does the same `step` elements at a time and in order, and passes each piece to `take` with
    /// the index of its first element, so that no more of the tensor is in memory. After an error
    /// the rest is checked but not passed on.
    ///
    /// # Errors
    /// The same errors as [`TensorView::halves_into`], and errors of `take`.
    pub(crate) fn each_halves<E: From<FormatError>>(
        &self,
        half: Half,
        step: usize,
        mut take: impl FnMut(usize, &[u16]) -> Result<(), E>,
    ) -> Result<(), E> {
        let float = Float::of(self)?;
        let (total, step) = (self.elements(), step.max(1));
        let mut buffer = vec![0; total.min(step)];
        let mut flaws = Flaws::default();
        for first in (0..total).step_by(step) {
            let (out, _) = buffer.split_at_mut(step.min(total - first));
            flaws = flaws.join(self.stretch(float, half, first, out));
            if flaws.none() {
                take(first, out)?;
            }
        }
        Ok(self.verdict(half, flaws)?)
    }

    /// Converts elements from `first` on, with all threads.
    fn stretch(&self, float: Float, half: Half, first: usize, out: &mut [u16]) -> Flaws {
        out.par_chunks_mut(PIECE)
            .enumerate()
            .map(|(piece, out)| self.piece(float, half, first + piece * PIECE, out))
            .reduce(Flaws::default, Flaws::join)
    }

    fn verdict(&self, half: Half, flaws: Flaws) -> Result<(), FormatError> {
        let name = || self.name.to_owned();
        match flaws {
            Flaws {
                non_finite: Some((first, count)),
                ..
            } => Err(FormatError::NonFinite {
                name: name(),
                first,
                count,
            }),
            Flaws {
                overflow: Some((first, count)),
                ..
            } => Err(FormatError::Overflow {
                name: name(),
                half,
                first,
                count,
            }),
            _ => Ok(()),
        }
    }

    /// Converts elements from `first` on.
    fn piece(&self, float: Float, half: Half, first: usize, out: &mut [u16]) -> Flaws {
        let mut flaws = Flaws::default();
        if self.dtype == half.dtype() {
            self.copy(first, out, u16::from_le_bytes);
            if any_not_finite(half, out) {
                flaws.non_finite = find(out, first, |v| half.is_not_finite(*v));
            }
            return flaws;
        }
        let mut buffer = [0f32; RUN];
        for (run, out) in out.chunks_mut(RUN).enumerate() {
            let first = first + run * RUN;
            let (wide, _) = buffer.split_at_mut(out.len().min(RUN));
            self.widen(float, first, wide);
            half.round(wide, out);
            if any_not_finite(half, out) {
                // The source distinguishes a value that overflowed from one that was not finite.
                let non_finite = find(wide, first, |v| !v.is_finite());
                let both: Vec<(f32, u16)> = wide.iter().copied().zip(out.iter().copied()).collect();
                let overflow = find(&both, first, |(wide, bits)| {
                    wide.is_finite() && half.is_not_finite(*bits)
                });
                flaws = flaws.join(Flaws {
                    non_finite,
                    overflow,
                });
            }
        }
        flaws
    }

    /// Fills `out` with the elements of `N` bytes from `first` on.
    fn copy<const N: usize, T>(&self, first: usize, out: &mut [T], from: impl Fn([u8; N]) -> T) {
        let storage = self.storage.as_chunks::<N>().0;
        match self.strides {
            None => {
                for (out, element) in out.iter_mut().zip(storage.iter().skip(first)) {
                    *out = from(*element);
                }
            }
            Some(strides) => {
                for (out, at) in out.iter_mut().zip(offsets(self.shape, strides, first)) {
                    *out = from(storage.get(at).copied().unwrap_or([0; N]));
                }
            }
        }
    }

    /// Returns an i32 tensor's words.
    ///
    /// # Errors
    /// Another dtype.
    pub(crate) fn i32(&self) -> Result<Vec<i32>, FormatError> {
        if self.dtype != Dtype::I32 {
            return Err(self.wrong_dtype("I32"));
        }
        let mut values = vec![0; self.elements()];
        self.copy(0, &mut values, i32::from_le_bytes);
        Ok(values)
    }

    /// Returns the numbers of a float tensor.
    ///
    /// # Errors
    /// A dtype that is not a float, a value that is not finite.
    pub fn f32(&self) -> Result<Vec<f32>, FormatError> {
        let mut values = vec![0f32; self.elements()];
        self.widen(Float::of(self)?, 0, &mut values);
        match find(&values, 0, |value| !value.is_finite()) {
            None => Ok(values),
            Some((first, count)) => Err(FormatError::NonFinite {
                name: self.name.to_owned(),
                first,
                count,
            }),
        }
    }

    /// Returns a u32 tensor's words.
    ///
    /// # Errors
    /// Another dtype.
    pub(crate) fn u32(&self) -> Result<Vec<u32>, FormatError> {
        if self.dtype != Dtype::U32 {
            return Err(self.wrong_dtype("U32"));
        }
        let mut values = vec![0; self.elements()];
        self.copy(0, &mut values, u32::from_le_bytes);
        Ok(values)
    }

    /// Returns an i64 tensor's elements.
    ///
    /// # Errors
    /// Another dtype.
    pub(crate) fn i64(&self) -> Result<Vec<i64>, FormatError> {
        if self.dtype != Dtype::I64 {
            return Err(self.wrong_dtype("I64"));
        }
        let mut values = vec![0; self.elements()];
        self.copy(0, &mut values, i64::from_le_bytes);
        Ok(values)
    }

    fn wrong_dtype(&self, expected: &'static str) -> FormatError {
        FormatError::Dtype {
            name: self.name.into(),
            found: format!("{:?}", self.dtype),
            expected,
        }
    }
}

/// Element types of weights.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Float {
    F16,
    Bf16,
    F32,
}

impl Float {
    fn of(view: &TensorView<'_>) -> Result<Float, FormatError> {
        match view.dtype {
            Dtype::F16 => Ok(Float::F16),
            Dtype::BF16 => Ok(Float::Bf16),
            Dtype::F32 => Ok(Float::F32),
            _ => Err(view.wrong_dtype("F16, BF16 or F32")),
        }
    }
}

impl Flaws {
    fn none(&self) -> bool {
        self.non_finite.is_none() && self.overflow.is_none()
    }

    fn join(self, other: Flaws) -> Flaws {
        let join = |a: Found, b: Found| match (a, b) {
            (Some((first, n)), Some((other, m))) => Some((first.min(other), n + m)),
            (one, other) => one.or(other),
        };
        Flaws {
            non_finite: join(self.non_finite, other.non_finite),
            overflow: join(self.overflow, other.overflow),
        }
    }
}

/// Returns true if a value is not finite. Runs are summed without a branch, as this reads every
/// weight of a model.
fn any_not_finite(half: Half, values: &[u16]) -> bool {
    values.chunks(4096).any(|run| {
        let bad = |v: &u16| u32::from(half.is_not_finite(*v));
        run.iter().map(bad).sum::<u32>() > 0
    })
}

/// Returns the index of the first element for which `bad` holds, counted from `start`, and their
/// number.
fn find<T>(values: &[T], start: usize, bad: impl Fn(&T) -> bool) -> Found {
    let first = values.iter().position(&bad)?;
    Some((
        start + first,
        values.iter().skip(first).filter(|v| bad(v)).count(),
    ))
}

/// Returns the offsets of a tensor's elements in its storage, row-major from element `first` on. No
/// more may be taken than the tensor has from there.
fn offsets<'a>(
    shape: &'a [usize],
    strides: &'a [usize],
    first: usize,
) -> impl Iterator<Item = usize> + use<'a> {
    let mut index = vec![0; shape.len()];
    let (mut rest, mut at) = (first, 0);
    for ((i, &size), &stride) in index.iter_mut().zip(shape).zip(strides).rev() {
        *i = rest.checked_rem(size).unwrap_or(0);
        rest = rest.checked_div(size).unwrap_or(0);
        at += *i * stride;
    }
    std::iter::repeat_with(move || {
        let here = at;
        for ((i, &size), &stride) in index.iter_mut().zip(shape).zip(strides).rev() {
            *i += 1;
            at += stride;
            if *i < size {
                break;
            }
            at -= *i * stride;
            *i = 0;
        }
        here
    })
}

#[cfg(test)]
mod tests;
