//! A step of one token as a CUDA graph: recorded once, launched again for each token.
//!
//! The graph has the addresses of everything it touches. Weights and registers stay where they are; caches may be made
//! anew as they grow, so it is recorded again when one has moved.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;
use cudarc::driver::{
    result as driver,
    sys::{self, CUgraphExec, CUstreamCaptureMode},
};

use super::{
    Cuda,
    buffer::{self, Buffer},
    context::refused,
    error::{Error, fail},
    step_launch::{CacheAt, INPUTS, StepLauncher},
    step_plan::{StepPlan, plan},
    stream::{Libraries, on_stream, on_stream_later},
    transfer,
};
use crate::{StepProgram, StepToken, TokenStep};

/// A program's graph, if one is recorded. It is used on the device thread alone.
struct Recording {
    graph: Graph,
    caches: Vec<CacheAt>,
}

struct Graph(CUgraphExec);

// SAFETY: a graph may be used from any thread, by one at a time; a lock sees to that.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it is destroyed once; one that is running ends first.
        let _ = unsafe { driver::graph::exec_destroy(self.0) };
    }
}

struct CudaStep {
    plan: Arc<StepPlan>,
    /// Addresses of the plan's buffers, which stay as long as these.
    pointers: Arc<Vec<u64>>,
    recording: Arc<Mutex<Option<Recording>>>,
}

/// Makes a step of a program; `None` if there are no kernels for some of it.
///
/// # Errors
/// A failure of the device.
pub(super) fn step(program: StepProgram<Cuda>) -> Result<Option<Box<dyn TokenStep<Cuda>>>, Error> {
    let Some(plan) = plan(program)? else {
        return Ok(None);
    };
    let buffers: Vec<&Buffer> = plan.buffers.iter().collect();
    let pointers = on_stream(&buffers, |_, pointers| Ok(pointers.to_vec()))?;
    Ok(Some(Box::new(CudaStep {
        plan: Arc::new(plan),
        pointers: Arc::new(pointers),
        recording: Arc::default(),
    })))
}

impl TokenStep<Cuda> for CudaStep {
    fn run(&mut self, token: &StepToken, caches: Vec<[Tensor<Cuda, 3>; 2]>) -> Vec<f32> {
        self.try_run(token, caches)
            .unwrap_or_else(|error| fail(error))
    }
}

impl CudaStep {
    fn try_run(
        &self,
        token: &StepToken,
        caches: Vec<[Tensor<Cuda, 3>; 2]>,
    ) -> Result<Vec<f32>, Error> {
        let mut words = vec![token.id as i32, token.position as i32, 0, 0];
        for table in &token.tables {
            words.extend(table.iter().map(|value| value.to_bits() as i32));
            words.resize(words.len().next_multiple_of(4), 0);
        }
        let mut capacities = Vec::new();
        let mut held: Vec<Buffer> = Vec::new();
        for [keys, values] in caches {
            capacities.push(keys.dims()[1]);
            for (name, cache) in [("keys", keys), ("values", values)] {
                held.push(buffer::float("step", name, cache, self.plan.dtype)?);
            }
        }
        let inputs = &self.plan.buffers[INPUTS];
        let given: Vec<&Buffer> = [inputs].into_iter().chain(&held).collect();
        let (plan, pointers) = (self.plan.clone(), self.pointers.clone());
        let recording = self.recording.clone();
        on_stream_later(&given, move |libraries, given| {
            let caches = given[1..].chunks_exact(2).zip(capacities);
            let caches = caches.map(|(pair, capacity)| CacheAt {
                keys: pair[0],
                values: pair[1],
                capacity,
            });
            let caches: Vec<_> = caches.collect();
            let mut recording = recording.lock().unwrap_or_else(PoisonError::into_inner);
            let recorded = match recording.take().filter(|it| it.caches == caches) {
                Some(recorded) => recorded,
                None => Recording {
                    graph: record(&plan, libraries, &pointers, &caches)?,
                    caches,
                },
            };
            let graph = recording.insert(recorded).graph.0;
            // SAFETY: the inputs' buffer has as many words, and what the graph touches is alive: the plan's buffers, and
            // the caches given now.
            unsafe {
                driver::memcpy_htod_async(given[0], &words, libraries.stream)
                    .map_err(refused("cuMemcpyHtoDAsync"))?;
                driver::graph::launch(graph, libraries.stream).map_err(refused("cuGraphLaunch"))
            }
        })?;
        let logits = transfer::fetch(&self.plan.buffers[self.plan.logits])?;
        Ok(logits.values::<f32>().to_vec())
    }
}

/// Records the launches. Runs on the device thread.
fn record(
    plan: &StepPlan,
    libraries: &Libraries,
    pointers: &[u64],
    caches: &[CacheAt],
) -> Result<Graph, Error> {
    let stream = driver::stream::create(driver::stream::StreamKind::NonBlocking)
        .map_err(refused("cuStreamCreate"))?;
    let launcher = StepLauncher {
        device: libraries.device,
        dtype: plan.dtype,
        stream,
        pointers,
        caches,
    };
    let launches = || {
        for launch in &plan.launches {
            launcher.prepare(launch)?;
        }
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream was just made, and nothing else uses it.
        unsafe { driver::stream::begin_capture(stream, mode) }
            .map_err(refused("cuStreamBeginCapture"))?;
        let launched = plan
            .launches
            .iter()
            .try_for_each(|launch| launcher.launch(launch));
        // SAFETY: the capture that was just begun.
        let graph = unsafe { driver::stream::end_capture(stream) };
        launched?;
        graph.map_err(refused("cuStreamEndCapture"))
    };
    let graph = launches();
    // SAFETY: no work was given to the stream; a graph does not need it.
    unsafe { driver::stream::destroy(stream) }.map_err(refused("cuStreamDestroy"))?;
    let graph = graph?;
    let mut made = std::ptr::null_mut();
    // SAFETY: the graph is valid, and destroyed once.
    unsafe {
        let done = sys::cuGraphInstantiateWithFlags(&raw mut made, graph, 0).result();
        driver::graph::destroy(graph).map_err(refused("cuGraphDestroy"))?;
        done.map_err(refused("cuGraphInstantiate"))?;
    }
    Ok(Graph(made))
}
