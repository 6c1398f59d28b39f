//! Shares of a tap's linears.

use gptq_format::{Bits, GroupSize};
use gptq_kernels::{Cpu, Cuda};
use gptq_solver::Settings;

use super::*;

fn linear(n_in: usize, n_out: usize) -> PlannedLinear {
    PlannedLinear {
        layer: 0,
        linear: 0,
        module: String::new(),
        shape: (n_in, n_out),
        settings: Settings {
            bits: Bits::Four,
            group_size: GroupSize::Columns(32),
            sym: true,
            static_groups: false,
            scale_search: false,
            f16_scales: true,
            refine: 0,
        },
    }
}

#[test]
fn linears_of_one_input_go_to_the_rank_that_has_least_to_do() {
    let qkv = vec![linear(64, 64), linear(64, 32), linear(64, 32)];
    let owners = |ranks| {
        batches::<Cuda>(std::slice::from_ref(&qkv), ranks)[0]
            .owners
            .clone()
    };
    assert_eq!(owners(1), [[0, 0, 0]]);
    assert_eq!(owners(2), [[0, 1, 1]]);
    assert_eq!(owners(4), [[0, 1, 2]]);
}

#[test]
fn inputs_that_are_alike_are_solved_together_whoever_solves_them() {
    let expert = vec![linear(64, 8192), linear(64, 8192)];
    let experts: Vec<_> = (0..5).map(|_| expert.clone()).collect();
    let inputs = |of: &[InputBatch]| -> Vec<_> { of.iter().map(|it| it.inputs.clone()).collect() };
    for ranks in [1, 2, 4] {
        let found = batches::<Cuda>(&experts, ranks);
        assert_eq!(inputs(&found), [0..2, 2..4, 4..5]);
    }
    let found = batches::<Cuda>(&experts, 2);
    assert_eq!(found[0].owners, [[0, 0], [0, 0]]);
    assert_eq!(found[1].owners, [[1, 1], [1, 1]]);
    // A batch of one input is shared out linear by linear.
    assert_eq!(found[2].owners, [[0, 1]]);
    let mixed = [
        vec![linear(64, 64)],
        vec![linear(32, 64)],
        vec![linear(32, 64)],
    ];
    assert_eq!(inputs(&batches::<Cuda>(&mixed, 2)), [0..1, 1..3]);
    assert_eq!(inputs(&batches::<Cpu>(&mixed, 2)), [0..1, 1..2, 2..3]);
}
