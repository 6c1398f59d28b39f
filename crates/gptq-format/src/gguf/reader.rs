//! Reads a GGUF file: metadata, and where its tensors lie.
//!
//! Limits: [`MAX_HEADER`] bytes before the data, [`MAX_ENTRIES`] entries, [`MAX_TENSORS`] tensors of [`MAX_DIMENSIONS`]
//! dimensions, names of [`MAX_NAME`] bytes, arrays of [`MAX_ARRAY`] elements and none of arrays.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{ALIGNMENT, ALIGNMENT_KEY, GgufTensor, GgufType, GgufValue, MAGIC, VERSION};
use crate::FormatError;
use crate::mapped_file::MappedFile;

const MAX_HEADER: usize = 256 << 20;
const MAX_ENTRIES: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 18;
const MAX_DIMENSIONS: u32 = 4;
const MAX_NAME: usize = 512;
const MAX_ARRAY: u64 = 1 << 22;

/// A mapped GGUF file.
pub struct GgufFile {
    path: PathBuf,
    bytes: MappedFile,
    /// Metadata by key.
    pub metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, (GgufTensor, usize)>,
}

/// The rest of the header.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl GgufFile {
    /// Maps `path` and checks its header: every tensor lies within the file.
    ///
    /// # Errors
    /// A file that cannot be read, is no GGUF of version 3, or is beyond a limit.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let bytes = MappedFile::open(path)?;
        let malformed = |reason: String| FormatError::Malformed {
            path: path.into(),
            reason: format!("not a readable GGUF file ({reason}); fetch or write it again"),
        };
        let (metadata, tensors) = parse(&bytes).map_err(malformed)?;
        Ok(GgufFile {
            path: path.into(),
            bytes,
            metadata,
            tensors,
        })
    }

    /// Returns the tensors by name.
    pub fn tensors(&self) -> impl Iterator<Item = &GgufTensor> {
        self.tensors.values().map(|(tensor, _)| tensor)
    }

    /// Returns a tensor and its bytes.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn tensor(&self, name: &str) -> Result<(&GgufTensor, &[u8]), FormatError> {
        let found = self.tensors.get(name).and_then(|(tensor, start)| {
            let bytes = self.bytes.get(*start..*start + tensor.bytes()?)?;
            Some((tensor, bytes))
        });
        found.ok_or_else(|| FormatError::MissingTensor {
            dir: self.path.clone(),
            name: name.into(),
            hint: String::new(),
        })
    }

    /// Drops the resident pages of a tensor that is not needed again soon.
    pub fn give_back(&self, name: &str) {
        if let Some((tensor, start)) = self.tensors.get(name) {
            let end = start + tensor.bytes().unwrap_or_default();
            self.bytes.give_back(*start..end);
        }
    }

    /// Returns the text under a key.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            GgufValue::Text(text) => Some(text),
            _ => None,
        }
    }
}

type Parsed = (
    BTreeMap<String, GgufValue>,
    BTreeMap<String, (GgufTensor, usize)>,
);

/// Parses a header; the error is half a line.
fn parse(bytes: &[u8]) -> Result<Parsed, String> {
    let length = bytes.len();
    let mut cursor = Cursor {
        bytes: bytes.get(..length.min(MAX_HEADER)).unwrap_or_default(),
        at: 0,
    };
    if cursor.take(4)? != MAGIC {
        return Err("it does not begin with GGUF".to_owned());
    }
    let version = cursor.u32()?;
    if version != VERSION {
        return Err(format!("version {version}, not {VERSION}"));
    }
    let (tensors, entries) = (cursor.u64()?, cursor.u64()?);
    if tensors > MAX_TENSORS || entries > MAX_ENTRIES {
        return Err(format!(
            "{tensors} tensors and {entries} entries, over a limit"
        ));
    }
    let mut metadata = BTreeMap::new();
    for _ in 0..entries {
        let key = cursor.name()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("the key {key:?} comes twice"));
        }
    }
    let alignment = match metadata.get(ALIGNMENT_KEY) {
        None => ALIGNMENT,
        Some(GgufValue::U32(n)) if n.is_power_of_two() && *n <= 1 << 16 => u64::from(*n),
        Some(_) => return Err(format!("{ALIGNMENT_KEY} is no power of two")),
    };
    let mut found = Vec::new();
    for _ in 0..tensors {
        let name = cursor.name()?;
        let dimensions = cursor.u32()?;
        if dimensions == 0 || dimensions > MAX_DIMENSIONS {
            return Err(format!("tensor {name} has {dimensions} dimensions"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let n = cursor.u64()?;
            shape.push(usize::try_from(n).map_err(|_| format!("tensor {name} is too large"))?);
        }
        if shape.contains(&0) {
            return Err(format!("tensor {name} has a dimension of 0"));
        }
        shape.reverse();
        let (kind, offset) = (cursor.u32()?, cursor.u64()?);
        let kind = GgufType::from_id(kind)
            .ok_or_else(|| format!("tensor {name} has the type {kind}, which is not read"))?;
        found.push((GgufTensor { name, kind, shape }, offset));
    }
    let data = (cursor.at as u64).next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (tensor, offset) in found {
        let beyond = || format!("tensor {} is not within the file", tensor.name);
        let start = data.checked_add(offset).ok_or_else(beyond)?;
        let start = usize::try_from(start).map_err(|_| beyond())?;
        let end = tensor.bytes().and_then(|bytes| start.checked_add(bytes));
        if end.is_none_or(|end| end > length) || !offset.is_multiple_of(alignment) {
            return Err(beyond());
        }
        let name = tensor.name.clone();
        if tensors.insert(name.clone(), (tensor, start)).is_some() {
            return Err(format!("tensor {name} comes twice"));
        }
    }
    Ok((metadata, tensors))
}

impl Cursor<'_> {
    fn take(&mut self, n: usize) -> Result<&[u8], String> {
        let end = self
            .at
            .checked_add(n)
            .filter(|end| *end <= self.bytes.len());
        let end = end.ok_or("its header ends early, or is over a limit")?;
        let taken = self.bytes.get(self.at..end).unwrap_or_default();
        self.at = end;
        Ok(taken)
    }

    fn chunk<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.take(N)?;
        Ok(bytes.first_chunk().copied().unwrap_or([0; N]))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.chunk()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.chunk()?))
    }

    fn text(&mut self) -> Result<String, String> {
        let length = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let bytes = self.take(length)?.to_vec();
        String::from_utf8(bytes).map_err(|_| "a text is not UTF-8".to_owned())
    }

    fn name(&mut self) -> Result<String, String> {
        let name = self.text()?;
        match name.len() <= MAX_NAME {
            true => Ok(name),
            false => Err(format!(
                "a name of {} bytes, over the limit of {MAX_NAME}",
                name.len()
            )),
        }
    }

    fn value(&mut self, kind: u32) -> Result<GgufValue, String> {
        Ok(match kind {
            4 => GgufValue::U32(self.u32()?),
            5 => GgufValue::I32(self.u32()? as i32),
            6 => GgufValue::F32(f32::from_le_bytes(self.chunk()?)),
            7 => GgufValue::Bool(self.chunk::<1>()? != [0]),
            8 => GgufValue::Text(self.text()?),
            9 => self.array()?,
            10 => GgufValue::U64(self.u64()?),
            0 | 1 => GgufValue::Other(kind, self.take(1)?.to_vec()),
            2 | 3 => GgufValue::Other(kind, self.take(2)?.to_vec()),
            11 | 12 => GgufValue::Other(kind, self.take(8)?.to_vec()),
            _ => return Err(format!("a value of the type {kind}, which does not exist")),
        })
    }

    fn array(&mut self) -> Result<GgufValue, String> {
        let (kind, length) = (self.u32()?, self.u64()?);
        if length > MAX_ARRAY {
            return Err(format!(
                "an array of {length} values, over the limit of {MAX_ARRAY}"
            ));
        }
        let length = length as usize;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 => {
                let texts = (0..length).map(|_| self.text());
                return Ok(GgufValue::Texts(texts.collect::<Result<_, _>>()?));
            }
            10..=12 => 8,
            _ => return Err(format!("an array of the type {kind}, which is not read")),
        };
        let bytes = self.take(length * width)?;
        let words = || bytes.as_chunks::<4>().0.iter();
        Ok(match kind {
            4 => GgufValue::U32s(words().map(|it| u32::from_le_bytes(*it)).collect()),
            5 => GgufValue::I32s(words().map(|it| i32::from_le_bytes(*it)).collect()),
            6 => GgufValue::F32s(words().map(|it| f32::from_le_bytes(*it)).collect()),
            7 => GgufValue::Bools(bytes.iter().map(|it| *it != 0).collect()),
            _ => {
                let mut whole = kind.to_le_bytes().to_vec();
                whole.extend((length as u64).to_le_bytes());
                whole.extend(bytes);
                GgufValue::Other(9, whole)
            }
        })
    }
}
