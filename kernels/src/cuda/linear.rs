//! The linear layer `y = x·Wᵀ` and its gradients `dx = dy·W` and `dW = dyᵀ·x`, f16 or bf16 with f32
//! accumulation, through cuBLAS.

use std::ops::Range;

use burn::tensor::{DType, Tensor};

use super::{
    Cuda,
    blas::{Element, MatrixAt, product},
    buffer,
    error::Error,
    stream::on_stream_later,
};

/// Tokens per product of a weight's gradient, as for a Gram matrix: a tensor core's running sum stays short.
const CHUNK: usize = 16_384;

/// Computes `x · wᵀ` for `x` `[tokens, in]` and `w` `[out, in]`, `[tokens, out]`, all f16 or all
/// bf16.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes, or a cuBLAS failure.
pub fn linear(x: Tensor<Cuda, 2>, w: Tensor<Cuda, 2>) -> Result<Tensor<Cuda, 2>, Error> {
    let starts = [0, x.dims()[0]];
    linear_each(x, &starts, vec![w])
}

/// Computes the same for each run of rows of `x` with a weight of its own, `[out, in]`: run `i` is the rows
/// `starts[i]..starts[i + 1]`, and all of them are `x`.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes or starts, or a cuBLAS failure.
pub fn linear_each(
    x: Tensor<Cuda, 2>,
    starts: &[usize],
    weights: Vec<Tensor<Cuda, 2>>,
) -> Result<Tensor<Cuda, 2>, Error> {
    let [tokens, in_features] = x.dims();
    let out_features = weights.first().map_or(0, |w| w.dims()[0]);
    let shape = [out_features, in_features];
    if let Some(w) = weights.iter().find(|w| w.dims() != shape) {
        return Err(Error::Shape {
            operation: "linear",
            reason: format!("x [{tokens}, {in_features}] and w {:?}", w.dims()),
        });
    }
    let runs = runs("linear", starts, weights.len(), tokens)?;
    let x = buffer::half("linear", "x", x)?;
    let y = buffer::empty(&x, [tokens, out_features], x.dtype);
    let weights = weights.into_iter();
    let weights = weights.map(|w| buffer::float("linear", "w", w, x.dtype));
    let weights = weights.collect::<Result<Vec<_>, _>>()?;
    let buffers: Vec<_> = [&x, &y].into_iter().chain(&weights).collect();
    let element = Element::of(x.dtype);
    on_stream_later(&buffers, move |libraries, pointers| {
        for (run, &w) in runs.iter().zip(&pointers[2..]) {
            let x = MatrixAt::at(pointers[0], run.start * in_features, in_features, element);
            let w = MatrixAt::at(w, 0, in_features, element);
            let y = MatrixAt::at(pointers[1], run.start * out_features, out_features, element);
            let dimensions = [run.len(), out_features, in_features];
            // SAFETY: the rows of the run lie inside x and y, checked contiguous buffers as the weights are, of
            // exactly these shapes, and y is new.
            unsafe { product(libraries, dimensions, x, w.t(), 0.0, y)? };
        }
        Ok(())
    })?;
    Ok(buffer::into_float(y))
}

/// Returns the runs that begin and end at `starts`.
///
/// # Errors
///
/// Another number of runs than `count`, or runs that are not all of the `rows` rows in order.
pub(crate) fn runs(
    operation: &'static str,
    starts: &[usize],
    count: usize,
    rows: usize,
) -> Result<Vec<Range<usize>>, Error> {
    let whole = starts.first() == Some(&0) && starts.last() == Some(&rows);
    if starts.len() != count + 1 || !whole || !starts.is_sorted() {
        return Err(Error::Shape {
            operation,
            reason: format!("{count} runs of {rows} rows that start at {starts:?}"),
        });
    }
    Ok(starts.windows(2).map(|run| run[0]..run[1]).collect())
}

/// Computes `dy · w` for `dy` `[tokens, out]` and `w` `[out, in]`, `[tokens, in]`, all f16 or all bf16.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes, or a cuBLAS failure.
pub fn input_gradient(dy: Tensor<Cuda, 2>, w: Tensor<Cuda, 2>) -> Result<Tensor<Cuda, 2>, Error> {
    let [tokens, out_features] = dy.dims();
    let [w_out, in_features] = w.dims();
    if out_features != w_out {
        return Err(Error::Shape {
            operation: "input_gradient",
            reason: format!("dy [{tokens}, {out_features}] and w [{w_out}, {in_features}]"),
        });
    }
    let dy = buffer::half("input_gradient", "dy", dy)?;
    let w = buffer::float("input_gradient", "w", w, dy.dtype)?;
    let dx = buffer::empty(&dy, [tokens, in_features], dy.dtype);
    let element = Element::of(dy.dtype);
    on_stream_later(&[&dy, &w, &dx], move |libraries, pointers| {
        let dy = MatrixAt::at(pointers[0], 0, out_features, element);
        let w = MatrixAt::at(pointers[1], 0, in_features, element);
        let dx = MatrixAt::at(pointers[2], 0, in_features, element);
        let dimensions = [tokens, in_features, out_features];
        // SAFETY: the three are checked contiguous buffers of exactly these shapes, and dx is
        // new.
        unsafe { product(libraries, dimensions, dy, w, 0.0, dx) }
    })?;
    Ok(buffer::into_float(dx))
}

/// Computes `dyᵀ · x` for `dy` `[tokens, out]` and `x` `[tokens, in]`, both f16 or both bf16, f32
/// `[out, in]`. There is at least one token.
///
/// # Errors
///
/// Other dtypes, inconsistent shapes, or a cuBLAS failure.
pub fn weight_gradient(dy: Tensor<Cuda, 2>, x: Tensor<Cuda, 2>) -> Result<Tensor<Cuda, 2>, Error> {
    let [tokens, out_features] = dy.dims();
    let [x_tokens, in_features] = x.dims();
    if tokens != x_tokens || tokens == 0 {
        return Err(Error::Shape {
            operation: "weight_gradient",
            reason: format!("dy [{tokens}, {out_features}] and x [{x_tokens}, {in_features}]"),
        });
    }
    let dy = buffer::half("weight_gradient", "dy", dy)?;
    let x = buffer::float("weight_gradient", "x", x, dy.dtype)?;
    let dw = buffer::empty(&dy, [out_features, in_features], DType::F32);
    let element = Element::of(dy.dtype);
    on_stream_later(&[&dy, &x, &dw], move |libraries, pointers| {
        let dw = MatrixAt::at(pointers[2], 0, in_features, Element::F32);
        for first in (0..tokens).step_by(CHUNK) {
            let length = CHUNK.min(tokens - first);
            let dy = MatrixAt::at(pointers[0], first * out_features, out_features, element);
            let x = MatrixAt::at(pointers[1], first * in_features, in_features, element);
            let beta = if first == 0 { 0.0 } else { 1.0 };
            let dimensions = [out_features, in_features, length];
            // SAFETY: rows `first..first + length` of both inputs and all of dw lie inside their
            // checked contiguous buffers, and dw is new.
            unsafe { product(libraries, dimensions, dy.t(), x, beta, dw)? };
        }
        Ok(())
    })?;
    Ok(buffer::into_float(dw))
}
