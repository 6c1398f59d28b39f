//! The interpreter on blocks of a few numbers.

use burn::tensor::{DType, Tensor, TensorData};
use gptq_kernels::Cpu;
use gptq_spec::{BlockBuilder, Norm, NormKind, Register};

use super::*;

#[test]
fn a_norm_shorter_than_the_states_takes_them_run_by_run() {
    let mut builder = BlockBuilder::new(4);
    let norm = Norm {
        kind: NormKind::Rms,
        eps: 0.0,
    };
    let x = builder.norm("heads", 2, norm, Register::RESIDUAL);
    builder.add(x, 1.0);
    let spec = builder.build();
    let device = Default::default();
    let tensor = |values: Vec<f32>, shape: [usize; 2]| {
        Tensor::<Cpu, 2>::from_data(TensorData::new(values, shape), (&device, DType::F32))
    };
    let block = Block::<Cpu> {
        spec: spec.into(),
        linears: Vec::new(),
        matrices: Vec::new(),
        vectors: vec![tensor(vec![1.0, 2.0], [1, 2]).reshape([2])],
        rope: Default::default(),
    };
    let states = tensor(vec![3.0, 4.0, 0.0, 5.0], [1, 4]);
    let end = block.forward(Flow::new(1, states));
    let found: Vec<f32> = end.residual.into_data().to_vec().unwrap();
    // Means of squares are 12.5 in either run: (3, 4) and (0, 5) become (3, 4) / √12.5 and (0, 5) / √12.5.
    let root = 12.5_f32.sqrt();
    let expected = [3.0 + 3.0 / root, 4.0 + 8.0 / root, 0.0, 5.0 + 10.0 / root];
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
    assert!(end.activations.is_empty());
}
