//! A linear's bits do not depend on which others are solved beside it, so that ranks can share linears.

use burn::tensor::Tensor;
use gptq_format::{Bits, GroupSize};
use gptq_solver::Settings;
use half::f16;

use super::solving::{request, settings};
use crate::cuda::{
    Cuda, Device, cross_add, gram_add, gram_zeros,
    testing::{Random, device, solve_one, tensor, tensor_f32},
};
use crate::{HessianOptions, Mismatch, Request, Solved};

/// Everything that a solve says of a linear, as bytes.
fn bytes(solved: &Solved<Cuda>) -> (Vec<Vec<u8>>, [u64; 3]) {
    let float = |it: &Tensor<Cuda, 2>| it.clone().into_data().as_bytes().to_vec();
    let codes = &solved.codes;
    let int = [&codes.codes, &codes.zeros].map(|it| it.clone().into_data().as_bytes().to_vec());
    let floats = [&solved.weight, &solved.nearest, &codes.scales].map(float);
    let unrounded = solved.unrounded.iter().map(float);
    let errors = [
        solved.relative_error,
        solved.rtn_error,
        solved.objective.unwrap_or_default(),
    ];
    let all = int.into_iter().chain(floats).chain(unrounded);
    (all.collect(), errors.map(f64::to_bits))
}

/// Solves linears with these rows together and each by itself.
fn same_alone(n: usize, rows: &[usize], settings: Settings, corrects: bool, device: &Device) {
    let mut random = Random(n as u64);
    let x = tensor(&random.halves::<f16>(2048 * n, 1.0), [2048, n], device);
    let dense = tensor(&random.halves::<f16>(2048 * n, 1.0), [2048, n], device);
    let zeros = || gram_zeros([n, n], device).unwrap();
    let gram = gram_add(zeros(), x.clone()).unwrap();
    let cross = cross_add(zeros(), [dense, x.clone()], x).unwrap();
    let mismatch = corrects.then(|| Mismatch {
        gram: gram.clone(),
        cross,
        strength: 1.0,
    });
    let hessian = HessianOptions {
        act_order: true,
        damping: 0.1,
    };
    let requests: Vec<Request<Cuda>> = rows
        .iter()
        .map(|&rows| {
            let weight = random.halves::<f16>(rows * n, 0.05);
            let mut request = request(&weight, n, settings, device);
            request.keep_unrounded = settings.refine > 0;
            if corrects {
                let residual: Vec<f32> = (0..rows * n).map(|_| random.uniform() as f32).collect();
                request.residual = Some(tensor_f32(&residual, [rows, n], device));
            }
            request
        })
        .collect();
    let solve = |requests: &[Request<Cuda>]| {
        let subset = solve_one(gram.clone(), mismatch.clone(), hessian, requests).unwrap();
        subset.solved.iter().map(bytes).collect::<Vec<_>>()
    };
    let together = solve(&requests);
    for (at, request) in requests.iter().enumerate() {
        let alone = solve(std::slice::from_ref(request));
        let label = format!("{n}, {rows:?}, linear {at}");
        assert!(alone[0].0 == together[at].0, "{label}: matrices");
        assert_eq!(alone[0].1, together[at].1, "{label}: errors");
    }
    // And some of them, as one of several ranks has them.
    let some = solve(&requests[1..]);
    assert!(some == together[1..], "{n}, {rows:?}: without the first");
}

#[test]
fn a_linear_has_the_same_bits_whatever_is_solved_beside_it() {
    let Some(device) = device() else { return };
    let plain = Settings {
        scale_search: true,
        ..settings(Bits::Four, GroupSize::Columns(128))
    };
    let refined = Settings { refine: 1, ..plain };
    let wide = Settings {
        group_size: GroupSize::Row,
        bits: Bits::Eight,
        ..plain
    };
    let still = Settings {
        static_groups: true,
        ..plain
    };
    same_alone(2048, &[2048, 512, 512], plain, false, &device);
    same_alone(2048, &[2048, 512, 2048], refined, true, &device);
    same_alone(576, &[576, 192, 192], refined, true, &device);
    same_alone(1024, &[1024, 2816, 2816], wide, false, &device);
    same_alone(1024, &[96, 1024], still, false, &device);
}
