//! Lazy reading of a checkpoint, safetensors or PyTorch files, single or sharded: files are mapped,
//! their directories are checked, and a tensor's bytes are touched only when it is asked for.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::f16;
use half::vec::HalfBitsVecExt;
use safetensors::Dtype;

use crate::mapped_file::MappedFile;
use crate::weight_files::{Container, WeightFiles, map};
use crate::{
    FormatError, Half, PackedLinear, QuantizeConfig, TensorView, safetensors_file, torch_file,
};

/// Elements of a large tensor that are converted at a time on their way to a device or into a file.
pub const TABLE_PIECE: usize = 1 << 21;

/// A mapped checkpoint directory.
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<String>,
    shards: Vec<MappedFile>,
    /// By name, with the shard each lies in.
    tensors: BTreeMap<String, (usize, Place)>,
    quantize_config: Option<QuantizeConfig>,
}

/// Where a file keeps a tensor; checked against the file's length.
#[derive(Debug, PartialEq)]
pub(crate) struct Place {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Elements from one index of a dimension to the next; `None` when row-major without gaps.
    pub(crate) strides: Option<Vec<usize>>,
    /// From the first element to the end of the last.
    pub(crate) bytes: Range<usize>,
}

impl Checkpoint {
    /// Maps the weights in `dir`: `model.safetensors` or `pytorch_model.bin`, or the shards that
    /// `model.safetensors.index.json` or `pytorch_model.bin.index.json` lists. safetensors are
    /// preferred.
    ///
    /// Errors when none is there, when a file's directory does not parse or disagrees with its
    /// length, or when the index names a tensor its shard does not hold.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        let WeightFiles {
            container,
            files,
            weight_map,
        } = WeightFiles::find(dir)?;
        let mut checkpoint = Checkpoint {
            dir: dir.into(),
            files: Vec::new(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            quantize_config: match dir.join("config.json").exists() {
                true => QuantizeConfig::read(dir)?,
                false => None,
            },
        };
        for (shard, file) in files.iter().enumerate() {
            let path = dir.join(file);
            let bytes = map(&path)?;
            let places = match container {
                Container::Safetensors => safetensors_file::places(&path, &bytes)?,
                Container::Torch => torch_file::places(&path, &bytes)?,
            };
            for (name, place) in places {
                // Where the index says another shard, that one counts.
                if weight_map.get(&name).is_none_or(|listed| listed == file) {
                    checkpoint.tensors.insert(name, (shard, place));
                }
            }
            checkpoint.shards.push(bytes);
        }
        checkpoint.files = files;
        for name in weight_map.keys() {
            checkpoint.view(name)?;
        }
        Ok(checkpoint)
    }

    /// Maps one file, with the quantisation settings beside it.
    ///
    /// Errors as [`Checkpoint::open`].
    pub fn open_file(path: &Path) -> Result<Self, FormatError> {
        let dir = path.parent().unwrap_or(Path::new(""));
        let bytes = map(path)?;
        let places = match path.extension().is_some_and(|e| e == "bin") {
            true => torch_file::places(path, &bytes)?,
            false => safetensors_file::places(path, &bytes)?,
        };
        let config = dir.join("config.json").exists() || dir.join("quantize_config.json").exists();
        Ok(Checkpoint {
            dir: dir.into(),
            tensors: (places.into_iter())
                .map(|(name, place)| (name, (0, place)))
                .collect(),
            files: vec![(path.file_name().unwrap_or_default().to_string_lossy()).into_owned()],
            shards: vec![bytes],
            quantize_config: match config {
                true => QuantizeConfig::read(dir)?,
                false => None,
            },
        })
    }

    /// The directory it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names of the files that hold its weights.
    pub fn files(&self) -> &[String] {
        &self.files
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

    /// One tensor, whatever its dtype and shape.
    ///
    /// # Errors
    /// No such tensor.
    pub fn view<'a>(&'a self, name: &'a str) -> Result<TensorView<'a>, FormatError> {
        let (shard, place) = self
            .tensors
            .get(name)
            .ok_or_else(|| FormatError::MissingTensor {
                dir: self.dir.clone(),
                name: name.into(),
            })?;
        Ok(TensorView {
            name,
            dtype: place.dtype,
            shape: &place.shape,
            strides: place.strides.as_deref(),
            storage: self.bytes(*shard, place),
        })
    }

    /// The bytes of a place in a shard; both were checked when the file was opened.
    fn bytes(&self, shard: usize, place: &Place) -> &[u8] {
        let file = self.shards.get(shard);
        let bytes = file.and_then(|file| file.get(place.bytes.clone()));
        bytes.unwrap_or_default()
    }

    /// Lets the process's memory go that a tensor's bytes took, for one that was read into a place of its
    /// own or is not needed again soon. What reads tensors into values does so itself.
    pub fn give_back(&self, name: &str) {
        if let Some((shard, place)) = self.tensors.get(name)
            && let Some(file) = self.shards.get(*shard)
        {
            file.give_back(place.bytes.clone());
        }
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

    /// The bits of a floating-point tensor as `half`, row-major, into `out`, which has as many elements
    /// as `shape`. Other floats are rounded to nearest even. One tensor is converted by all threads at
    /// once.
    ///
    /// # Errors
    /// A wrong shape or dtype, a non-finite value, a value beyond the range of `half`.
    pub fn halves_into(
        &self,
        half: Half,
        name: &str,
        shape: &[usize],
        out: &mut [u16],
    ) -> Result<(), FormatError> {
        let read = self.shaped(name, shape)?.halves_into(half, out);
        self.give_back(name);
        read
    }

    /// As [`Checkpoint::halves_into`], `step` elements at a time and in order, each handed to `take` with the index
    /// of its first: a table of any size is read without being in memory. Pages of the file go as they are read.
    ///
    /// # Errors
    /// As [`Checkpoint::halves_into`], and what `take` says.
    pub fn half_pieces<E: From<FormatError>>(
        &self,
        half: Half,
        name: &str,
        shape: &[usize],
        step: usize,
        mut take: impl FnMut(usize, &[u16]) -> Result<(), E>,
    ) -> Result<(), E> {
        let view = self.shaped(name, shape)?;
        let size = view.dtype.bitsize() / 8;
        let rows = self.tensors.get(name).filter(|_| view.strides.is_none());
        let read = view.each_halves(half, step, |first, piece: &[u16]| {
            let taken = take(first, piece);
            if let Some((shard, place)) = rows
                && let Some(file) = self.shards.get(*shard)
            {
                let start = place.bytes.start + first * size;
                file.give_back(start..start + piece.len() * size);
            }
            taken
        });
        self.give_back(name);
        read
    }

    /// Whether a floating-point tensor is all there and can be taken as `half`.
    ///
    /// # Errors
    /// As [`Checkpoint::halves_into`].
    pub fn check_halves(&self, half: Half, name: &str, shape: &[usize]) -> Result<(), FormatError> {
        self.half_pieces(half, name, shape, TABLE_PIECE, |_, _| Ok(()))
    }

    /// A floating-point tensor as f16, row-major.
    ///
    /// # Errors
    /// As [`Checkpoint::halves_into`].
    pub fn f16(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>, FormatError> {
        Ok(self.halves(Half::F16, name, shape)?.reinterpret_into())
    }

    fn halves(&self, half: Half, name: &str, shape: &[usize]) -> Result<Vec<u16>, FormatError> {
        let mut bits = vec![0; self.shaped(name, shape)?.elements()];
        self.halves_into(half, name, shape, &mut bits)?;
        Ok(bits)
    }

    /// The 16-bit float that holds what is stored: bf16 where the embedding table is bf16, else f16.
    pub fn half(&self) -> Half {
        match self.tensors.get("model.embed_tokens.weight") {
            Some((_, place)) if place.dtype == Dtype::BF16 => Half::Bf16,
            _ => Half::F16,
        }
    }

    /// An i32 tensor's words. Errors on a wrong shape or dtype.
    pub fn i32(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>, FormatError> {
        let read = self.shaped(name, shape)?.i32();
        self.give_back(name);
        read
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
            g_idx: match self.contains(&tensor("g_idx")) || config.desc_act {
                true => self.i32(&tensor("g_idx"), &[in_features])?,
                // Files from before act order have none: groups in order.
                false => {
                    let columns = group_size.columns(in_features);
                    (0..in_features).map(|i| (i / columns) as i32).collect()
                }
            },
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
