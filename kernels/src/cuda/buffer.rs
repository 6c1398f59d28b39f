//! Converts Burn tensors to checked, contiguous device buffers, and back.
//!
//! Burn's CUDA runtime may pad the rows of a matrix, and its default dtype belongs to the device,
//! not to the backend's type parameter. A raw pointer is passed to a library only after dtype,
//! layout and byte length have been checked here.

use burn::tensor::{DType, Int, Shape, Tensor, TensorPrimitive};
use burn_cubecl::{kernel::into_contiguous, tensor::CubeTensor};
use cubecl::{
    client::ComputeClient,
    cuda::{CudaDevice, CudaRuntime},
    prelude::*,
};

use super::{Cuda, error::Error, failures};
use crate::{dtype, half_of};

/// A tensor on the device, as stored by Burn.
pub(crate) type Buffer = CubeTensor<CudaRuntime>;

/// Maximum number of elements of a buffer: indices in kernels are 32 bits wide.
const MAX_ELEMENTS: usize = u32::MAX as usize;

/// Returns a float tensor as a contiguous buffer of the given dtype.
///
/// # Errors
///
/// Another dtype, more than 2^32 - 1 elements, or a buffer shorter than its shape.
pub(crate) fn float<const D: usize>(
    operation: &'static str,
    name: &'static str,
    tensor: Tensor<Cuda, D>,
    dtype: DType,
) -> Result<Buffer, Error> {
    checked(operation, name, tensor.into_primitive().tensor(), dtype)
}

/// Returns an f16 or bf16 tensor as a contiguous buffer. Errors as [`float`].
pub(crate) fn half<const D: usize>(
    operation: &'static str,
    name: &'static str,
    tensor: Tensor<Cuda, D>,
) -> Result<Buffer, Error> {
    let dtype = dtype(half_of(tensor.dtype()));
    float(operation, name, tensor, dtype)
}

/// Returns an integer tensor as a contiguous buffer of the given dtype. Errors as [`float`].
pub(crate) fn int<const D: usize>(
    operation: &'static str,
    name: &'static str,
    tensor: Tensor<Cuda, D, Int>,
    dtype: DType,
) -> Result<Buffer, Error> {
    checked(operation, name, tensor.into_primitive(), dtype)
}

fn checked(
    operation: &'static str,
    name: &'static str,
    buffer: Buffer,
    dtype: DType,
) -> Result<Buffer, Error> {
    if buffer.dtype != dtype {
        return Err(Error::Dtype {
            operation,
            tensor: name,
            expected: dtype,
            found: buffer.dtype,
        });
    }
    let buffer = into_contiguous(buffer);
    let elements = buffer.meta.shape().num_elements();
    let bytes = elements * dtype.size();
    if elements > MAX_ELEMENTS || (buffer.handle.size_in_used() as usize) < bytes {
        return Err(Error::Shape {
            operation,
            reason: format!(
                "{name} has {elements} elements in {} bytes: too many, or fewer bytes than its \
                 shape needs",
                buffer.handle.size_in_used()
            ),
        });
    }
    Ok(buffer)
}

/// Makes a contiguous buffer with undefined contents.
pub(crate) fn empty<const D: usize>(like: &Buffer, shape: [usize; D], dtype: DType) -> Buffer {
    empty_on(&like.client, &like.device, shape, dtype)
}

/// Makes a contiguous buffer with undefined contents, on a device.
pub(crate) fn empty_on<const D: usize>(
    client: &ComputeClient<CudaRuntime>,
    device: &CudaDevice,
    shape: [usize; D],
    dtype: DType,
) -> Buffer {
    let bytes = shape.iter().product::<usize>() * dtype.size();
    let buffer = CubeTensor::new_contiguous(
        client.clone(),
        device.clone(),
        Shape::from(shape),
        client.empty(bytes.max(16)),
        dtype,
    );
    #[cfg(test)]
    super::testing::poison(&buffer);
    buffer
}

/// Returns the elements from `start` on, of a contiguous buffer, as one of this shape that shares its memory.
pub(crate) fn part<const D: usize>(of: &Buffer, start: usize, shape: [usize; D]) -> Buffer {
    let (elements, all) = (
        shape.iter().product::<usize>(),
        of.meta.shape().num_elements(),
    );
    debug_assert!(start + elements <= all);
    let bytes = |elements: usize| (elements * of.dtype.size()) as u64;
    let after = of.handle.size_in_used() - bytes(start + elements);
    let handle = of.handle.clone().offset_start(bytes(start));
    CubeTensor::new_contiguous(
        of.client.clone(),
        of.device.clone(),
        Shape::from(shape),
        handle.offset_end(after),
        of.dtype,
    )
}

/// Returns one of some square matrices `[.., n, n]`.
pub(crate) fn matrix(all: &Buffer, at: usize) -> Buffer {
    let n = all.meta.shape()[1];
    part(all, at * n * n, [n, n])
}

/// Makes a contiguous buffer with these values.
pub(crate) fn upload<T: CubeElement>(like: &Buffer, values: &[T], dtype: DType) -> Buffer {
    debug_assert_eq!(size_of::<T>(), dtype.size());
    CubeTensor::new_contiguous(
        like.client.clone(),
        like.device.clone(),
        Shape::from([values.len()]),
        like.client.create_from_slice(T::as_bytes(values)),
        dtype,
    )
}

/// Reads the buffer's values back; waits for the device.
///
/// # Errors
///
/// The error of the read, or of a call that nobody waited for.
pub(crate) fn download<T: CubeElement>(buffer: &Buffer) -> Result<Vec<T>, Error> {
    let elements = buffer.meta.shape().num_elements();
    let bytes = buffer
        .client
        .read_one(buffer.handle.clone())
        .map_err(|error| Error::runtime(&error.to_string()))?;
    failures::check(buffer.device.index)?;
    Ok(T::from_bytes(&bytes[..elements * size_of::<T>()]).to_vec())
}

/// Returns the buffer as a Burn float tensor.
pub(crate) fn into_float<const D: usize>(buffer: Buffer) -> Tensor<Cuda, D> {
    Tensor::from_primitive(TensorPrimitive::Float(buffer))
}

/// Returns the buffer as a kernel's array argument.
pub(crate) fn array(buffer: &Buffer) -> ArrayArg<CudaRuntime> {
    buffer.clone().into_array_arg()
}

/// Returns one cube of `units` for every `units` columns of each row, along the x dimension of the
/// grid, the only one that may exceed 65 535: there may be more rows than that.
pub(crate) fn rows_by(rows: usize, columns: usize, units: usize) -> CubeCount {
    CubeCount::new_1d((rows * columns.div_ceil(units)) as u32)
}

/// Returns the widest vector, in elements, that divides `length` and takes at most 16 bytes.
pub(crate) fn vector_size(length: usize, dtype: DType) -> usize {
    let widest = 16 / dtype.size();
    (0..)
        .map(|shift| widest >> shift)
        .find(|&size| length.is_multiple_of(size))
        .unwrap_or(1)
}
