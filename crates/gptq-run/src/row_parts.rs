//! Linears whose rows several ranks have solved, put together by messages.
//!
//! A rank solves whole strips of every linear's rows ([`RankShare::rows`]). Rank 0 is brought what each rank has found, and
//! sends the codes of all rows back, from which the others make the weights that they go on with.

use burn::tensor::{DType, Tensor, TensorData};
use gptq_format::QuantizedLinear;
use gptq_kernels::{Codes, Engine, SolveErrors, Solved, StripSums};
use gptq_plan::PlannedLinear;
use gptq_ranks::{Collective, RankError, RankShare};
use half::f16;

use crate::solved_tap::SolvedTap;

/// Numbers of a [`StripSums`].
const SUMS: usize = 8;

/// Weights of linears by their index in the block.
pub(crate) type TapWeights<B> = Vec<(usize, Tensor<B, 2>)>;

/// A rank's rows of a linear.
struct RowPart {
    codes: QuantizedLinear,
    /// `[rows, in]`.
    nearest: Vec<f32>,
    unrounded: Option<Vec<f32>>,
    /// True if mismatch was corrected.
    corrects: bool,
    sums: Vec<StripSums>,
}

/// Puts `solved` together with what the other ranks have of the same linears: on rank 0, where `solved` then has all
/// rows. On the others, the weights that came of it.
pub(crate) fn join<B: Engine>(
    solved: &mut [SolvedTap<B>],
    strip: usize,
    (dtype, device): (DType, &B::Device),
    ranks: &dyn Collective,
) -> Result<Option<TapWeights<B>>, RankError> {
    let share = ranks.share();
    let mut own = Vec::new();
    for tap in &mut *solved {
        for solved in tap.subset.solved.drain(..) {
            RowPart::of(solved).write(&mut own);
        }
    }
    let parts = ranks.gather(own)?;
    if !ranks.is_root() {
        let linears = solved.iter().flat_map(|tap| &tap.linears);
        return receive(linears, (dtype, device), ranks).map(Some);
    }
    let mut readers: Vec<PartReader<'_>> = (0..)
        .zip(&parts)
        .map(|(from, it)| PartReader::new(from, it))
        .collect();
    let mut codes = Vec::new();
    for SolvedTap {
        linears, subset, ..
    } in solved
    {
        for linear in linears.iter() {
            let read = readers.iter_mut().enumerate().filter_map(|(rank, reader)| {
                let share = RankShare { rank, ..share };
                let rows = share.rows(linear.shape.1, strip).len();
                (rows > 0).then(|| RowPart::read(reader, linear, rows, rows.div_ceil(strip)))
            });
            let rows = read.collect::<Result<Vec<_>, RankError>>()?;
            subset
                .solved
                .push(put_together(linear, rows, (dtype, device), &mut codes));
        }
    }
    readers.into_iter().try_for_each(PartReader::end)?;
    ranks.broadcast(codes)?;
    Ok(None)
}

/// Sends the codes of a tap's linears, all of their rows, from rank 0. There is nothing to send if there is no other.
pub(crate) fn send(
    codes: impl Iterator<Item = QuantizedLinear>,
    ranks: &dyn Collective,
) -> Result<(), RankError> {
    if ranks.share().size > 1 {
        let mut bytes = Vec::new();
        codes.for_each(|codes| write_codes(&codes, &mut bytes));
        ranks.broadcast(bytes)?;
    }
    Ok(())
}

/// Receives what rank 0 sends of `linears`, and makes their weights.
pub(crate) fn receive<'a, B: Engine>(
    linears: impl Iterator<Item = &'a PlannedLinear>,
    (dtype, device): (DType, &B::Device),
    ranks: &dyn Collective,
) -> Result<TapWeights<B>, RankError> {
    let bytes = ranks.broadcast(Vec::new())?;
    let mut reader = PartReader::new(0, &bytes);
    let weights = linears.map(|linear| {
        let codes = reader.codes(linear, linear.shape.1)?;
        Ok((linear.linear, weight(&codes, dtype, device)))
    });
    let weights = weights.collect::<Result<_, RankError>>()?;
    reader.end()?;
    Ok(weights)
}

/// The weights of a linear, `[out, in]`, as an engine's own solve gives them.
fn weight<B: Engine>(codes: &QuantizedLinear, dtype: DType, device: &B::Device) -> Tensor<B, 2> {
    matrix(codes.dequantize(), codes, device).cast(dtype)
}

/// A matrix of the linear's shape, f32.
fn matrix<B: Engine>(values: Vec<f32>, of: &QuantizedLinear, device: &B::Device) -> Tensor<B, 2> {
    let data = TensorData::new(values, [of.out_features, of.in_features]);
    Tensor::from_data(data, (device, DType::F32))
}

/// Puts the ranks' rows of a linear together, in their order, and adds its codes to `bytes`.
fn put_together<B: Engine>(
    linear: &PlannedLinear,
    parts: Vec<RowPart>,
    (dtype, device): (DType, &B::Device),
    bytes: &mut Vec<u8>,
) -> Solved<B> {
    let (first, corrects) = (&parts[0].codes, parts[0].corrects);
    let columns = |of: &dyn Fn(&QuantizedLinear) -> Vec<u8>| {
        let parts = parts
            .iter()
            .map(|part| (of(&part.codes), part.codes.out_features));
        side_by_side(parts.collect())
    };
    let codes = QuantizedLinear {
        bits: first.bits,
        in_features: first.in_features,
        out_features: parts.iter().map(|part| part.codes.out_features).sum(),
        codes: columns(&|it| it.codes.clone()),
        scales: side_by_side(
            parts
                .iter()
                .map(|it| (it.codes.scales.clone(), it.codes.out_features))
                .collect(),
        ),
        zeros: columns(&|it| it.zeros.clone()),
        g_idx: first.g_idx.clone(),
    };
    write_codes(&codes, bytes);
    let sums: Vec<StripSums> = parts.iter().flat_map(|part| part.sums.clone()).collect();
    let unrounded = parts.iter().map(|part| part.unrounded.clone());
    let unrounded: Option<Vec<Vec<f32>>> = unrounded.collect();
    let nearest: Vec<f32> = parts.into_iter().flat_map(|part| part.nearest).collect();
    let SolveErrors {
        relative_error,
        rtn_error,
        objective,
        gains,
    } = SolveErrors::of(&sums, &linear.settings, corrects);
    Solved {
        weight: weight(&codes, dtype, device),
        nearest: matrix(nearest, &codes, device).cast(dtype),
        unrounded: unrounded.map(|parts| matrix(parts.concat(), &codes, device)),
        codes: Codes::upload(codes, device),
        relative_error,
        rtn_error,
        objective: Some(objective),
        gains,
        sums,
    }
}

/// Matrices of equally many rows side by side, each with its number of columns.
fn side_by_side<T: Copy>(parts: Vec<(Vec<T>, usize)>) -> Vec<T> {
    let rows = parts
        .iter()
        .map(|(values, columns)| values.len() / columns)
        .max();
    let row = |at: usize| {
        parts
            .iter()
            .flat_map(move |(values, columns)| &values[at * columns..(at + 1) * columns])
    };
    (0..rows.unwrap_or_default())
        .flat_map(row)
        .copied()
        .collect()
}

fn write_codes(codes: &QuantizedLinear, bytes: &mut Vec<u8>) {
    bytes.extend(&codes.codes);
    bytes.extend(&codes.zeros);
    bytes.extend(codes.scales.iter().flat_map(|it| it.to_le_bytes()));
    bytes.extend(codes.g_idx.iter().flat_map(|it| it.to_le_bytes()));
}

impl RowPart {
    fn of<B: Engine>(solved: Solved<B>) -> RowPart {
        let values = |of: Tensor<B, 2>| {
            let values = of.cast(DType::F32).into_data();
            values
                .into_vec::<f32>()
                .expect("the tensor was cast to f32")
        };
        RowPart {
            codes: solved.codes.download(),
            nearest: values(solved.nearest),
            unrounded: solved.unrounded.map(values),
            corrects: solved.gains.mismatch_correction.is_some(),
            sums: solved.sums,
        }
    }

    fn write(self, bytes: &mut Vec<u8>) {
        write_codes(&self.codes, bytes);
        bytes.extend(self.nearest.iter().flat_map(|it| it.to_le_bytes()));
        bytes.extend([self.corrects, self.unrounded.is_some()].map(u8::from));
        bytes.extend(
            self.unrounded
                .iter()
                .flatten()
                .flat_map(|it| it.to_le_bytes()),
        );
        for it in self.sums {
            let [gained, of] = it.corrected;
            let sums: [f64; SUMS] = [
                it.energy,
                it.lost,
                it.nearest,
                it.objective,
                it.searched,
                gained,
                of,
                it.refined,
            ];
            bytes.extend(sums.iter().flat_map(|it| it.to_le_bytes()));
        }
    }

    fn read(
        reader: &mut PartReader<'_>,
        linear: &PlannedLinear,
        rows: usize,
        strips: usize,
    ) -> Result<RowPart, RankError> {
        let codes = reader.codes(linear, rows)?;
        let weights = rows * linear.shape.0;
        let nearest = reader.f32s(weights)?;
        let flags = reader.take(2)?;
        let unrounded = match flags[1] {
            0 => None,
            _ => Some(reader.f32s(weights)?),
        };
        let sums = (0..strips).map(|_| {
            let sums = reader.take(8 * SUMS)?.chunks_exact(8);
            let sums: Vec<f64> = sums
                .map(|it| f64::from_le_bytes(it.try_into().expect("eight bytes")))
                .collect();
            Ok(StripSums {
                energy: sums[0],
                lost: sums[1],
                nearest: sums[2],
                objective: sums[3],
                searched: sums[4],
                corrected: [sums[5], sums[6]],
                refined: sums[7],
            })
        });
        let sums = sums.collect::<Result<_, RankError>>()?;
        Ok(RowPart {
            codes,
            nearest,
            unrounded,
            corrects: flags[0] == 1,
            sums,
        })
    }
}

/// Reads what a rank has sent.
struct PartReader<'a> {
    from: usize,
    rest: &'a [u8],
    length: usize,
}

impl<'a> PartReader<'a> {
    fn new(from: usize, bytes: &'a [u8]) -> Self {
        PartReader {
            from,
            rest: bytes,
            length: bytes.len(),
        }
    }

    fn wrong(&self, wanted: usize) -> RankError {
        RankError::Length {
            from: self.from,
            found: self.length,
            wanted: self.length - self.rest.len() + wanted,
        }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], RankError> {
        let (own, rest) = self.rest.split_at_checked(n).ok_or_else(|| self.wrong(n))?;
        self.rest = rest;
        Ok(own)
    }

    fn f32s(&mut self, n: usize) -> Result<Vec<f32>, RankError> {
        let values = self.take(4 * n)?.chunks_exact(4);
        Ok(values
            .map(|it| f32::from_le_bytes(it.try_into().expect("four bytes")))
            .collect())
    }

    /// Some rows of a linear.
    fn codes(&mut self, linear: &PlannedLinear, rows: usize) -> Result<QuantizedLinear, RankError> {
        let in_features = linear.shape.0;
        let grids = linear.settings.group_size.groups(in_features) * rows;
        let codes = self.take(in_features * rows)?.to_vec();
        let zeros = self.take(grids)?.to_vec();
        let scales = self.take(2 * grids)?.chunks_exact(2);
        let scales = scales
            .map(|it| f16::from_le_bytes([it[0], it[1]]))
            .collect();
        let g_idx = self.take(4 * in_features)?.chunks_exact(4);
        let g_idx = g_idx
            .map(|it| i32::from_le_bytes(it.try_into().expect("four bytes")))
            .collect();
        Ok(QuantizedLinear {
            bits: linear.settings.bits,
            in_features,
            out_features: rows,
            codes,
            scales,
            zeros,
            g_idx,
        })
    }

    /// Fails if anything is left.
    fn end(self) -> Result<(), RankError> {
        match self.rest.is_empty() {
            true => Ok(()),
            false => Err(self.wrong(0)),
        }
    }
}
