//! Communication between the ranks of a run.

use crate::{Cause, RankError, RankShare, tree};

/// The ranks of a run, as one of them sees them. Every rank comes to the same calls in the same order.
///
/// # Errors
/// Every method fails if another rank has ended the run, or is no longer there.
pub trait Collective: Send + Sync {
    /// The rank's share.
    fn share(&self) -> RankShare;

    /// Sends `bytes` to rank `to`; one of the two is rank 0, unless the ranks are threads.
    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), RankError>;

    /// Waits for the next bytes from rank `from`; one of the two is rank 0, unless the ranks are threads.
    fn receive(&self, from: usize) -> Result<Vec<u8>, RankError>;

    /// Fails if the run has ended on another rank; asked now and then by a rank that computes.
    fn check(&self) -> Result<(), RankError>;

    /// Ends the run on every rank.
    fn end(&self, cause: Cause);

    /// Waits until every rank has done its part; the last call of a rank.
    fn leave(&self) -> Result<(), RankError>;

    /// True on rank 0, which has the output, the journal and the events.
    fn is_root(&self) -> bool {
        self.share().rank == 0
    }

    /// Brings every rank's bytes to rank 0, in order of ranks; there are none on the others.
    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, RankError> {
        let RankShare { rank, size } = self.share();
        if rank > 0 {
            self.send(0, bytes)?;
            return Ok(Vec::new());
        }
        let mut all = vec![bytes];
        for from in 1..size {
            all.push(self.receive(from)?);
        }
        Ok(all)
    }

    /// Brings rank 0's bytes to every rank; those that others give do not count.
    fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, RankError> {
        let RankShare { rank, size } = self.share();
        if rank > 0 {
            return self.receive(0);
        }
        for to in 1..size {
            self.send(to, bytes.clone())?;
        }
        Ok(bytes)
    }

    /// Brings every rank's bytes to every rank, in order of ranks.
    fn all_gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, RankError> {
        let size = self.share().size;
        let mut joined = Vec::new();
        for own in self.gather(bytes)? {
            joined.extend((own.len() as u64).to_le_bytes());
            joined.extend(own);
        }
        let joined = self.broadcast(joined)?;
        let mut rest = &joined[..];
        let mut next = |length: usize| {
            let (own, left) = rest.split_at_checked(length)?;
            rest = left;
            Some(own)
        };
        let ranks = (0..size).map(|_| {
            let length = next(8)?.try_into().ok().map(u64::from_le_bytes)?;
            Some(next(usize::try_from(length).ok()?)?.to_vec())
        });
        let ranks: Option<Vec<Vec<u8>>> = ranks.collect();
        ranks.ok_or(RankError::Length {
            from: 0,
            found: joined.len(),
            wanted: 8 * size,
        })
    }

    /// Adds up every rank's numbers in the tree of [`tree`], on every rank; a rank without any gives `None`.
    fn sum(&self, numbers: Option<Vec<f32>>) -> Result<Option<Vec<f32>>, RankError> {
        if self.share().size == 1 {
            return Ok(numbers);
        }
        let parts = self.gather(to_bytes(numbers))?;
        let parts: Vec<Option<Vec<f32>>> = parts.into_iter().map(of_bytes).collect();
        let lengths: Vec<usize> = parts.iter().flatten().map(Vec::len).collect();
        if let Some(at) = lengths.iter().position(|&it| it != lengths[0]) {
            return Err(RankError::Length {
                from: at,
                found: 4 * lengths[at],
                wanted: 4 * lengths[0],
            });
        }
        let sum = tree(parts, &mut |mut a: Vec<f32>, b| {
            a.iter_mut().zip(&b).for_each(|(a, b)| *a += b);
            a
        });
        Ok(of_bytes(self.broadcast(to_bytes(sum))?))
    }
}

/// The numbers in little-endian order after a byte that says whether there are any.
fn to_bytes(numbers: Option<Vec<f32>>) -> Vec<u8> {
    let Some(numbers) = numbers else {
        return Vec::new();
    };
    let mut bytes = Vec::with_capacity(1 + 4 * numbers.len());
    bytes.push(1);
    bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    bytes
}

fn of_bytes(bytes: Vec<u8>) -> Option<Vec<f32>> {
    let (_, numbers) = bytes.split_first()?;
    let numbers = numbers.chunks_exact(4);
    Some(
        numbers
            .map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]]))
            .collect(),
    )
}
#[cfg(test)]
mod tests;
