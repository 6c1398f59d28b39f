//! The pickle inside a PyTorch file, read as a list of tensors. Nothing in it is ever executed.
//!
//! A pickle is a program for a stack machine. `torch.save` writes protocol 2: a dict (or
//! `OrderedDict`) from names to calls
//!
//! ```text
//! torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)
//! ```
//!
//! where `storage` is the persistent id `("storage", torch.HalfStorage, key, device, elements)`.
//! The interpreter knows only these opcodes and globals, and refuses every other opcode and global
//! by name. A global is never looked up: it is one of a closed list of words. Opcodes: Python's
//! `pickletools.py`.
//!
//! Limits: [`MAX_BYTES`] of pickle, [`MAX_STACK`] values on the stack and [`MAX_VALUES`] kept by
//! tuples, dicts and the memo together, [`MAX_MARKS`] deep, [`MAX_TENSORS`], [`MAX_DIMENSIONS`],
//! [`MAX_NAME`] bytes in a name. Values are small numbers and borrowed text, so memory stays under
//! 128 MiB.

mod names;
mod operands;
mod value;

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::Dtype;

use names::{Global, opcode_name};
use operands::{MAX_NAME, Operands, Step, utf8};
use value::PickleValue;

/// Maximum size of a pickle; that of a 7B model's shard has 30 kB.
const MAX_BYTES: usize = 16 << 20;
const MAX_STACK: usize = 1 << 16;
const MAX_VALUES: usize = 1 << 20;
const MAX_MARKS: usize = 64;
const MAX_TENSORS: usize = 1 << 16;
const MAX_DIMENSIONS: usize = 8;

/// One tensor that the pickle describes, not yet checked against the storage.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TorchTensor<'a> {
    pub(crate) storage: Storage<'a>,
    /// Offset of the first element in the storage, in elements.
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    /// Strides in elements.
    pub(crate) strides: Vec<usize>,
}

/// A file of the archive that holds the elements of tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Storage<'a> {
    pub(crate) dtype: Dtype,
    /// Name under `data/` in the archive.
    pub(crate) key: &'a str,
    /// Length in elements.
    pub(crate) elements: usize,
}

/// Tensors by name; the last of several with the same name counts, as in Python.
pub(crate) type StateDict<'a> = BTreeMap<&'a str, TorchTensor<'a>>;

/// Reads a pickle whose top is a dict, and returns its entries that are tensors. The error is a
/// sentence.
pub(crate) fn read(pickle: &[u8]) -> Result<StateDict<'_>, String> {
    if pickle.len() > MAX_BYTES {
        return Err(format!(
            "its pickle has {} bytes, over {MAX_BYTES}",
            pickle.len()
        ));
    }
    let mut machine = Machine {
        input: Operands(pickle),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: BTreeMap::new(),
        kept: Vec::new(),
        dicts: Vec::new(),
        entries: 0,
        tensors: Vec::new(),
        storages: Vec::new(),
    };
    let top = machine.run()?;
    machine.state_dict(top)
}

struct Machine<'a> {
    input: Operands<'a>,
    stack: Vec<PickleValue<'a>>,
    /// Stack heights at the marks.
    marks: Vec<usize>,
    memo: BTreeMap<u32, PickleValue<'a>>,
    /// Elements of all tuples.
    kept: Vec<PickleValue<'a>>,
    dicts: Vec<Vec<(PickleValue<'a>, PickleValue<'a>)>>,
    /// Number of entries of all dicts.
    entries: usize,
    storages: Vec<Storage<'a>>,
    tensors: Vec<TorchTensor<'a>>,
}

const BEYOND: &str = "its pickle pops from an empty stack";
/// Message for a handle without a value, which only a bug in this interpreter could cause.
const LOST: &str = "its pickle lost a value";

impl<'a> Machine<'a> {
    /// Runs until STOP; returns the top of the stack.
    fn run(&mut self) -> Step<PickleValue<'a>> {
        if self.input.byte()? != 0x80 {
            return Err("its pickle does not start with a protocol number".into());
        }
        match self.input.byte()? {
            2 => {}
            n => {
                return Err(format!("its pickle has protocol {n}; torch.save writes 2"));
            }
        }
        loop {
            let opcode = self.input.byte()?;
            match opcode {
                b'.' => return self.pop(),
                b'(' => self.mark()?,
                b'N' => self.push(PickleValue::None)?,
                0x88 | 0x89 => self.push(PickleValue::Bool)?,
                b'K' => {
                    let [n] = self.input.array()?;
                    self.push(PickleValue::Int(n.into()))?;
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.input.array()?);
                    self.push(PickleValue::Int(n.into()))?;
                }
                b'J' => {
                    let n = i32::from_le_bytes(self.input.array()?);
                    self.push(PickleValue::Int(n.into()))?;
                }
                0x8a => {
                    let n = self.input.long()?;
                    self.push(PickleValue::Int(n))?;
                }
                b'G' => {
                    self.input.bytes(8)?;
                    self.push(PickleValue::Float)?;
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.input.array()?);
                    self.text(length as usize)?;
                }
                b'U' => {
                    let [length] = self.input.array()?;
                    self.text(length.into())?;
                }
                b'c' => self.global()?,
                b'Q' => self.persistent()?,
                b')' => self.push(PickleValue::Tuple(0, 0))?,
                b't' => {
                    let elements = self.since_mark()?;
                    self.tuple(elements)?;
                }
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84);
                    let start = self.height(count)?;
                    self.tuple(start..self.stack.len())?;
                }
                b']' => self.push(PickleValue::List)?,
                b'a' => {
                    self.pop()?;
                    self.expect_list()?;
                }
                b'e' => {
                    let elements = self.since_mark()?;
                    self.stack.truncate(elements.start);
                    self.expect_list()?;
                }
                b'}' => self.dict()?,
                b's' => {
                    let start = self.height(2)?;
                    self.set_items(start..self.stack.len())?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.set_items(items)?;
                }
                b'R' => self.call()?,
                b'b' => self.build()?,
                b'q' => {
                    let [at] = self.input.array()?;
                    self.put(at.into())?;
                }
                b'r' => {
                    let at = u32::from_le_bytes(self.input.array()?);
                    self.put(at)?;
                }
                b'h' => {
                    let [at] = self.input.array()?;
                    self.get(at.into())?;
                }
                b'j' => {
                    let at = u32::from_le_bytes(self.input.array()?);
                    self.get(at)?;
                }
                _ => {
                    return Err(format!(
                        "its pickle uses the opcode {}, which torch.save does not write",
                        opcode_name(opcode)
                    ));
                }
            }
        }
    }

    fn text(&mut self, length: usize) -> Step {
        if length > MAX_NAME {
            return Err(format!("its pickle has text of {length} bytes"));
        }
        let text = utf8(self.input.bytes(length)?)?;
        if text.contains(char::is_control) {
            return Err(format!("its pickle has the text {text:?}"));
        }
        self.push(PickleValue::Text(text))
    }

    fn push(&mut self, value: PickleValue<'a>) -> Step {
        if self.stack.len() == MAX_STACK {
            return Err(format!("its pickle stacks over {MAX_STACK} values"));
        }
        self.stack.push(value);
        Ok(())
    }

    /// Returns the stack's height without its top `count` values, which must be above the last
    /// mark.
    fn height(&self, count: usize) -> Step<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(height) if height >= floor => Ok(height),
            _ => Err(BEYOND.into()),
        }
    }

    fn pop(&mut self) -> Step<PickleValue<'a>> {
        let height = self.height(1)?;
        let top = self.stack.drain(height..).next();
        top.ok_or_else(|| BEYOND.into())
    }

    fn top(&self) -> Step<PickleValue<'a>> {
        let height = self.height(1)?;
        self.stack.get(height).copied().ok_or_else(|| BEYOND.into())
    }

    fn mark(&mut self) -> Step {
        if self.marks.len() == MAX_MARKS {
            return Err(format!("its pickle nests over {MAX_MARKS} deep"));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn since_mark(&mut self) -> Step<Range<usize>> {
        let start = self.marks.pop().ok_or("its pickle lacks a mark")?;
        Ok(start..self.stack.len())
    }

    /// Checks that `more` values may be stored beyond the stack.
    fn room(&self, more: usize) -> Step {
        let held = self.kept.len() + self.memo.len() + 2 * self.entries;
        match held + more <= MAX_VALUES {
            true => Ok(()),
            false => Err(format!("its pickle holds over {MAX_VALUES} values")),
        }
    }

    fn tuple(&mut self, elements: Range<usize>) -> Step {
        self.room(elements.len())?;
        let start = self.kept.len() as u32;
        self.kept.extend(self.stack.drain(elements));
        self.push(PickleValue::Tuple(start, self.kept.len() as u32))
    }

    fn tuple_of(&self, value: PickleValue<'a>) -> Step<&[PickleValue<'a>]> {
        match value {
            PickleValue::Tuple(start, end) => {
                let elements = self.kept.get(start as usize..end as usize);
                elements.ok_or_else(|| LOST.into())
            }
            other => Err(format!("its pickle has {other} where a tuple is expected")),
        }
    }

    fn expect_list(&self) -> Step {
        match self.top()? {
            PickleValue::List => Ok(()),
            other => Err(format!("its pickle appends to {other}")),
        }
    }

    fn dict(&mut self) -> Step {
        if self.dicts.len() == MAX_TENSORS {
            return Err(format!("its pickle has over {MAX_TENSORS} dicts"));
        }
        self.dicts.push(Vec::new());
        self.push(PickleValue::Dict(self.dicts.len() as u32 - 1))
    }

    fn set_items(&mut self, items: Range<usize>) -> Step {
        if !items.len().is_multiple_of(2) {
            return Err("its pickle has a key without a value".into());
        }
        self.room(items.len())?;
        let pairs: Vec<_> = self.stack.drain(items).collect();
        let PickleValue::Dict(dict) = self.top()? else {
            return Err("its pickle sets items of a value that is not a dict".into());
        };
        self.entries += pairs.len() / 2;
        let pairs = pairs.as_chunks().0.iter();
        let dict = self.dicts.get_mut(dict as usize).ok_or(LOST)?;
        dict.extend(pairs.map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn put(&mut self, at: u32) -> Step {
        self.room(1)?;
        let top = self.top()?;
        self.memo.insert(at, top);
        Ok(())
    }

    fn get(&mut self, at: u32) -> Step {
        match self.memo.get(&at) {
            Some(&value) => self.push(value),
            None => Err(format!("its pickle refers to {at}, which it never defined")),
        }
    }

    fn global(&mut self) -> Step {
        let (module, name) = (self.input.line()?, self.input.line()?);
        self.push(PickleValue::Global(Global::named(module, name)?))
    }

    /// `("storage", type, key, device, elements)`.
    fn persistent(&mut self) -> Step {
        let id = self.pop()?;
        let &[
            PickleValue::Text("storage"),
            PickleValue::Global(Global::Storage(dtype)),
            PickleValue::Text(key),
            PickleValue::Text(_),
            PickleValue::Int(elements),
        ] = self.tuple_of(id)?
        else {
            return Err("its pickle has a persistent id that is not a storage".into());
        };
        self.room(1)?;
        if self.storages.len() == MAX_TENSORS {
            return Err(format!("its pickle has over {MAX_TENSORS} storages"));
        }
        self.storages.push(Storage {
            dtype,
            key,
            elements: size(elements)?,
        });
        self.push(PickleValue::Storage(self.storages.len() as u32 - 1))
    }

    fn call(&mut self) -> Step {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let PickleValue::Global(callee) = callee else {
            return Err(format!("its pickle calls {callee}"));
        };
        let arguments = self.tuple_of(arguments)?;
        match (callee, arguments) {
            (Global::OrderedDict, []) => self.dict(),
            (
                Global::RebuildTensor,
                &[
                    PickleValue::Storage(storage),
                    PickleValue::Int(offset),
                    shape,
                    strides,
                    _,
                    _,
                    ..,
                ],
            ) => {
                let tensor = TorchTensor {
                    storage: *self.storages.get(storage as usize).ok_or(LOST)?,
                    offset: size(offset)?,
                    shape: self.sizes(shape)?,
                    strides: self.sizes(strides)?,
                };
                if tensor.shape.len() != tensor.strides.len() {
                    return Err(
                        "its pickle has a tensor with a different number of strides and dimensions"
                            .into(),
                    );
                }
                if self.tensors.len() == MAX_TENSORS {
                    return Err(format!("its pickle has over {MAX_TENSORS} tensors"));
                }
                self.tensors.push(tensor);
                self.push(PickleValue::Tensor(self.tensors.len() as u32 - 1))
            }
            (Global::RebuildParameter, &[tensor @ PickleValue::Tensor(_), _, _])
            | (Global::RebuildParameterWithState, &[tensor @ PickleValue::Tensor(_), _, _, _]) => {
                self.push(tensor)
            }
            (callee, _) => {
                let callee = PickleValue::Global(callee);
                Err(format!("its pickle calls {callee} with other arguments"))
            }
        }
    }

    fn sizes(&self, value: PickleValue<'a>) -> Step<Vec<usize>> {
        let values = self.tuple_of(value)?;
        if values.len() > MAX_DIMENSIONS {
            return Err(format!(
                "its pickle has a tensor of {} dimensions",
                values.len()
            ));
        }
        values
            .iter()
            .map(|value| match value {
                PickleValue::Int(n) => size(*n),
                other => Err(format!("its pickle has {other} for a size")),
            })
            .collect()
    }

    /// Drops state set on a dict, such as `_metadata` on a state dict.
    fn build(&mut self) -> Step {
        self.pop()?;
        match self.top()? {
            PickleValue::Dict(_) => Ok(()),
            other => Err(format!("its pickle sets the state of {other}")),
        }
    }

    fn state_dict(&self, top: PickleValue<'a>) -> Step<StateDict<'a>> {
        let PickleValue::Dict(dict) = top else {
            return Err("its pickle has no dict of tensors".into());
        };
        let mut state = StateDict::new();
        for entry in self.dicts.get(dict as usize).ok_or(LOST)? {
            match *entry {
                (PickleValue::Text(name), PickleValue::Tensor(tensor)) => {
                    let tensor = self.tensors.get(tensor as usize).ok_or(LOST)?;
                    state.insert(name, tensor.clone());
                }
                // A number or a list beside the weights.
                (PickleValue::Text(_), _) => {}
                (key, _) => return Err(format!("its dict has {key} as a key, which is not text")),
            }
        }
        match state.is_empty() {
            true => Err(
                "its pickle holds no tensor by name; save the state dict itself, not what \
                         holds it"
                    .into(),
            ),
            false => Ok(state),
        }
    }
}

fn size(value: i64) -> Step<usize> {
    usize::try_from(value).map_err(|_| format!("its pickle has a size or offset of {value}"))
}

#[cfg(test)]
pub(crate) mod tests;
