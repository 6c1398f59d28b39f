//! Scans a file for values that cannot be quantized, piece by piece while it is read for another
//! purpose.
//!
//! Floats without their sign compare like integers: all values from some threshold on are too large
//! or not finite. An integer maximum over a piece detects them, and only such a piece is examined
//! again.

use std::ops::Range;

use safetensors::Dtype;

use crate::place::Place;
use crate::{FormatError, Half};

/// Tensors of one file, and the progress of their scan.
#[derive(Clone, Debug, Default)]
pub struct FloatScan {
    /// Parts of the file, in the order of their bytes, without overlaps.
    parts: Vec<ScannedTensor>,
    /// Index of the current part.
    part: usize,
    /// Number of file bytes passed so far.
    at: u64,
    /// Beginning of an element that is split between two pieces.
    begun: Vec<u8>,
    /// Findings in the current tensor: index of the first value and number of values that are not finite,
    /// and the same for those that are too large.
    found: [Option<(usize, usize)>; 2],
}

#[derive(Clone, Debug)]
struct ScannedTensor {
    name: String,
    bytes: Range<u64>,
    limits: Limits,
}

/// Thresholds for an element type and its target type.
#[derive(Clone, Copy, Debug)]
struct Limits {
    half: Half,
    wide: bool,
    /// Smallest magnitude that is too large.
    large: u32,
    /// Smallest magnitude that is not finite.
    infinite: u32,
}

impl Limits {
    fn new(dtype: Dtype, half: Half) -> Option<Self> {
        let (wide, large, infinite) = match (dtype, half) {
            (Dtype::F16, _) => (false, 0x7c00, 0x7c00),
            (Dtype::BF16, Half::Bf16) => (false, 0x7f80, 0x7f80),
            // 65536, the first value beyond f16.
            (Dtype::BF16, Half::F16) => (false, 0x4780, 0x7f80),
            // Values that round to infinity: from halfway between the largest number and the next.
            (Dtype::F32, Half::F16) => (true, 0x477f_f000, 0x7f80_0000),
            (Dtype::F32, Half::Bf16) => (true, 0x7f7f_8000, 0x7f80_0000),
            _ => return None,
        };
        Some(Limits {
            half,
            wide,
            large,
            infinite,
        })
    }

    fn width(&self) -> usize {
        if self.wide { 4 } else { 2 }
    }

    /// Returns the elements without their signs.
    fn magnitudes(&self, bytes: &[u8]) -> Vec<u32> {
        match self.wide {
            true => (bytes.as_chunks::<4>().0.iter())
                .map(|b| u32::from_le_bytes(*b) & 0x7fff_ffff)
                .collect(),
            false => (bytes.as_chunks::<2>().0.iter())
                .map(|b| u32::from(u16::from_le_bytes(*b) & 0x7fff))
                .collect(),
        }
    }

    /// Returns true if any of the whole elements is too large. Branch-free, in signed integers, so
    /// that it vectorizes on every processor.
    fn exceeded(&self, bytes: &[u8]) -> bool {
        match self.wide {
            true => {
                let large = self.large as i32;
                let values = bytes.as_chunks::<4>().0.iter();
                let exceeds = |b: &[u8; 4]| (i32::from_le_bytes(*b) & 0x7fff_ffff) >= large;
                values.map(|b| u32::from(exceeds(b))).sum::<u32>() > 0
            }
            false => {
                let values = bytes.as_chunks::<2>().0.iter();
                let values = values.map(|b| i16::from_le_bytes(*b) & 0x7fff);
                values.fold(0, i16::max) as u32 >= self.large
            }
        }
    }
}

impl FloatScan {
    /// Prepares a scan of the file that holds `tensors` for values that `half` cannot hold. A view that skips
    /// elements of its storage is left out.
    pub(crate) fn new<'a>(tensors: impl Iterator<Item = (&'a str, &'a Place)>, half: Half) -> Self {
        let mut parts: Vec<ScannedTensor> = tensors
            .filter(|(_, place)| place.strides.is_none())
            .filter_map(|(name, place)| {
                Some(ScannedTensor {
                    name: name.to_owned(),
                    bytes: place.bytes.start as u64..place.bytes.end as u64,
                    limits: Limits::new(place.dtype, half)?,
                })
            })
            .collect();
        parts.sort_by_key(|part| part.bytes.start);
        // Tensors may share storage.
        let mut end = 0;
        parts.retain(|part| {
            let apart = part.bytes.start >= end;
            end = end.max(part.bytes.end);
            apart
        });
        FloatScan {
            parts,
            ..FloatScan::default()
        }
    }

    /// Scans the next bytes of the file.
    ///
    /// # Errors
    /// [`FormatError::NonFinite`] or [`FormatError::Overflow`], at the end of the first tensor that has
    /// such a value.
    pub(crate) fn feed(&mut self, piece: &[u8]) -> Result<(), FormatError> {
        let start = self.at;
        self.at += piece.len() as u64;
        while let Some(part) = self.parts.get(self.part) {
            let from = part.bytes.start.max(start);
            let to = part.bytes.end.min(self.at);
            if from >= self.at {
                break;
            }
            let bytes = piece.get((from - start) as usize..(to.max(from) - start) as usize);
            let mut bytes = bytes.unwrap_or_default();
            let limits = part.limits;
            let mut element = ((from - part.bytes.start) as usize) / limits.width();
            if !self.begun.is_empty() {
                let missing = limits.width() - self.begun.len();
                let (rest, others) = bytes.split_at(missing.min(bytes.len()));
                self.begun.extend_from_slice(rest);
                bytes = others;
                if self.begun.len() == limits.width() {
                    let begun = std::mem::take(&mut self.begun);
                    note(&mut self.found, limits, element, &begun);
                    element += 1;
                }
            }
            let whole = bytes.len() / limits.width() * limits.width();
            let (whole, begun) = bytes.split_at(whole);
            note(&mut self.found, limits, element, whole);
            self.begun.extend_from_slice(begun);
            if to < part.bytes.end {
                break;
            }
            match self.found {
                [Some((first, count)), _] => {
                    return Err(FormatError::NonFinite {
                        name: part.name.clone(),
                        first,
                        count,
                    });
                }
                [None, Some((first, count))] => {
                    return Err(FormatError::Overflow {
                        name: part.name.clone(),
                        half: limits.half,
                        first,
                        count,
                    });
                }
                [None, None] => self.part += 1,
            }
            self.begun.clear();
        }
        Ok(())
    }
}

/// Counts the whole elements that are too large; the first has index `element`.
fn note(found: &mut [Option<(usize, usize)>; 2], limits: Limits, element: usize, bytes: &[u8]) {
    if !limits.exceeded(bytes) {
        return;
    }
    let [infinite, large] = found;
    for (i, magnitude) in limits.magnitudes(bytes).into_iter().enumerate() {
        let kind = match magnitude {
            m if m >= limits.infinite => &mut *infinite,
            m if m >= limits.large => &mut *large,
            _ => continue,
        };
        let (first, count) = kind.unwrap_or((element + i, 0));
        *kind = Some((first, count + 1));
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use safetensors::tensor::TensorView as View;

    use super::*;
    use crate::Checkpoint;

    /// Scans a file with tensor `x` between two others, in pieces of `size` bytes.
    fn scan(dtype: Dtype, half: Half, x: &[u8], size: usize) -> [Result<(), String>; 2] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let width = dtype.bitsize() / 8;
        let other = vec![0u8; 12];
        let view = |bytes| View::new(dtype, vec![<[u8]>::len(bytes) / width], bytes).unwrap();
        let (ends, middle) = (view(&other), view(x));
        let tensors = [("a", &ends), ("x", &middle), ("z", &ends)];
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let mut found = checkpoint.float_scan("model.safetensors", half, |_| true);
        let bytes = std::fs::read(&path).unwrap();
        let scanned = bytes.chunks(size).try_for_each(|piece| found.feed(piece));
        let shape = [x.len() / width];
        let mut out = vec![0; shape[0]];
        let read = checkpoint.halves_into(half, "x", &shape, &mut out);
        [scanned, read].map(|result| result.map_err(|error| error.to_string()))
    }

    #[test]
    fn a_scan_finds_what_reading_a_tensor_finds_wherever_pieces_end() {
        let values = [
            1.0f32,
            -65504.0,
            65519.9,
            65520.0,
            -7e4,
            3.3961e38,
            3.397e38,
            f32::MAX,
        ];
        let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let bytes = |v: &f32| match dtype {
                Dtype::F32 => v.to_le_bytes().to_vec(),
                Dtype::BF16 => bf16::from_f32(*v).to_le_bytes().to_vec(),
                _ => f16::from_f32(*v).to_le_bytes().to_vec(),
            };
            for half in [Half::F16, Half::Bf16] {
                for value in values.iter().chain(&odd) {
                    let x = [&2.0, value, &1e-20, value, &0.5].map(bytes).concat();
                    for size in [1, 3, 7, 64, 1000] {
                        let [scanned, read] = scan(dtype, half, &x, size);
                        assert_eq!(
                            scanned, read,
                            "{dtype:?} {half:?} {value} in pieces of {size}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn only_the_tensors_asked_for_are_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let nan = f32::NAN.to_le_bytes();
        let view = View::new(Dtype::F32, vec![1], &nan).unwrap();
        std::fs::write(&path, safetensors::serialize([("x", view)], None).unwrap()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let feed = |needed: bool| {
            let mut scan = checkpoint.float_scan("model.safetensors", Half::F16, |_| needed);
            scan.feed(&std::fs::read(&path).unwrap())
        };
        assert!(feed(true).is_err() && feed(false).is_ok());
    }
}
