//! The solver on the host, in f64: downloads the Gram matrix and the weights, uploads the
//! dequantized result.

use std::time::Instant;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use gptq_solver::{
    Factor, SolverError, Target, output_energies, output_energy, refine, round_to_nearest,
    solve as solve_linear,
};
use nalgebra::DMatrix;

use crate::{
    Codes, HessianOptions, Problem, Request, SolveErrors, SolveTimes, Solved, StripSums, Subset,
};

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
    let lost = |of: &DMatrix<f64>, q: &DMatrix<f64>| output_energies(&(of - q), gram);
    let settings = request.settings;
    let residual = request.residual.map(to_matrix);
    let shifted = mismatch.map(|(target, gram)| {
        let (target, gains) = target.of(&w, residual.as_ref());
        (target, gains, output_energies(&w, gram))
    });
    let target = shifted.as_ref().map_or(&w, |(target, ..)| target);
    let mut solution = solve_linear(target, factor, &settings);
    let refined = refine(target, gram, factor, &mut solution, settings.refine);
    let nearest = round_to_nearest(&w, &settings);
    let found = solution.dequantize();
    let energies = output_energies(&w, gram);
    let [own, nearest_own] = [&found, &nearest.dequantize()].map(|q| lost(&w, q));
    let toward = shifted.as_ref().map(|(target, ..)| lost(target, &found));
    let strip = |at: usize| StripSums {
        energy: energies[at],
        lost: own[at],
        nearest: nearest_own[at],
        objective: toward.as_ref().map_or(own[at], |toward| toward[at]),
        searched: solution.search_gains[at],
        corrected: (shifted.as_ref()).map_or([0.0; 2], |(_, gains, of)| [gains[at], of[at]]),
        refined: refined.gains[at],
    };
    let sums: Vec<StripSums> = (0..energies.len()).map(strip).collect();
    let SolveErrors {
        relative_error,
        rtn_error,
        objective,
        gains,
    } = SolveErrors::of(&sums, &settings, shifted.is_some());
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
        sums,
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
