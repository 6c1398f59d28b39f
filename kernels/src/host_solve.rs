//! The solver on the host, in f64: downloads the Gram matrix and the weights, uploads the
//! dequantized result.

use std::time::Instant;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use gptq_solver::{
    Factor, Gains, SolverError, Target, output_energy, refine, round_to_nearest,
    solve as solve_linear,
};
use nalgebra::DMatrix;

use crate::{Codes, HessianOptions, Problem, Request, SolveTimes, Solved, Subset};

pub(crate) fn solve<B: Backend>(
    problem: Problem<B>,
    hessian: HessianOptions,
) -> Result<Subset<B>, SolverError> {
    let started = Instant::now();
    let Problem {
        gram,
        mismatch,
        requests,
    } = problem;
    let gram = symmetric(gram);
    let factor = Factor::new(&gram, hessian.act_order, hessian.damping)?;
    let mismatch = match mismatch {
        Some(mismatch) => {
            let (gram, cross) = (symmetric(mismatch.gram), to_matrix(mismatch.cross));
            let target = Target::new(&gram, cross, hessian.damping, mismatch.strength)?;
            Some((target, gram))
        }
        None => None,
    };
    let factored = Instant::now();
    let solved = requests
        .into_iter()
        .map(|request| solve_one(request, &gram, &factor, mismatch.as_ref()))
        .collect();
    Ok(Subset {
        solved,
        damping: factor.damping,
        dead_columns: factor.dead.len(),
        times: SolveTimes {
            factor: (factored - started).as_secs_f64(),
            sweep: factored.elapsed().as_secs_f64(),
        },
    })
}

/// See [`Engine::relative_error`](crate::Engine::relative_error).
pub(crate) fn relative_error<B: Backend>(
    gram: Tensor<B, 2>,
    w: Tensor<B, 2>,
    q: Tensor<B, 2>,
) -> f64 {
    let (gram, w, q) = (symmetric(gram), to_matrix(w), to_matrix(q));
    match output_energy(&w, &gram) {
        // A linear whose output is zero has nothing to lose.
        0.0 => 0.0,
        energy => output_energy(&(w - q), &gram) / energy,
    }
}

fn solve_one<B: Backend>(
    request: Request<B>,
    gram: &DMatrix<f64>,
    factor: &Factor<f64>,
    mismatch: Option<&(Target<f64>, DMatrix<f64>)>,
) -> Solved<B> {
    let device = request.weight.device();
    let (shape, dtype) = (request.weight.dims(), request.weight.dtype());
    let w = to_matrix(request.weight);
    let energy = output_energy(&w, gram);
    // A linear whose output is zero has nothing to lose.
    let part = |of: f64, energy: f64| match energy {
        0.0 => 0.0,
        energy => of / energy,
    };
    let relative =
        |of: &DMatrix<f64>, q: &DMatrix<f64>| part(output_energy(&(of - q), gram), energy);
    let settings = request.settings;
    let residual = request.residual.map(to_matrix);
    let shifted = mismatch.map(|(target, gram)| {
        let (target, gain) = target.of(&w, residual.as_ref());
        (target, part(gain, output_energy(&w, gram)))
    });
    let target = shifted.as_ref().map_or(&w, |(target, _)| target);
    let mut solution = solve_linear(target, factor, &settings);
    let refined = refine(target, gram, factor, &mut solution, settings.refine);
    let gains = Gains {
        scale_search: (settings.scale_search).then(|| part(solution.search_gain, energy)),
        mismatch_correction: shifted.as_ref().map(|&(_, gain)| gain),
        refine: (settings.refine > 0).then(|| part(refined.gained, energy)),
    };
    let nearest = round_to_nearest(&w, &settings);
    let found = solution.dequantize();
    let relative_error = relative(&w, &found);
    let rtn_error = relative(&w, &nearest.dequantize());
    let objective = match &shifted {
        Some((target, _)) => relative(target, &found),
        None => relative_error,
    };
    let quantized = solution.into_quantized();
    let upload = |values: Vec<f32>| {
        let data = TensorData::new(values, shape);
        Tensor::<B, 2>::from_data(data, (&device, DType::F32))
    };
    let weight = upload(quantized.dequantize()).cast(dtype);
    let nearest = upload(nearest.into_quantized().dequantize()).cast(dtype);
    let unrounded = request.keep_unrounded.then(|| {
        // Column-major to row-major.
        let values = refined.unrounded.transpose();
        upload(values.iter().map(|&v| v as f32).collect())
    });
    Solved {
        codes: Codes::upload(quantized, &device),
        weight,
        nearest,
        unrounded,
        relative_error,
        rtn_error,
        objective: Some(objective),
        gains,
    }
}

/// A Gram matrix in f64 on the host, both triangles.
fn symmetric<B: Backend>(gram: Tensor<B, 2>) -> DMatrix<f64> {
    let mut gram = to_matrix(gram);
    gram.fill_lower_triangle_with_upper_triangle();
    gram
}

/// A device matrix `[rows, cols]` in f64 on the host.
fn to_matrix<B: Backend>(tensor: Tensor<B, 2>) -> DMatrix<f64> {
    let [rows, cols] = tensor.dims();
    let values = tensor.cast(DType::F32).into_data();
    let values = values
        .as_slice::<f32>()
        .expect("the tensor was cast to f32");
    DMatrix::from_row_iterator(rows, cols, values.iter().map(|&v| f64::from(v)))
}

#[cfg(test)]
mod tests;
