//! The solver on the host, in f64: downloads the Gram matrix and the weights, uploads the
//! dequantised result.

use burn::tensor::{DType, Tensor, TensorData};
use gptq_format::QuantizedLinear;
use gptq_solver::{
    Factor, Settings, SolverError, output_energy, round_to_nearest, solve as solve_linear,
};
use nalgebra::DMatrix;

use crate::Engine;

/// How the shared Hessian is prepared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hessian {
    /// Solve columns by descending diagonal.
    pub act_order: bool,
    /// Damping as a fraction of the mean diagonal.
    pub damping: f64,
}

/// One linear to quantise.
pub struct Request<B: Engine> {
    /// `[out, in]`, compute dtype.
    pub weight: Tensor<B, 2>,
    /// Its settings.
    pub settings: Settings,
}

/// One quantised linear.
pub struct Solved<B: Engine> {
    /// Codes, scales, zeros, group index.
    pub quantized: QuantizedLinear,
    /// The dequantised weights `[out, in]`, compute dtype.
    pub weight: Tensor<B, 2>,
    /// `‖(W - Q)X‖² / ‖WX‖²` on the calibration inputs, undamped.
    pub relative_error: f64,
    /// The same for round to nearest.
    pub rtn_error: f64,
}

/// What came of a set of linears with one input.
pub struct Subset<B: Engine> {
    /// In the order of the requests.
    pub solved: Vec<Solved<B>>,
    /// The damping that succeeded.
    pub damping: f64,
    /// Inputs that are always zero.
    pub dead_columns: usize,
}

pub(crate) fn solve<B: Engine>(
    gram: Tensor<B, 2>,
    hessian: Hessian,
    requests: Vec<Request<B>>,
) -> Result<Subset<B>, SolverError> {
    let mut gram = to_matrix(gram);
    gram.fill_lower_triangle_with_upper_triangle();
    let factor = Factor::new(&gram, hessian.act_order, hessian.damping)?;
    let solved = requests
        .into_iter()
        .map(|request| solve_one(request, &gram, &factor))
        .collect();
    Ok(Subset {
        solved,
        damping: factor.damping,
        dead_columns: factor.dead.len(),
    })
}

fn solve_one<B: Engine>(
    request: Request<B>,
    gram: &DMatrix<f64>,
    factor: &Factor<f64>,
) -> Solved<B> {
    let device = request.weight.device();
    let shape = request.weight.dims();
    let w = to_matrix(request.weight);
    let energy = output_energy(&w, gram);
    // A linear whose output is zero has nothing to lose.
    let relative = |q: DMatrix<f64>| match energy {
        0.0 => 0.0,
        energy => output_energy(&(&w - q), gram) / energy,
    };
    let solution = solve_linear(&w, factor, &request.settings);
    let relative_error = relative(solution.dequantise());
    let rtn_error = relative(round_to_nearest(&w, &request.settings).dequantise());
    let quantized = solution.into_quantized();
    let data = TensorData::new(quantized.dequantise(), shape);
    Solved {
        weight: Tensor::<B, 2>::from_data(data, (&device, DType::F32)).cast(B::COMPUTE),
        quantized,
        relative_error,
        rtn_error,
    }
}

/// A device matrix `[rows, cols]` in f64 on the host.
fn to_matrix<B: Engine>(tensor: Tensor<B, 2>) -> DMatrix<f64> {
    let [rows, cols] = tensor.dims();
    let values = tensor.cast(DType::F32).into_data();
    let values = values
        .as_slice::<f32>()
        .expect("the tensor was cast to f32");
    DMatrix::from_row_iterator(rows, cols, values.iter().map(|&v| f64::from(v)))
}

#[cfg(test)]
mod tests;
