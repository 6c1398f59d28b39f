//! Device operations for the model's forward pass and the solver, on a Burn backend.
//!
//! [`Engine`] is the extension trait. Its default methods run on any backend, using Burn's own
//! operations and the f64 solver on the host: slow on a GPU, but correct everywhere, and used for
//! the CPU. Backends override single operations with faster ones.

mod attention;
mod backends;
mod backward;
mod codes;
pub mod cuda;
mod device;
mod divergence;
mod engine;
mod experts;
mod finite;
mod half_dtype;
#[cfg(test)]
mod hard_inputs;
mod host_attention;
mod host_buffer;
mod host_floats;
mod host_solve;
mod link;
mod packed_weight;
mod scores;
mod solve_types;
mod step;
mod tunable;

pub use attention::append;
pub use backends::{Cpu, Cuda};
pub use backward::NormOptions;
pub use codes::Codes;
pub use cuda::{install_panic_hook, keep_kernels};
pub use device::{Device, DeviceError, Devices, Work};
pub use engine::{Engine, map_lanes};
pub use experts::{Routed, RoutingOptions, Slots};
pub use finite::NotFinite;
pub use half_dtype::{dtype, half_of};
pub use host_buffer::HostBuffer;
pub use link::{DeviceLink, LinkError, Parcel, ParcelKind, Shipment};
pub use packed_weight::{PackedLayout, PackedWeight};
pub use scores::Scores;
pub use solve_types::{
    HessianOptions, Incoming, Mismatch, Problem, Request, SolveErrors, SolveTimes, Solved,
    StripSums, Subset,
};
pub use step::{
    StepLinear, StepNorm, StepOp, StepProgram, StepRegister, StepToken, StepWeight, TokenStep,
};
pub use tunable::{Tunable, TuningStep};
