//! Hidden states on their way through a block.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, Routed};
use gptq_spec::Register;

/// Hidden states of some windows before a tap. Cloning shares the tensors.
#[derive(Clone, Debug)]
pub struct Flow<B: Engine> {
    /// Number of windows; the tokens of a window are consecutive rows.
    pub windows: usize,
    /// `[windows * seq, hidden]`.
    pub residual: Tensor<B, 2>,
    /// The other registers that are still to be read, `[windows * seq, features]`; none between blocks.
    pub activations: BTreeMap<Register, Tensor<B, 2>>,
    /// Choices of experts that are still to be read.
    pub routed: BTreeMap<Register, Arc<Routed>>,
}

impl<B: Engine> Flow<B> {
    /// States between two blocks.
    pub fn new(windows: usize, residual: Tensor<B, 2>) -> Self {
        Flow {
            windows,
            residual,
            activations: BTreeMap::new(),
            routed: BTreeMap::new(),
        }
    }

    /// Returns the content of a register; `None` if it is not read any more.
    pub fn register(&self, register: Register) -> Option<Tensor<B, 2>> {
        match register {
            Register::RESIDUAL => Some(self.residual.clone()),
            _ => self.activations.get(&register).cloned(),
        }
    }

    /// The same states in another dtype: a 16-bit one to keep them, the compute dtype to run on.
    pub fn cast(self, dtype: DType) -> Self {
        let activations = self.activations.into_iter();
        Flow {
            windows: self.windows,
            residual: B::cast(self.residual, dtype),
            activations: activations
                .map(|(r, states)| (r, B::cast(states, dtype)))
                .collect(),
            routed: self.routed,
        }
    }
}
