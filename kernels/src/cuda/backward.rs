//! Reverse passes of norms and gates, and the kernels of `backward.cu`, compiled together for each type.
//!
//! A norm, one block of threads per row: with `c = x - mean(x)` or `c = x`, `n = c / sqrt(mean(c²) + eps)` and
//! `g = (w + offset) dy`, `dx = (g - n mean(g n)) / sqrt(mean(c²) + eps)`, less its mean where x is centred. A
//! gate: `d_gate = dy up act'(gate)`, `d_up = dy act(gate)`. All in f32, rounded to f16 or bf16 once.

use std::{cell::RefCell, collections::HashMap};

use burn::tensor::{DType, Tensor};
use cudarc::driver::sys::{CUfunction, CUmodule};

use super::{
    Cuda,
    buffer::{self, Buffer},
    error::Error,
    nvrtc::{CudaSource, Launch, function, launch},
    stream::on_stream_later,
};
use crate::NormOptions;

const SOURCE: CudaSource = CudaSource {
    name: "backward",
    text: include_str!("backward.cu"),
};
/// Threads of a block of a gate, and the elements that each takes.
const THREADS: u32 = 256;
const LANES: usize = 8;

thread_local! {
    /// Lives on the device thread, to its end. By device and type.
    static MODULES: RefCell<HashMap<(usize, DType), CUmodule>> = RefCell::default();
}

/// Returns a kernel of `backward.cu` for a type, compiled at first use. Runs on the device thread.
pub(crate) fn kernel(device: usize, dtype: DType, name: &'static str) -> Result<CUfunction, Error> {
    let found = MODULES.with_borrow(|all| all.get(&(device, dtype)).copied());
    let module = match found {
        Some(module) => module,
        None => {
            let file = format!("backward-{}.ptx", dtype.name());
            let bf16 = usize::from(dtype == DType::BF16);
            let module = SOURCE.load(device, &file, &[("BF16", bf16)])?;
            MODULES.with_borrow_mut(|all| all.insert((device, dtype), module));
            module
        }
    };
    function(module, name)
}

/// Threads for a row of this length: 1 to 8 warps, about 8 elements for each thread.
pub(crate) fn threads(len: usize) -> u32 {
    32 * len.div_ceil(256).clamp(1, 8) as u32
}

/// The gradient of a norm with respect to its input: of each row of `x` `[rows, len]` with `weight` `[len]`, for `dy`
/// like `x`, all f16 or all bf16.
///
/// # Errors
///
/// Other dtypes, shapes that do not fit, or a kernel that does not compile or launch.
pub fn norm_backward(
    x: Tensor<Cuda, 2>,
    weight: Tensor<Cuda, 1>,
    dy: Tensor<Cuda, 2>,
    norm: NormOptions,
) -> Result<Tensor<Cuda, 2>, Error> {
    const NAME: &str = "norm_backward";
    let [rows, len] = x.dims();
    if weight.dims() != [len] || dy.dims() != [rows, len] {
        return Err(Error::Shape {
            operation: NAME,
            reason: format!(
                "x [{rows}, {len}], weight {:?}, dy {:?}",
                weight.dims(),
                dy.dims()
            ),
        });
    }
    let x = buffer::half(NAME, "x", x)?;
    let weight = buffer::float(NAME, "weight", weight, x.dtype)?;
    let dy = buffer::float(NAME, "dy", dy, x.dtype)?;
    let dx = buffer::empty(&x, [rows, len], x.dtype);
    if rows == 0 || len == 0 {
        return Ok(buffer::into_float(dx));
    }
    let dtype = x.dtype;
    on_stream_later(&[&x, &weight, &dy, &dx], move |libraries, pointers| {
        let kernel = kernel(libraries.device, dtype, NAME)?;
        let mut pointers = [pointers[0], pointers[1], pointers[2], pointers[3]];
        let (mut len, threads) = (len as i32, threads(len));
        let (mut eps, mut offset) = (norm.eps as f32, norm.offset as f32);
        let mut centred = i32::from(norm.centred);
        let mut parameters = Vec::with_capacity(8);
        parameters.extend(pointers.iter_mut().map(|it| (&raw mut *it).cast()));
        parameters.push((&raw mut len).cast());
        parameters.push((&raw mut eps).cast());
        parameters.push((&raw mut offset).cast());
        parameters.push((&raw mut centred).cast());
        let size = Launch {
            blocks: (rows as u32, 1, 1),
            threads,
            shared: 0,
        };
        // SAFETY: the parameters are those of the kernel's signature and outlive the call; each
        // block has its own row of x, dy and dx, and `len` elements of weight.
        unsafe { launch(libraries, kernel, size, &mut parameters) }
    })?;
    Ok(buffer::into_float(dx))
}

/// The gradients of `silu(gate) * up` with respect to `gate` and `up`, for `dy` like them: `[tokens,
/// intermediate]`, all f16 or all bf16.
///
/// # Errors
///
/// Other dtypes, shapes that differ, or a kernel that does not compile or launch.
pub fn swiglu_backward(
    gate: Tensor<Cuda, 2>,
    up: Tensor<Cuda, 2>,
    dy: Tensor<Cuda, 2>,
) -> Result<[Tensor<Cuda, 2>; 2], Error> {
    gate_backward("swiglu_backward", gate, up, dy)
}

/// The same of `gelu(gate) * up`, in the approximation by a hyperbolic tangent.
///
/// # Errors
///
/// Those of [`swiglu_backward`].
pub fn geglu_backward(
    gate: Tensor<Cuda, 2>,
    up: Tensor<Cuda, 2>,
    dy: Tensor<Cuda, 2>,
) -> Result<[Tensor<Cuda, 2>; 2], Error> {
    gate_backward("geglu_backward", gate, up, dy)
}

fn gate_backward(
    name: &'static str,
    gate: Tensor<Cuda, 2>,
    up: Tensor<Cuda, 2>,
    dy: Tensor<Cuda, 2>,
) -> Result<[Tensor<Cuda, 2>; 2], Error> {
    let shape = gate.dims();
    if up.dims() != shape || dy.dims() != shape {
        return Err(Error::Shape {
            operation: name,
            reason: format!("gate {shape:?}, up {:?}, dy {:?}", up.dims(), dy.dims()),
        });
    }
    let gate = buffer::half(name, "gate", gate)?;
    let dtype = gate.dtype;
    let up = buffer::float(name, "up", up, dtype)?;
    let dy = buffer::float(name, "dy", dy, dtype)?;
    let gradients = [(); 2].map(|()| buffer::empty(&gate, shape, dtype));
    let elements = shape[0] * shape[1];
    if elements > 0 {
        let buffers: [&Buffer; 5] = [&gate, &up, &dy, &gradients[0], &gradients[1]];
        on_stream_later(&buffers, move |libraries, pointers| {
            let kernel = kernel(libraries.device, dtype, name)?;
            let mut aligned = i32::from(pointers.iter().all(|at| at.is_multiple_of(16)));
            let mut pointers = pointers.to_vec();
            let mut count = elements as u32;
            let mut parameters = Vec::with_capacity(7);
            parameters.extend(pointers.iter_mut().map(|it| (&raw mut *it).cast()));
            parameters.push((&raw mut count).cast());
            parameters.push((&raw mut aligned).cast());
            let blocks = elements.div_ceil(LANES).div_ceil(THREADS as usize);
            let size = Launch {
                blocks: (blocks as u32, 1, 1),
                threads: THREADS,
                shared: 0,
            };
            // SAFETY: the parameters are those of the kernel's signature and outlive the call; each
            // thread has its own elements of all five buffers, below `count`.
            unsafe { launch(libraries, kernel, size, &mut parameters) }
        })?;
    }
    Ok(gradients.map(buffer::into_float))
}
