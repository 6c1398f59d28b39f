//! The linear layer `y = x·Wᵀ`, f16 with f32 accumulation, through cuBLAS.

use burn::tensor::{DType, Tensor};

use super::{
    Cuda,
    blas::{Element, Matrix, product},
    buffer,
    error::Error,
    stream::on_stream,
};

/// `x · wᵀ` for `x` f16 `[tokens, in]` and `w` f16 `[out, in]`: f16 `[tokens, out]`.
///
/// # Errors
///
/// Other dtypes, shapes that do not fit, or a cuBLAS failure.
pub fn linear(x: Tensor<Cuda, 2>, w: Tensor<Cuda, 2>) -> Result<Tensor<Cuda, 2>, Error> {
    let [tokens, in_features] = x.dims();
    let [out_features, w_in] = w.dims();
    if in_features != w_in {
        return Err(Error::Shape {
            operation: "linear",
            reason: format!("x [{tokens}, {in_features}] and w [{out_features}, {w_in}]"),
        });
    }
    let x = buffer::float("linear", "x", x, DType::F16)?;
    let w = buffer::float("linear", "w", w, DType::F16)?;
    let y = buffer::empty(&x, [tokens, out_features], DType::F16);
    on_stream(&[&x, &w, &y], |libraries, pointers| {
        let x = Matrix::at(pointers[0], 0, in_features, Element::F16);
        let w = Matrix::at(pointers[1], 0, in_features, Element::F16);
        let y = Matrix::at(pointers[2], 0, out_features, Element::F16);
        let dimensions = [tokens, out_features, in_features];
        // SAFETY: the three are checked contiguous buffers of exactly these shapes, and y is
        // new.
        unsafe { product(libraries, dimensions, x, w.t(), 0.0, y) }
    })?;
    Ok(buffer::into_float(y))
}
