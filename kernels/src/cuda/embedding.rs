//! Looks up rows of the embedding table for a list of token ids.

use burn::tensor::{DType, Int, Tensor};
use cubecl::prelude::*;

use super::{
    Cuda,
    buffer::{self, array},
    error::Error,
};

const UNITS: u32 = 128;

/// One cube per token.
#[cube(launch_unchecked)]
fn embedding_kernel<F: Float, N: Size>(
    ids: &Array<u32>,
    table: &Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    vectors: u32,
    #[define(F)] _dtype: StorageType,
) {
    let vectors = vectors as usize;
    let token = CUBE_POS_X as usize;
    let from = ids[token] as usize * vectors;
    let mut at = UNIT_POS as usize;
    while at < vectors {
        out[token * vectors + at] = table[from + at];
        at += UNITS as usize;
    }
}

/// Returns row `ids[t]` of `table` `[vocabulary, hidden]`, f16 or bf16, for each `t` of `ids` i32
/// `[tokens]`: `[tokens, hidden]`. The caller must have checked that every id is in the vocabulary.
///
/// # Errors
///
/// Other dtypes.
pub fn embedding(
    ids: Tensor<Cuda, 1, Int>,
    table: Tensor<Cuda, 2>,
) -> Result<Tensor<Cuda, 2>, Error> {
    let [tokens] = ids.dims();
    let [_, hidden] = table.dims();
    let ids = buffer::int("embedding", "ids", ids, DType::I32)?;
    let table = buffer::half("embedding", "table", table)?;
    let out = buffer::empty(&table, [tokens, hidden], table.dtype);
    let lanes = buffer::vector_size(hidden, table.dtype);
    if tokens > 0 {
        // SAFETY: one cube per token; the ids are rows of the table.
        unsafe {
            embedding_kernel::launch_unchecked::<cubecl::cuda::CudaRuntime>(
                &out.client,
                CubeCount::new_1d(tokens as u32),
                CubeDim::new_1d(UNITS),
                lanes,
                array(&ids),
                array(&table),
                array(&out),
                (hidden / lanes) as u32,
                table.dtype.into(),
            );
        }
    }
    Ok(buffer::into_float(out))
}
