//! Hidden states of all ranks, brought to rank 0.

use gptq_format::le_bytes;
use gptq_kernels::Engine;
use gptq_ranks::Collective;

use crate::RunError;
use crate::stream::Stream;

/// Brings every rank's chunks of `stream` to rank 0, one at a time and in order: gives `each` the residual's bits and
/// the chunk's shape there.
pub(crate) fn gather<B: Engine>(
    stream: &Stream<B>,
    ranks: &dyn Collective,
    each: &mut dyn FnMut(Vec<u16>, [usize; 3]) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let size = ranks.share().size;
    if ranks.is_root() {
        for chunk in &stream.chunks {
            each(chunk.residual()?.into_owned(), chunk.shape())?;
        }
        for from in 1..size {
            let count = numbers(&ranks.receive(from)?)[0];
            for _ in 0..count {
                let shape = numbers(&ranks.receive(from)?);
                let bits = ranks.receive(from)?;
                let bits = bits.chunks_exact(2);
                let bits = bits.map(|it| u16::from_le_bytes([it[0], it[1]])).collect();
                each(bits, [shape[0], shape[1], shape[2]])?;
            }
        }
        return Ok(());
    }
    ranks.send(0, bytes(&[stream.chunks.len(), 0, 0]))?;
    for chunk in &stream.chunks {
        ranks.send(0, bytes(&chunk.shape()))?;
        ranks.send(0, le_bytes(&chunk.residual()?).to_vec())?;
    }
    Ok(())
}

fn bytes(numbers: &[usize; 3]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|&it| (it as u64).to_le_bytes())
        .collect()
}

/// The reverse of [`bytes`]; of other bytes, zeros.
fn numbers(bytes: &[u8]) -> [usize; 3] {
    let mut numbers = [0; 3];
    for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(8)) {
        *number = u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize;
    }
    numbers
}
