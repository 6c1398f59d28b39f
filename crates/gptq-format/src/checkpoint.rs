//! Lazy reading of a safetensors checkpoint, single or sharded: files are mapped, headers are
//! checked, and a tensor's bytes are touched only when it is asked for.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};

use crate::{FormatError, PackedLinear, QuantizeConfig, le_bytes, read_json};

/// A mapped checkpoint directory.
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<Mmap>,
    tensors: BTreeMap<String, Place>,
    quantize_config: Option<QuantizeConfig>,
}

struct Place {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// One tensor as it lies in the file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: &'a [usize],
    /// Little-endian elements, row-major; possibly unaligned.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Maps `model.safetensors`, or the shards `model.safetensors.index.json` lists, in `dir`.
    ///
    /// Errors when neither is there, when a header does not parse or disagrees with the file's
    /// length, or when the index names a tensor its shard does not hold.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        let index = dir.join("model.safetensors.index.json");
        let mut listed: Option<BTreeMap<String, String>> = None;
        let files = if index.exists() {
            let map = read_weight_map(&index)?;
            let mut files: Vec<String> = map.values().cloned().collect();
            files.sort();
            files.dedup();
            listed = Some(map);
            files
        } else if dir.join("model.safetensors").exists() {
            vec!["model.safetensors".to_owned()]
        } else {
            return Err(FormatError::NoCheckpoint { dir: dir.into() });
        };

        let mut checkpoint = Checkpoint {
            dir: dir.into(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            quantize_config: match dir.join("config.json").exists() {
                true => QuantizeConfig::read(dir)?,
                false => None,
            },
        };
        for file in &files {
            checkpoint.add_shard(&dir.join(file))?;
        }
        for name in listed.iter().flat_map(BTreeMap::keys) {
            checkpoint.place(name)?;
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, path: &Path) -> Result<(), FormatError> {
        let file = File::open(path).map_err(FormatError::io(path))?;
        // SAFETY: the map is read-only and private to this struct. A file that another process
        // truncates while it is mapped faults on access, as in every program that maps checkpoints.
        let map = unsafe { Mmap::map(&file) }.map_err(FormatError::io(path))?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| FormatError::Header {
                path: path.into(),
                reason: e.to_string(),
            })?;
        let data = header + 8;
        let expected = data + metadata.data_len();
        if map.len() != expected {
            return Err(FormatError::Header {
                path: path.into(),
                reason: format!("{} bytes, its header promises {expected}", map.len()),
            });
        }
        let shard = self.shards.len();
        for (name, info) in metadata.tensors() {
            let place = Place {
                shard,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data + info.data_offsets.0,
                end: data + info.data_offsets.1,
            };
            self.tensors.insert(name, place);
        }
        self.shards.push(map);
        Ok(())
    }

    /// The directory it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The GPTQ settings, when this is a quantised checkpoint.
    pub fn quantize_config(&self) -> Option<&QuantizeConfig> {
        self.quantize_config.as_ref()
    }

    /// All tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn place<'a>(&'a self, name: &'a str) -> Result<&'a Place, FormatError> {
        self.tensors
            .get(name)
            .ok_or_else(|| FormatError::MissingTensor {
                dir: self.dir.clone(),
                name: name.into(),
            })
    }

    /// One tensor's bytes, whatever its dtype and shape.
    pub fn view<'a>(&'a self, name: &'a str) -> Result<TensorView<'a>, FormatError> {
        let place = self.place(name)?;
        Ok(TensorView {
            name,
            dtype: place.dtype,
            shape: &place.shape,
            bytes: &self.shards[place.shard][place.start..place.end],
        })
    }

    fn shaped<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<TensorView<'a>, FormatError> {
        let view = self.view(name)?;
        if view.shape != shape {
            return Err(FormatError::Shape {
                name: name.into(),
                found: view.shape.into(),
                expected: shape.into(),
            });
        }
        Ok(view)
    }

    /// A floating-point tensor as f16. bf16 and f32 are rounded to nearest even.
    ///
    /// Errors on a wrong shape or dtype, on a non-finite value, and on a value beyond f16's range.
    pub fn f16(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>, FormatError> {
        let elements = self.shaped(name, shape)?.shape.iter().product();
        let mut values = vec![f16::ZERO; elements];
        self.f16_into(name, shape, &mut values)?;
        Ok(values)
    }

    /// As [`Checkpoint::f16`], into memory of the caller's, on all cores: `out` is as long as the
    /// tensor.
    ///
    /// # Errors
    /// As [`Checkpoint::f16`].
    ///
    /// # Panics
    /// When `out` has another length.
    pub fn f16_into(
        &self,
        name: &str,
        shape: &[usize],
        out: &mut [f16],
    ) -> Result<(), FormatError> {
        let view = self.shaped(name, shape)?;
        let (bytes, out_len) = (view.bytes, out.len());
        assert_eq!(out_len, shape.iter().product::<usize>(), "{name}");
        let finite = match view.dtype {
            Dtype::F16 => convert(bytes, out, f16::from_le_bytes),
            Dtype::BF16 => convert(bytes, out, |b| {
                f16::from_f32(bf16::from_le_bytes(b).to_f32())
            }),
            Dtype::F32 => convert(bytes, out, |b| f16::from_f32(f32::from_le_bytes(b))),
            _ => return Err(view.wrong_dtype("F16, BF16 or F32")),
        };
        if !finite && let Some((first, count)) = find(out, |v| !v.is_finite()) {
            // Only the source tells a value that overflowed from one that was never finite.
            let source = self.f32_unchecked(view)?;
            let name = name.to_owned();
            return Err(match find(&source, |v| !v.is_finite()) {
                Some((first, count)) => FormatError::NonFinite { name, first, count },
                None => FormatError::Overflow { name, first, count },
            });
        }
        Ok(())
    }

    /// As [`Checkpoint::f16`], in little-endian bytes: those of the file where it holds f16.
    ///
    /// # Errors
    /// As [`Checkpoint::f16`].
    pub fn f16_bytes(&self, name: &str, shape: &[usize]) -> Result<Cow<'_, [u8]>, FormatError> {
        let place = self.place(name)?;
        let values = self.f16(name, shape)?;
        Ok(match place.dtype {
            Dtype::F16 => Cow::Borrowed(&self.shards[place.shard][place.start..place.end]),
            _ => Cow::Owned(le_bytes(&values).into_owned()),
        })
    }

    fn f32_unchecked(&self, view: TensorView<'_>) -> Result<Vec<f32>, FormatError> {
        Ok(match view.dtype {
            Dtype::F16 => words(view.bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => words(view.bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F32 => words(view.bytes, f32::from_le_bytes),
            _ => return Err(view.wrong_dtype("F16, BF16 or F32")),
        })
    }

    /// An i32 tensor's words. Errors on a wrong shape or dtype.
    pub fn i32(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>, FormatError> {
        let view = self.shaped(name, shape)?;
        match view.dtype {
            Dtype::I32 => Ok(words(view.bytes, i32::from_le_bytes)),
            _ => Err(view.wrong_dtype("I32")),
        }
    }

    /// The quantised linear `module` (its `qweight`, `qzeros`, `scales`, `g_idx`), or `None` when
    /// the checkpoint is dense or the config leaves this module in full precision.
    ///
    /// Errors when a tensor is missing, or its shape or dtype disagrees with the config, or `g_idx`
    /// points outside the groups.
    pub fn packed(
        &self,
        module: &str,
        in_features: usize,
        out_features: usize,
    ) -> Result<Option<PackedLinear>, FormatError> {
        let Some(config) = &self.quantize_config else {
            return Ok(None);
        };
        let Some((bits, group_size)) = config.module(module)? else {
            return Ok(None);
        };
        if !in_features.is_multiple_of(32) || !out_features.is_multiple_of(32) {
            return Err(FormatError::Unpackable {
                in_features,
                out_features,
            });
        }
        let groups = group_size.groups(in_features);
        let tensor = |suffix: &str| format!("{module}.{suffix}");
        let words = |values: Vec<i32>| values.into_iter().map(|v| v as u32).collect();
        let b = bits.get();
        let packed = PackedLinear {
            bits,
            in_features,
            out_features,
            format: config.checkpoint_format,
            qweight: words(self.i32(&tensor("qweight"), &[in_features * b / 32, out_features])?),
            qzeros: words(self.i32(&tensor("qzeros"), &[groups, out_features * b / 32])?),
            scales: self.f16(&tensor("scales"), &[groups, out_features])?,
            g_idx: self.i32(&tensor("g_idx"), &[in_features])?,
        };
        for (row, &value) in packed.g_idx.iter().enumerate() {
            if usize::try_from(value).map_or(true, |g| g >= groups) {
                return Err(FormatError::GroupIndex {
                    name: tensor("g_idx"),
                    row,
                    value,
                    groups,
                });
            }
        }
        Ok(Some(packed))
    }
}

impl TensorView<'_> {
    fn wrong_dtype(&self, expected: &'static str) -> FormatError {
        FormatError::Dtype {
            name: self.name.into(),
            found: format!("{:?}", self.dtype),
            expected,
        }
    }
}

/// Reads unaligned little-endian elements of `N` bytes.
fn words<const N: usize, T>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|b| from(*b)).collect()
}

/// Elements converted by one task.
const RUN: usize = 1 << 18;

/// Converts unaligned little-endian elements of `N` bytes, on all cores; whether all came out
/// finite. That is summed up without a branch: this passes over every weight of a model.
fn convert<const N: usize>(
    bytes: &[u8],
    out: &mut [f16],
    from: impl Fn([u8; N]) -> f16 + Sync,
) -> bool {
    const EXPONENT: u16 = 0x7c00;
    let damaged = |v: f16| u32::from(v.to_bits() & EXPONENT == EXPONENT);
    out.par_chunks_mut(RUN)
        .zip(bytes.as_chunks::<N>().0.par_chunks(RUN))
        .map(|(out, bytes)| {
            for (value, bytes) in out.iter_mut().zip(bytes) {
                *value = from(*bytes);
            }
            out.iter().map(|v| damaged(*v)).sum::<u32>() == 0
        })
        .reduce(|| true, |a, b| a && b)
}

/// Index of the first element `bad` holds for, and how many there are.
fn find<T>(values: &[T], bad: impl Fn(&T) -> bool) -> Option<(usize, usize)> {
    let first = values.iter().position(&bad)?;
    Some((first, values[first..].iter().filter(|v| bad(v)).count()))
}

fn read_weight_map(index: &Path) -> Result<BTreeMap<String, String>, FormatError> {
    let malformed = |reason: String| FormatError::Malformed {
        path: index.into(),
        reason,
    };
    let value: serde_json::Value = read_json(index)?;
    let map = value
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| malformed("has no \"weight_map\" object".into()))?;
    map.iter()
        .map(|(name, file)| match file.as_str() {
            // A shard lies beside its index: anything that is more than a file name is refused.
            Some(file) if Path::new(file).file_name() == Some(file.as_ref()) => {
                Ok((name.clone(), file.to_owned()))
            }
            _ => Err(malformed(format!(
                "{name} points to {file}, not to a file name"
            ))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::tensor::TensorView as View;

    use super::*;

    fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
        let views = tensors
            .iter()
            .map(|(n, d, s, b)| (*n, View::new(*d, s.clone(), b).unwrap()));
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn f32_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn shards_are_found_through_the_index() {
        let dir = tempfile::tempdir().unwrap();
        for (file, name) in [("a.safetensors", "x"), ("b.safetensors", "y")] {
            let data = f32_bytes(&[1.0, -2.5]);
            write(&dir.path().join(file), &[(name, Dtype::F32, vec![2], data)]);
        }
        let index = dir.path().join("model.safetensors.index.json");
        fs::write(
            &index,
            r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}"#,
        )
        .unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(checkpoint.f16("y", &[2]).unwrap()[1].to_f32(), -2.5);
        assert!(matches!(
            checkpoint.f16("y", &[1, 2]),
            Err(FormatError::Shape { .. })
        ));
        assert!(matches!(
            checkpoint.i32("y", &[2]),
            Err(FormatError::Dtype { .. })
        ));

        fs::write(&index, r#"{"weight_map": {"z": "a.safetensors"}}"#).unwrap();
        assert!(matches!(
            Checkpoint::open(dir.path()),
            Err(FormatError::MissingTensor { .. })
        ));
        fs::write(&index, r#"{"weight_map": {"x": "../a.safetensors"}}"#).unwrap();
        assert!(matches!(
            Checkpoint::open(dir.path()),
            Err(FormatError::Malformed { .. })
        ));
    }

    #[test]
    fn overflow_and_non_finite_values_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        write(
            &file,
            &[
                ("big", Dtype::F32, vec![3], f32_bytes(&[1.0, 7e4, 8e4])),
                ("nan", Dtype::F32, vec![2], f32_bytes(&[f32::NAN, 0.0])),
            ],
        );
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(matches!(
            checkpoint.f16("big", &[3]),
            Err(FormatError::Overflow {
                first: 1,
                count: 2,
                ..
            })
        ));
        assert!(matches!(
            checkpoint.f16("nan", &[2]),
            Err(FormatError::NonFinite {
                first: 0,
                count: 1,
                ..
            })
        ));
    }

    #[test]
    fn dimensions_that_do_not_fill_words_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("model.safetensors"), &[]);
        let config = r#"{"quantization_config": {"bits": 4, "group_size": -1}}"#;
        fs::write(dir.path().join("config.json"), config).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(matches!(
            checkpoint.packed("m", 40, 64),
            Err(FormatError::Unpackable { .. })
        ));
    }

    #[test]
    fn a_truncated_file_is_refused_at_open() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        write(&file, &[("x", Dtype::F32, vec![4], f32_bytes(&[0.0; 4]))]);
        let whole = fs::read(&file).unwrap();
        for keep in [0, 4, 20, whole.len() - 1] {
            fs::write(&file, &whole[..keep]).unwrap();
            let error = Checkpoint::open(dir.path())
                .err()
                .expect("a truncated file was taken");
            assert!(error.to_string().contains("model.safetensors"), "{error}");
        }
    }
}
