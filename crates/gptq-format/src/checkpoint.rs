//! Lazy reading of a checkpoint, safetensors or PyTorch files, single or sharded: files are mapped
//! and their directories checked, but a tensor's bytes are read only on request.
//!
//! Longer than most: reading tensors of every kind, and the quantized linear layers made of them, are methods of one type.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;
use half::vec::HalfBitsVecExt;
use safetensors::Dtype;

use crate::mapped_file::MappedFile;
use crate::place::Place;
use crate::quantize_config::{base_names, method_of};
use crate::weight_files::{Container, Index, WeightFiles, map, some};
use crate::{
    FloatScan, FormatError, Half, LinearShape, OutputFormat, PackedLinear, QuantizeConfig,
    StoredTensors, TensorDigests, TensorView, layout, safetensors_file, sha256, torch_file,
};

/// Number of elements of a large tensor that are converted at a time on the way to a device or a
/// file.
pub const TABLE_PIECE: usize = 1 << 21;

/// End of the name of a model's embedding table.
const EMBEDDING: &str = "embed_tokens.weight";

/// A mapped checkpoint directory.
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<String>,
    shards: Vec<MappedFile>,
    /// Tensors by name, with the index of their shard.
    tensors: BTreeMap<String, (usize, Place)>,
    quantize_config: Option<QuantizeConfig>,
    index: Option<Index>,
    notes: Vec<String>,
}

/// Format and shape of a quantized linear layer.
type StoredLinear = (Box<dyn OutputFormat>, LinearShape);

impl Checkpoint {
    /// Maps the weights in `dir`: the files that Transformers reads, or those of other tools (see
    /// [`Checkpoint::notes`]). The shards' own headers determine the tensors; where an index
    /// disagrees, that is no error until a tensor is requested that no shard has.
    ///
    /// # Errors
    /// No weights, a file whose directory does not parse or disagrees with its length, a tensor
    /// with different values in two shards, or quantization settings of a method other than GPTQ.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        let WeightFiles {
            container,
            files,
            index,
            notes,
        } = WeightFiles::find(dir, &base_names(dir))?;
        let mut checkpoint = Checkpoint {
            dir: dir.into(),
            files: Vec::new(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            quantize_config: None,
            index: None,
            notes,
        };
        let listed = |name: &str| index.as_ref()?.weight_map.get(name);
        let mut twice = Vec::new();
        for (shard, file) in files.iter().enumerate() {
            let path = dir.join(file);
            let bytes = map(&path)?;
            let places = match container {
                Container::Safetensors => safetensors_file::places(&path, &bytes)?,
                Container::Torch => torch_file::places(&path, &bytes)?,
            };
            checkpoint.shards.push(bytes);
            for (name, place) in places {
                match checkpoint.tensors.get(&name) {
                    // If several shards have it, the one listed in the index is used.
                    Some(_) if listed(&name) == Some(file) => {}
                    Some((before, _)) if listed(&name) == files.get(*before) => continue,
                    Some((before, other)) => {
                        twice.push((name, (*before, other.clone()), (shard, place)));
                        continue;
                    }
                    None => {}
                }
                checkpoint.tensors.insert(name, (shard, place));
            }
        }
        for (name, one, other) in twice {
            let file = |shard: usize| files.get(shard).cloned().unwrap_or_default();
            let same = one.1.dtype == other.1.dtype
                && one.1.shape == other.1.shape
                && checkpoint.at(&name, &one).bytes() == checkpoint.at(&name, &other).bytes();
            let counts = checkpoint.tensors.get(&name).map(|(shard, _)| *shard);
            let counts = counts.and_then(|shard| files.get(shard));
            if !same && listed(&name) != counts {
                return Err(FormatError::TwoTensors {
                    dir: dir.into(),
                    name,
                    one: file(one.0),
                    other: file(other.0),
                });
            }
        }
        checkpoint.files = files;
        checkpoint.index = index;
        checkpoint.note_index();
        checkpoint.quantize_config = checkpoint.settings()?;
        Ok(checkpoint)
    }

    /// Reads the settings beside the weights. For another method's settings, the error notes
    /// whether the weights are dense.
    fn settings(&self) -> Result<Option<QuantizeConfig>, FormatError> {
        let there = |file: &str| self.dir.join(file).exists();
        if !there("config.json") && !there("quantize_config.json") {
            return Ok(None);
        }
        match QuantizeConfig::read(&self.dir) {
            Err(FormatError::OtherMethod { path, method, .. }) => Err(FormatError::OtherMethod {
                path,
                method,
                dense: self.quantized_by().is_none(),
            }),
            read => read,
        }
    }

    /// Returns the method by which some of the tensors are quantized, judging by names and dtypes,
    /// and one such tensor.
    pub fn quantized_by(&self) -> Option<(&'static str, &str)> {
        self.tensors.iter().find_map(|(name, (_, place))| {
            let method = method_of(name, place.dtype)?;
            Some((method, name.as_str()))
        })
    }

    /// Adds notes where the index and the shards disagree.
    fn note_index(&mut self) {
        let Some(index) = &self.index else {
            return;
        };
        let (mut gone, mut elsewhere) = (Vec::new(), Vec::new());
        for (name, file) in &index.weight_map {
            match self.tensors.get(name) {
                None => gone.push(name.clone()),
                Some((shard, _)) if self.files.get(*shard) != Some(file) => {
                    elsewhere.push(name.clone());
                }
                Some(_) => {}
            }
        }
        if !gone.is_empty() {
            let names = some(&gone);
            (self.notes).push(format!(
                "{} lists {names}, which no file contains",
                index.name
            ));
        }
        // If shards are read in place of those listed, every tensor is in another file.
        if !elsewhere.is_empty() && index.absent.is_empty() {
            (self.notes).push(format!(
                "{} lists {} in a different file from the one that contains it",
                index.name,
                some(&elsewhere)
            ));
        }
    }

    /// Returns notes on unexpected files and index entries, one sentence each; they are harmless if
    /// every needed tensor is present.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Returns the files that the index lists but that are missing.
    pub fn absent_files(&self) -> &[String] {
        self.index.as_ref().map_or(&[], |index| &index.absent)
    }

    /// Maps one file and reads the quantization settings beside it.
    ///
    /// Errors as [`Checkpoint::open`].
    pub fn open_file(path: &Path) -> Result<Self, FormatError> {
        let dir = path.parent().unwrap_or(Path::new(""));
        let bytes = map(path)?;
        let places = match path.extension().is_some_and(|e| e == "bin" || e == "pt") {
            true => torch_file::places(path, &bytes)?,
            false => safetensors_file::places(path, &bytes)?,
        };
        let mut checkpoint = Checkpoint {
            dir: dir.into(),
            tensors: (places.into_iter())
                .map(|(name, place)| (name, (0, place)))
                .collect(),
            files: vec![(path.file_name().unwrap_or_default().to_string_lossy()).into_owned()],
            shards: vec![bytes],
            quantize_config: None,
            index: None,
            notes: Vec::new(),
        };
        checkpoint.quantize_config = checkpoint.settings()?;
        Ok(checkpoint)
    }

    /// Returns the directory it was opened from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the names of the weight files.
    pub fn files(&self) -> &[String] {
        &self.files
    }

    /// Returns the GPTQ settings of a quantized checkpoint.
    pub fn quantize_config(&self) -> Option<&QuantizeConfig> {
        self.quantize_config.as_ref()
    }

    /// Returns all tensor names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns true if the tensor exists.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns a view of one tensor of any dtype and shape.
    ///
    /// # Errors
    /// No such tensor.
    pub fn view<'a>(&'a self, name: &'a str) -> Result<TensorView<'a>, FormatError> {
        let place = (self.tensors.get(name)).ok_or_else(|| FormatError::MissingTensor {
            dir: self.dir.clone(),
            name: name.into(),
            hint: self.index_says(name),
        })?;
        Ok(self.at(name, place))
    }

    /// Describes what the index says about a missing tensor.
    fn index_says(&self, name: &str) -> String {
        let listed = |index: &Index| {
            let file = index.weight_map.get(name)?;
            let why = match index.absent.contains(file) {
                true => "is missing",
                false => "does not contain it",
            };
            Some(format!(
                " ({} says it is in {file}, which {why})",
                index.name
            ))
        };
        self.index.as_ref().and_then(listed).unwrap_or_default()
    }

    fn at<'a>(&'a self, name: &'a str, (shard, place): &'a (usize, Place)) -> TensorView<'a> {
        TensorView {
            name,
            dtype: place.dtype,
            shape: &place.shape,
            strides: place.strides.as_deref(),
            storage: self.bytes(*shard, place),
        }
    }

    /// Prepares a scan of the weight file `file` for values that `half` cannot hold, in the tensors
    /// selected by `needed`. A view that skips elements of its storage is left out.
    pub fn float_scan(&self, file: &str, half: Half, needed: impl Fn(&str) -> bool) -> FloatScan {
        let at = self.files.iter().position(|it| it == file);
        let inside = self.tensors.iter();
        let inside = inside.filter(|(name, (shard, _))| Some(*shard) == at && needed(name));
        FloatScan::new(
            inside.map(|(name, (_, place))| (name.as_str(), place)),
            half,
        )
    }

    /// Returns the bytes at a location in a shard; the range was checked when the file was opened.
    fn bytes(&self, shard: usize, place: &Place) -> &[u8] {
        let file = self.shards.get(shard);
        let bytes = file.and_then(|file| file.get(place.bytes.clone()));
        bytes.unwrap_or_default()
    }

    /// Drops the resident pages of a tensor that has been copied or is not needed again soon.
    /// Methods that convert tensors do this themselves.
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

    /// Writes a floating-point tensor as the bits of `half`, row-major, into `out`, which must have
    /// as many elements as `shape`. Other floats are rounded to nearest even. All threads work on
    /// one tensor.
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

    /// Converts like [`Checkpoint::halves_into`], `step` elements at a time and in order, and
    /// passes each piece to `take` with the index of its first element, so that a table of any size
    /// need not be in memory. Pages of the file are dropped after reading.
    ///
    /// # Errors
    /// Those of [`Checkpoint::halves_into`], and errors of `take`.
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

    /// Checks that a floating-point tensor is complete and can be converted to `half`.
    ///
    /// # Errors
    /// The same errors as [`Checkpoint::halves_into`].
    pub fn check_halves(&self, half: Half, name: &str, shape: &[usize]) -> Result<(), FormatError> {
        self.half_pieces(half, name, shape, TABLE_PIECE, |_, _| Ok(()))
    }

    /// Returns a floating-point tensor as f16, row-major.
    ///
    /// # Errors
    /// The same errors as [`Checkpoint::halves_into`].
    pub fn f16(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>, FormatError> {
        Ok(self.halves(Half::F16, name, shape)?.reinterpret_into())
    }

    fn halves(&self, half: Half, name: &str, shape: &[usize]) -> Result<Vec<u16>, FormatError> {
        let mut bits = vec![0; self.shaped(name, shape)?.elements()];
        self.halves_into(half, name, shape, &mut bits)?;
        Ok(bits)
    }

    /// Returns the 16-bit float to use: bf16 if the embedding table is bf16, otherwise f16.
    pub fn half(&self) -> Half {
        let mut tensors = self.tensors.iter();
        let embedding = tensors.find(|(name, _)| name.ends_with(EMBEDDING));
        match embedding {
            Some((_, (_, place))) if place.dtype == Dtype::BF16 => Half::Bf16,
            _ => Half::F16,
        }
    }

    /// Returns the words of an i32 tensor. Errors on a wrong shape or dtype.
    pub fn i32(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>, FormatError> {
        let read = self.shaped(name, shape)?.i32();
        self.give_back(name);
        read
    }

    /// Returns the words of a u32 tensor. Errors on a wrong shape or dtype.
    pub fn u32(&self, name: &str, shape: &[usize]) -> Result<Vec<u32>, FormatError> {
        let read = self.shaped(name, shape)?.u32();
        self.give_back(name);
        read
    }

    /// Returns the elements of an i64 tensor. Errors on a wrong shape or dtype.
    pub fn i64(&self, name: &str, shape: &[usize]) -> Result<Vec<i64>, FormatError> {
        self.shaped(name, shape)?.i64()
    }

    /// Returns the quantized linear layer `module`, or `None` if the checkpoint is dense or the config leaves
    /// this module in full precision.
    ///
    /// Errors if a tensor is missing, its shape or dtype disagrees with the config, or a group index
    /// out of range.
    pub fn packed(
        &self,
        module: &str,
        in_features: usize,
        out_features: usize,
    ) -> Result<Option<PackedLinear>, FormatError> {
        let Some((format, linear)) = self.linear(module, in_features, out_features)? else {
            return Ok(None);
        };
        let packed = format.decode(self, module, &linear)?;
        let groups = linear.groups();
        for (row, &value) in packed.g_idx.iter().enumerate() {
            if usize::try_from(value).map_or(true, |g| g >= groups) {
                return Err(FormatError::GroupIndex {
                    name: format.tensor_name(module, "g_idx"),
                    row,
                    value,
                    groups,
                });
            }
        }
        Ok(Some(packed))
    }

    /// Returns true if inputs of a group of the quantized linear `module` are not neighbours, from its `g_idx` alone;
    /// `None` as for [`Checkpoint::packed`].
    ///
    /// # Errors
    /// A `g_idx` of another shape or dtype.
    pub fn scattered(
        &self,
        module: &str,
        in_features: usize,
        out_features: usize,
    ) -> Result<Option<bool>, FormatError> {
        let Some((format, linear)) = self.linear(module, in_features, out_features)? else {
            return Ok(None);
        };
        let name = format.tensor_name(module, "g_idx");
        if !self.contains(&name) {
            return Ok(Some(false));
        }
        let columns = linear.group_size.columns(in_features);
        let groups = self.i32(&name, &[in_features])?;
        let mut groups = groups.iter().enumerate();
        Ok(Some(
            groups.any(|(i, &g)| usize::try_from(g) != Ok(i / columns)),
        ))
    }

    /// SHA-256 of the tensors of the quantized linear `module` that are there; `None` as for [`Checkpoint::packed`].
    ///
    /// # Errors
    /// A pattern of the config that matching takes too long with.
    pub fn digests(
        &self,
        module: &str,
        in_features: usize,
        out_features: usize,
    ) -> Result<Option<TensorDigests>, FormatError> {
        let Some((format, linear)) = self.linear(module, in_features, out_features)? else {
            return Ok(None);
        };
        let mut digests = Vec::new();
        for part in format.parts(&linear) {
            let name = format.tensor_name(module, part.suffix);
            if self.contains(&name) {
                let digest = sha256(&self.view(&name)?.bytes());
                digests.push((part.suffix.to_owned(), digest));
                self.give_back(&name);
            }
        }
        Ok(Some(digests.into_iter().collect()))
    }

    /// Format and shape of a quantized module; `None` if it is not quantized.
    fn linear(
        &self,
        module: &str,
        in_features: usize,
        out_features: usize,
    ) -> Result<Option<StoredLinear>, FormatError> {
        let Some(config) = &self.quantize_config else {
            return Ok(None);
        };
        let settings = config.module(module)?;
        Ok(settings.map(|(bits, group_size)| {
            let linear = LinearShape {
                in_features,
                out_features,
                bits,
                group_size,
            };
            (layout(config.checkpoint_format, config.sym), linear)
        }))
    }

    /// Makes the tensor `by` available as `name` too.
    pub fn serve(&mut self, name: &str, by: &str) {
        if let Some(place) = self.tensors.get(by).cloned() {
            self.tensors.insert(name.to_owned(), place);
        }
    }

    /// Replaces the tensor `name`, which must have this shape, by consecutive parts of it, each with its name and shape.
    ///
    /// # Errors
    /// It has another shape, it is a view that skips elements of its storage, or the parts do not make up the whole.
    pub fn divide(
        &mut self,
        name: &str,
        shape: &[usize],
        parts: Vec<(String, Vec<usize>)>,
    ) -> Result<(), FormatError> {
        let view = self.shaped(name, shape)?;
        let wrong = |found: &[usize]| FormatError::Shape {
            name: name.into(),
            found: found.into(),
            expected: shape.into(),
        };
        let elements = |shape: &[usize]| shape.iter().product::<usize>();
        let all: usize = parts.iter().map(|(_, shape)| elements(shape)).sum();
        if view.strides.is_some() || all != view.elements() {
            return Err(wrong(view.shape));
        }
        let size = view.dtype.bitsize() / 8;
        let Some((shard, whole)) = self.tensors.remove(name) else {
            return Ok(());
        };
        let mut start = whole.bytes.start;
        for (name, shape) in parts {
            let bytes = start..start + elements(&shape) * size;
            start = bytes.end;
            let part = Place {
                dtype: whole.dtype,
                shape,
                strides: None,
                bytes,
            };
            self.tensors.insert(name, (shard, part));
        }
        Ok(())
    }
}

impl StoredTensors for Checkpoint {
    fn settings(&self) -> Option<&QuantizeConfig> {
        self.quantize_config()
    }

    fn contains(&self, name: &str) -> bool {
        Checkpoint::contains(self, name)
    }

    fn matrix(&self, name: &str) -> Result<[usize; 2], FormatError> {
        let view = self.view(name)?;
        <[usize; 2]>::try_from(view.shape).map_err(|_| FormatError::Shape {
            name: name.into(),
            found: view.shape.into(),
            expected: vec![0, 0],
        })
    }

    fn i32(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>, FormatError> {
        Checkpoint::i32(self, name, shape)
    }

    fn u32(&self, name: &str, shape: &[usize]) -> Result<Vec<u32>, FormatError> {
        Checkpoint::u32(self, name, shape)
    }

    fn i64(&self, name: &str, shape: &[usize]) -> Result<Vec<i64>, FormatError> {
        Checkpoint::i64(self, name, shape)
    }

    fn f16(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>, FormatError> {
        Checkpoint::f16(self, name, shape)
    }
}

#[cfg(test)]
mod tests;
