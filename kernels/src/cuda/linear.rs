//! The linear layer `y = x·Wᵀ`, f16 or bf16 with f32 accumulation, through cuBLAS.

use burn::tensor::Tensor;

use super::{
    Cuda,
    blas::{Element, MatrixAt, product},
    buffer,
    error::Error,
    stream::on_stream,
};

/// Computes `x · wᵀ` for `x` `[tokens, in]` and `w` `[out, in]`, `[tokens, out]`, all f16 or all
/// bf16.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes, or a cuBLAS failure.
pub fn linear(x: Tensor<Cuda, 2>, w: Tensor<Cuda, 2>) -> Result<Tensor<Cuda, 2>, Error> {
    let [tokens, in_features] = x.dims();
    let [out_features, w_in] = w.dims();
    if in_features != w_in {
        return Err(Error::Shape {
            operation: "linear",
            reason: format!("x [{tokens}, {in_features}] and w [{out_features}, {w_in}]"),
        });
    }
    let x = buffer::half("linear", "x", x)?;
    let w = buffer::float("linear", "w", w, x.dtype)?;
    let y = buffer::empty(&x, [tokens, out_features], x.dtype);
    let element = Element::of(x.dtype);
    on_stream(&[&x, &w, &y], |libraries, pointers| {
        let x = MatrixAt::at(pointers[0], 0, in_features, element);
        let w = MatrixAt::at(pointers[1], 0, in_features, element);
        let y = MatrixAt::at(pointers[2], 0, out_features, element);
        let dimensions = [tokens, out_features, in_features];
        // SAFETY: the three are checked contiguous buffers of exactly these shapes, and y is
        // new.
        unsafe { product(libraries, dimensions, x, w.t(), 0.0, y) }
    })?;
    Ok(buffer::into_float(y))
}
