//! Row-major matrix products through `cublasGemmEx` and `cublasGemmStridedBatchedEx`.
//!
//! cuBLAS is column-major: a row-major `C = A·B` is its `Cᵀ = Bᵀ·Aᵀ`, so the operands are exchanged
//! and keep their transposition. f16 and bf16 products accumulate in f32; f32 products are true f32
//! (`CUBLAS_COMPUTE_32F` in the default math mode uses no TF32), except for [`Element::Tf32`].

use std::ffi::{c_int, c_longlong, c_void};

use burn::tensor::DType;
use cudarc::cublas::{
    result::{gemm_ex, gemm_strided_batched_ex},
    sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType},
};

use super::{error::Error, stream::Libraries};

/// Element type of a matrix product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Element {
    F16,
    Bf16,
    F32,
    /// f32 in memory, rounded to 11 significant bits in a product.
    Tf32,
}

impl Element {
    /// Returns the type for a buffer of floats.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::Bf16,
            _ => Self::F32,
        }
    }

    fn cuda(self) -> cudaDataType {
        match self {
            Self::F16 => cudaDataType::CUDA_R_16F,
            Self::Bf16 => cudaDataType::CUDA_R_16BF,
            Self::F32 | Self::Tf32 => cudaDataType::CUDA_R_32F,
        }
    }

    pub(crate) fn size(self) -> u64 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::Tf32 => 4,
        }
    }
}

/// A row-major matrix in device memory.
#[derive(Clone, Copy)]
pub(crate) struct MatrixAt {
    /// Address of the first element.
    pub(crate) pointer: u64,
    /// Row stride in elements.
    pub(crate) stride: usize,
    /// True to use the transpose of what is stored.
    pub(crate) transposed: bool,
    /// Element type.
    pub(crate) element: Element,
}

impl MatrixAt {
    /// Makes a matrix whose first element is number `offset` from `pointer`.
    pub(crate) fn at(pointer: u64, offset: usize, stride: usize, element: Element) -> Self {
        Self {
            pointer: pointer + offset as u64 * element.size(),
            stride,
            transposed: false,
            element,
        }
    }

    /// Returns the transpose of the same memory.
    pub(crate) fn t(self) -> Self {
        Self {
            transposed: !self.transposed,
            ..self
        }
    }

    fn operation(self) -> cublasOperation_t {
        if self.transposed {
            cublasOperation_t::CUBLAS_OP_T
        } else {
            cublasOperation_t::CUBLAS_OP_N
        }
    }
}

/// Computes `C[m, n] = A[m, k] · B[k, n] + beta · C`, all row-major.
///
/// # Safety
///
/// The pointers must be device memory that holds the matrices given by their strides and `[m, n,
/// k]`, and `c` must not overlap an input.
pub(crate) unsafe fn product(
    libraries: &Libraries,
    [m, n, k]: [usize; 3],
    a: MatrixAt,
    b: MatrixAt,
    beta: f32,
    c: MatrixAt,
) -> Result<(), Error> {
    if m == 0 || n == 0 {
        return Ok(());
    }
    let alpha = 1.0_f32;
    let compute = match a.element {
        Element::Tf32 => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    // SAFETY: the caller guarantees the matrices; alpha and beta are host memory, which cuBLAS
    // reads before it returns.
    unsafe {
        gemm_ex(
            libraries.cublas,
            b.operation(),
            a.operation(),
            dimension(n)?,
            dimension(m)?,
            dimension(k)?,
            (&raw const alpha).cast(),
            b.pointer as *const c_void,
            b.element.cuda(),
            dimension(b.stride)?,
            a.pointer as *const c_void,
            a.element.cuda(),
            dimension(a.stride)?,
            (&raw const beta).cast(),
            c.pointer as *mut c_void,
            c.element.cuda(),
            dimension(c.stride)?,
            compute,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(|source| Error::Cublas {
        operation: "cublasGemmEx",
        source,
    })
}

/// Row-major matrices of one shape: the first, and how many elements lie from one's first to the next one's.
#[derive(Clone, Copy)]
pub(crate) struct Matrices {
    pub(crate) first: MatrixAt,
    pub(crate) step: usize,
}

impl Matrices {
    /// Returns the transposes of the same memory.
    pub(crate) fn t(self) -> Self {
        Self {
            first: self.first.t(),
            ..self
        }
    }
}

/// Computes `C[m, n] = alpha · A[m, k] · B[k, n] + beta · C` for each of `count` of a batch, all
/// row-major.
///
/// # Safety
///
/// Those of [`product`], for each of them; no two of `c` may have an element in common.
pub(crate) unsafe fn products(
    libraries: &Libraries,
    count: usize,
    [m, n, k]: [usize; 3],
    alpha: f32,
    [a, b]: [Matrices; 2],
    beta: f32,
    c: Matrices,
) -> Result<(), Error> {
    // SAFETY: the caller guarantees the matrices; alpha and beta are host memory, which cuBLAS
    // reads before it returns.
    unsafe {
        gemm_strided_batched_ex(
            libraries.cublas,
            b.first.operation(),
            a.first.operation(),
            dimension(n)?,
            dimension(m)?,
            dimension(k)?,
            (&raw const alpha).cast(),
            b.first.pointer as *const c_void,
            b.first.element.cuda(),
            dimension(b.first.stride)?,
            b.step as c_longlong,
            a.first.pointer as *const c_void,
            a.first.element.cuda(),
            dimension(a.first.stride)?,
            a.step as c_longlong,
            (&raw const beta).cast(),
            c.first.pointer as *mut c_void,
            c.first.element.cuda(),
            dimension(c.first.stride)?,
            c.step as c_longlong,
            dimension(count)?,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(|source| Error::Cublas {
        operation: "cublasGemmStridedBatchedEx",
        source,
    })
}

/// Computes `C[m, n] = A[m, k] · B[k, n] + beta · C` for each of `count`, all row-major: one by itself as [`product`]
/// does, so that its bits do not depend on there being a batch.
///
/// # Safety
///
/// Those of [`products`].
pub(crate) unsafe fn product_of_each(
    libraries: &Libraries,
    count: usize,
    dimensions: [usize; 3],
    [a, b]: [Matrices; 2],
    beta: f32,
    c: Matrices,
) -> Result<(), Error> {
    // SAFETY: the caller guarantees the matrices.
    unsafe {
        match count {
            1 => product(libraries, dimensions, a.first, b.first, beta, c.first),
            _ => products(libraries, count, dimensions, 1.0, [a, b], beta, c),
        }
    }
}

fn dimension(value: usize) -> Result<c_int, Error> {
    c_int::try_from(value).map_err(|_| Error::Shape {
        operation: "cublasGemmEx",
        reason: format!("a dimension of {value} does not fit cuBLAS's 32 bits"),
    })
}
