//! Locations of tensors in a PyTorch file: `torch.save`'s zip format, since PyTorch 1.6.
//!
//! ```text
//! NAME/data.pkl     tensors as views of storages (`pickle.rs`)
//! NAME/byteorder    "little" (absent before PyTorch 2.1, which wrote little-endian everywhere)
//! NAME/data/KEY     a storage: only its elements
//! ```
//!
//! Entries are stored without compression, so a tensor is a view of the mapped file. Entries that
//! are compressed or encrypted, or that share bytes with another, are refused: nothing is ever
//! inflated. Over [`MAX_ENTRIES`] entries, a name over [`MAX_NAME`] bytes, or views that repeat
//! more than [`MAX_REPEATED`] elements are refused as well.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use rawzip::{CompressionMethod, ZipArchive};

use crate::FormatError;
use crate::pickle::{self, TorchTensor};
use crate::place::Place;

const MAX_ENTRIES: usize = 1 << 17;
/// Maximum length of an entry's name in bytes.
const MAX_NAME: usize = 512;

/// Maximum number of elements that all tensors together have beyond those of their storages. A view
/// with a stride of 0 repeats elements without bound.
const MAX_REPEATED: usize = 1 << 24;

/// Start of files from before `torch.save` wrote zip archives: the pickle of a magic number.
const LEGACY: [u8; 6] = [0x80, 0x02, 0x8a, 0x0a, 0x6c, 0xfc];

/// Returns every tensor of the mapped file `bytes`.
///
/// Errors if it is not such a file, or if anything in it is out of range.
pub(crate) fn places(path: &Path, bytes: &[u8]) -> Result<Vec<(String, Place)>, FormatError> {
    read(bytes).map_err(|reason| FormatError::Torch {
        path: path.into(),
        reason,
    })
}

/// Reads the same; the error is a sentence.
fn read(bytes: &[u8]) -> Result<Vec<(String, Place)>, String> {
    if bytes.starts_with(&LEGACY) {
        return Err(
            "it is in the format from before PyTorch 1.6; load it once with PyTorch and \
                    save it again: torch.save(torch.load(FILE, weights_only=True), FILE)"
                .into(),
        );
    }
    let entries = entries(bytes)?;
    let mut pickles = entries
        .keys()
        .filter_map(|name| name.strip_suffix("data.pkl"))
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('/'));
    let (Some(prefix), None) = (pickles.next(), pickles.next()) else {
        return Err("it is a zip file without exactly one data.pkl".into());
    };
    let entry = |name: &str| entries.get(format!("{prefix}{name}").as_str());
    let content = |name: &str| bytes.get(entry(name)?.clone());
    if content("byteorder").is_some_and(|order| order != b"little") {
        return Err("its elements are big-endian".into());
    }
    let pickle = content("data.pkl").ok_or("its data.pkl is outside the file")?;
    let mut repeated = 0;
    pickle::read(pickle)?
        .into_iter()
        .map(|(name, tensor)| {
            let key = tensor.storage.key;
            let storage = entry(&format!("data/{key}"))
                .ok_or_else(|| format!("storage {key:?} of tensor {name} is missing"))?;
            let place = place(&tensor, storage).map_err(|why| format!("tensor {name} {why}"))?;
            let elements: usize = place.shape.iter().product();
            repeated += elements.saturating_sub(tensor.storage.elements);
            if repeated > MAX_REPEATED {
                return Err(format!(
                    "tensor {name} repeats the elements of its storage; save a copy of it"
                ));
            }
            Ok((name.to_owned(), place))
        })
        .collect()
}

/// Returns the bytes of every entry, by name.
fn entries(bytes: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    let damaged =
        |e: rawzip::Error| format!("it is not a complete zip file ({e}); download it again");
    let archive = ZipArchive::from_slice(bytes).map_err(damaged)?;
    let mut entries = BTreeMap::new();
    let mut records = archive.entries();
    while let Some(record) = records.next_entry().map_err(damaged)? {
        let path = record.file_path();
        let name = str::from_utf8(path.as_ref())
            .ok()
            .filter(|name| name.len() <= MAX_NAME && !name.contains(char::is_control))
            .ok_or("an entry's name is not plain text")?;
        if record.is_dir() {
            continue;
        }
        if record.compression_method() != CompressionMethod::STORE {
            return Err(format!(
                "entry {name} is compressed ({}), which torch.save never does",
                record.compression_method()
            ));
        }
        if record.flags().is_encrypted() {
            return Err(format!("entry {name} is encrypted"));
        }
        if record.compressed_size_hint() != record.uncompressed_size_hint() {
            return Err(format!("entry {name} is stored with two lengths"));
        }
        let (start, end) = archive
            .get_entry(record.wayfinder())
            .map_err(|_| format!("entry {name} points outside the file; it may be truncated"))?
            .compressed_data_range();
        // Both are offsets into `bytes`, so they fit.
        let range = start as usize..end as usize;
        if entries.insert(name.to_owned(), range).is_some() {
            return Err(format!("there are two entries named {name}"));
        }
        if entries.len() > MAX_ENTRIES {
            return Err(format!("it has over {MAX_ENTRIES} entries"));
        }
    }
    let mut ranges: Vec<_> = entries.iter().map(|(n, r)| (r, n.as_str())).collect();
    ranges.sort_by_key(|(range, _)| (range.start, range.end));
    for ((before, one), (after, other)) in ranges.iter().zip(ranges.iter().skip(1)) {
        if before.end > after.start {
            return Err(format!("entries {one} and {other} overlap"));
        }
    }
    Ok(entries)
}

/// Computes a tensor's byte range in the file from that of its storage.
fn place(tensor: &TorchTensor<'_>, storage: &Range<usize>) -> Result<Place, String> {
    let TorchTensor {
        storage: declared,
        offset,
        shape,
        strides,
    } = tensor;
    let size = declared.dtype.bitsize() / 8;
    if declared.elements.checked_mul(size) != Some(storage.len()) {
        return Err(format!(
            "is a view of {} elements of {:?}, but its storage has {} bytes",
            declared.elements,
            declared.dtype,
            storage.len()
        ));
    }
    let outside = || "extends beyond its storage".to_owned();
    let count = shape
        .iter()
        .try_fold(size, |n, &d| n.checked_mul(d))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .ok_or_else(outside)?
        / size;
    // One past the last element.
    let end = match count {
        0 => Some(*offset),
        _ => shape
            .iter()
            .zip(strides)
            .try_fold(*offset, |at, (d, stride)| {
                at.checked_add((d - 1).checked_mul(*stride)?)
            })
            .and_then(|last| last.checked_add(1)),
    };
    let end = end
        .filter(|&end| end <= declared.elements)
        .ok_or_else(outside)?;
    Ok(Place {
        dtype: declared.dtype,
        shape: shape.clone(),
        strides: (count > 0 && !row_major(shape, strides)).then(|| strides.clone()),
        bytes: storage.start + offset * size..storage.start + end * size,
    })
}

/// Returns true if elements are contiguous in row-major order. A dimension of 1 may have any
/// stride.
fn row_major(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&d, &stride)| {
        let fits = d == 1 || stride == expected;
        expected *= d;
        fits
    })
}

#[cfg(test)]
mod tests;
