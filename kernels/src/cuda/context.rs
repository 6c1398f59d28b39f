//! The CUDA context of a device, and errors of the driver.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::{CudaContext, DriverError};

use super::error::Error;

/// Makes the device's own context current on the calling thread.
pub(crate) fn bind(device: usize) -> Result<Arc<CudaContext>, Error> {
    // Never dropped: dropping the last owner would destroy the context that Burn uses.
    static CONTEXTS: Mutex<Option<HashMap<usize, Arc<CudaContext>>>> = Mutex::new(None);
    let mut contexts = CONTEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    let contexts = contexts.get_or_insert_default();
    if let Some(context) = contexts.get(&device) {
        context
            .bind_to_thread()
            .map_err(refused("cuCtxSetCurrent"))?;
        return Ok(context.clone());
    }
    let context = CudaContext::new(device).map_err(refused("cuDevicePrimaryCtxRetain"))?;
    contexts.insert(device, context.clone());
    Ok(context)
}

/// Converts an error of a call of the driver.
pub(crate) fn refused(operation: &'static str) -> impl Fn(DriverError) -> Error {
    move |source| Error::Driver { operation, source }
}
