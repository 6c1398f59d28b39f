//! Values on the stack of the machine, and their names for messages.

use std::fmt;

use super::names::Global;

/// A value on the stack; those that are large are indices into lists of the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PickleValue<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Text(&'a str),
    List,
    Global(Global),
    /// Indices into `kept` of the machine.
    Tuple(u32, u32),
    /// Index into `dicts`.
    Dict(u32),
    /// Index into `storages`.
    Storage(u32),
    /// Index into `tensors`.
    Tensor(u32),
}

impl fmt::Display for PickleValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PickleValue::None => f.write_str("None"),
            PickleValue::Bool => f.write_str("a truth value"),
            PickleValue::Int(number) => write!(f, "the number {number}"),
            PickleValue::Float => f.write_str("a fraction"),
            PickleValue::Text(text) => write!(f, "the text {text:?}"),
            PickleValue::List => f.write_str("a list"),
            PickleValue::Global(_) => f.write_str("a class or function"),
            PickleValue::Tuple(..) => f.write_str("a tuple"),
            PickleValue::Dict(_) => f.write_str("a dict"),
            PickleValue::Storage(_) => f.write_str("a storage"),
            PickleValue::Tensor(_) => f.write_str("a tensor"),
        }
    }
}
