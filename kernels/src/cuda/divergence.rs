//! Losses and divergence of predictions from a reference's, and the gradient of the latter: the kernels of
//! `divergence.cu`, one block of threads per row of logits.

use std::{cell::RefCell, collections::HashMap, ffi::c_void};

use burn::tensor::{DType, Int, Tensor};
use cudarc::driver::sys::CUmodule;

use super::{
    Cuda,
    buffer::{self, Buffer},
    error::Error,
    nvrtc::{CudaSource, Launch, function, launch},
    stream::on_stream_later,
};

const SOURCE: CudaSource = CudaSource {
    name: "divergence",
    text: include_str!("divergence.cu"),
};
const THREADS: u32 = 512;

thread_local! {
    /// Lives on the device thread, to its end. By device.
    static MODULES: RefCell<HashMap<usize, CUmodule>> = RefCell::default();
}

/// Launches a kernel, compiled at first use, with a block for each row.
///
/// # Safety
///
/// Buffers and further parameters must be those of the kernel's signature.
unsafe fn rows(
    name: &'static str,
    buffers: [&Buffer; 4],
    [rows, columns]: [usize; 2],
    scale: Option<f32>,
) -> Result<(), Error> {
    if rows == 0 {
        return Ok(());
    }
    let shape = |_| Error::Shape {
        operation: name,
        reason: format!("{rows} rows of {columns} do not fit 32 bits"),
    };
    let blocks = u32::try_from(rows).map_err(shape)?;
    let count = i32::try_from(columns).map_err(shape)?;
    on_stream_later(&buffers, move |libraries, pointers| {
        let found = MODULES.with_borrow(|all| all.get(&libraries.device).copied());
        let module = match found {
            Some(module) => module,
            None => {
                let module = SOURCE.load(libraries.device, "divergence.ptx", &[])?;
                MODULES.with_borrow_mut(|all| all.insert(libraries.device, module));
                module
            }
        };
        let kernel = function(module, name)?;
        let mut pointers = pointers.to_vec();
        let (mut count, mut scale) = (count, scale);
        let mut parameters: Vec<*mut c_void> = Vec::with_capacity(6);
        parameters.extend(pointers.iter_mut().map(|it| (&raw mut *it).cast()));
        parameters.push((&raw mut count).cast());
        if let Some(scale) = &mut scale {
            parameters.push((&raw mut *scale).cast());
        }
        let size = Launch {
            blocks: (blocks, 1, 1),
            threads: THREADS,
            shared: 0,
        };
        // SAFETY: the caller guarantees the parameters, which outlive the call.
        unsafe { launch(libraries, kernel, size, &mut parameters) }
    })
}

/// See [`Engine::compare_logits`](crate::Engine::compare_logits). The targets are within the vocabulary.
///
/// # Errors
///
/// Other dtypes, shapes that differ, or a kernel that does not compile or launch.
pub fn compare_logits(
    logits: Tensor<Cuda, 2>,
    reference: Tensor<Cuda, 2>,
    targets: Tensor<Cuda, 1, Int>,
) -> Result<Tensor<Cuda, 2>, Error> {
    const NAME: &str = "compare_logits";
    let shape = logits.dims();
    if reference.dims() != shape || targets.dims() != [shape[0]] {
        return Err(Error::Shape {
            operation: NAME,
            reason: format!(
                "logits {shape:?}, reference {:?}, targets {:?}",
                reference.dims(),
                targets.dims()
            ),
        });
    }
    let logits = buffer::float(NAME, "logits", logits, DType::F32)?;
    let reference = buffer::float(NAME, "reference", reference, DType::F32)?;
    let targets = buffer::int(NAME, "targets", targets, DType::I32)?;
    let out = buffer::empty(&logits, [shape[0], 4], DType::F32);
    // SAFETY: two matrices of this shape, a target and four results for each row.
    unsafe {
        rows(NAME, [&logits, &reference, &targets, &out], shape, None)?;
    }
    Ok(buffer::into_float(out))
}

/// See [`Engine::divergence_gradient`](crate::Engine::divergence_gradient).
///
/// # Errors
///
/// Those of [`compare_logits`].
pub fn divergence_gradient(
    logits: Tensor<Cuda, 2>,
    reference: Tensor<Cuda, 2>,
    scale: f32,
    dtype: DType,
) -> Result<[Tensor<Cuda, 2>; 2], Error> {
    let name = match dtype {
        DType::F16 => "divergence_gradient_f16",
        DType::BF16 => "divergence_gradient_bf16",
        _ => "divergence_gradient_f32",
    };
    let shape = logits.dims();
    if reference.dims() != shape {
        return Err(Error::Shape {
            operation: name,
            reason: format!("logits {shape:?} and reference {:?}", reference.dims()),
        });
    }
    let logits = buffer::float(name, "logits", logits, DType::F32)?;
    let reference = buffer::float(name, "reference", reference, DType::F32)?;
    let divergence = buffer::empty(&logits, [shape[0], 1], DType::F32);
    let dtype = match dtype {
        DType::F16 | DType::BF16 => dtype,
        _ => DType::F32,
    };
    let gradient = buffer::empty(&logits, shape, dtype);
    let buffers = [&logits, &reference, &divergence, &gradient];
    // SAFETY: three matrices of this shape, and a result for each row.
    unsafe {
        rows(name, buffers, shape, Some(scale))?;
    }
    Ok([divergence, gradient].map(buffer::into_float))
}
