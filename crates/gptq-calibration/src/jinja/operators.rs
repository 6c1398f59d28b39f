//! Operators whose meaning in Python differs from the library's. Instructions of a compiled
//! template are replaced by calls of these functions; their names are not identifiers, so no
//! template can shadow them with a variable.

use std::collections::{BTreeMap, BTreeSet};

use minijinja::machinery::{CompiledTemplate, Instruction, Instructions};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, Error, State, Value};

use super::python::{Text, float, refusal, type_name};
use super::{format, methods};

/// Instructions of the template and of its blocks.
pub(super) type Program<'s> = (Instructions<'s>, BTreeMap<&'s str, Instructions<'s>>);

/// Attribute names, and the filters that replace them.
const ATTRIBUTES: [(&str, &str); 11] = [
    ("copy", ".copy"),
    ("fromkeys", ".fromkeys"),
    ("get", ".get"),
    ("items", ".items"),
    ("keys", ".keys"),
    ("values", ".values"),
    ("clear", ".clear"),
    ("pop", ".pop"),
    ("popitem", ".popitem"),
    ("setdefault", ".setdefault"),
    ("update", ".update"),
];

/// Filter applied to the value that a loop iterates over.
const ITERATED: &str = ".iterated";

/// Adds the functions that [`exchange`] calls.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_function("~", concat);
    environment.add_function("+", add);
    environment.add_filter(ITERATED, iterated);
    environment.add_function("%", remainder);
    environment.add_function("[:]", slice);
    environment.add_function("<", |a: &Value, b: &Value| compare(a, b).map(|()| a < b));
    environment.add_function("<=", |a: &Value, b: &Value| compare(a, b).map(|()| a <= b));
    environment.add_function(">", |a: &Value, b: &Value| compare(a, b).map(|()| a > b));
    environment.add_function(">=", |a: &Value, b: &Value| compare(a, b).map(|()| a >= b));
    environment.add_function("._", |_: &Value, _: &Value| {
        Err::<Value, _>(refusal(
            "a chat template cannot store an attribute of a namespace that begins with an underscore",
        ))
    });
    for ((name, filter), known) in ATTRIBUTES.into_iter().zip(methods::attributes()) {
        debug_assert_eq!(name, known);
        environment.add_filter(filter, move |value: &Value| methods::attribute(value, name));
    }
}

/// Returns the template with Python's operators.
pub(super) fn exchange<'s>(template: &CompiledTemplate<'s>) -> Program<'s> {
    let blocks = template.blocks.iter();
    let blocks = blocks.map(|(name, block)| (*name, exchanged(block)));
    (exchanged(&template.instructions), blocks.collect())
}

/// Inserts the added instructions and adjusts the targets of jumps.
fn exchanged<'s>(original: &Instructions<'s>) -> Instructions<'s> {
    let before = added(original);
    let mut places = Vec::new();
    let mut place = 0;
    for index in 0.. {
        places.push(place);
        if original.get(index).is_none() {
            break;
        }
        let more = before.get(&index).map_or(0, Vec::len);
        place += u32::try_from(more).unwrap_or(u32::MAX) + 1;
    }
    let to = |target: u32| places.get(target as usize).copied().unwrap_or(target);
    let mut program = Instructions::new(original.name(), original.source());
    for index in 0.. {
        let Some(instruction) = original.get(index) else {
            break;
        };
        let call = |name| Instruction::CallFunction(name, Some(2));
        let instruction = match instruction {
            Instruction::StringConcat => call("~"),
            Instruction::Add => call("+"),
            Instruction::Rem => call("%"),
            Instruction::Lt => call("<"),
            Instruction::Lte => call("<="),
            Instruction::Gt => call(">"),
            Instruction::Gte => call(">="),
            Instruction::Slice => Instruction::CallFunction("[:]", Some(4)),
            Instruction::SetAttr(name) if name.starts_with('_') => call("._"),
            Instruction::GetAttr(name) => {
                let known = ATTRIBUTES.iter().find(|(known, _)| known == name);
                match known {
                    Some((_, filter)) => Instruction::ApplyFilter(filter, Some(1), u8::MAX),
                    None => instruction.clone(),
                }
            }
            Instruction::Iterate(target) => Instruction::Iterate(to(*target)),
            Instruction::Jump(target) => Instruction::Jump(to(*target)),
            Instruction::JumpIfFalse(target) => Instruction::JumpIfFalse(to(*target)),
            Instruction::JumpIfFalseOrPop(target) => Instruction::JumpIfFalseOrPop(to(*target)),
            Instruction::JumpIfTrueOrPop(target) => Instruction::JumpIfTrueOrPop(to(*target)),
            Instruction::BuildMacro(name, at, flags) => {
                Instruction::BuildMacro(name, to(*at), *flags)
            }
            other => other.clone(),
        };
        let mut add = |instruction| match (original.get_span(index), original.get_line(index)) {
            (Some(span), _) => program.add_with_span(instruction, span),
            (None, Some(line)) => {
                program.add_with_line(instruction, u16::try_from(line).unwrap_or(u16::MAX))
            }
            (None, None) => program.add(instruction),
        };
        for more in before.get(&index).into_iter().flatten() {
            add(more.clone());
        }
        add(instruction);
    }
    program
}

/// Returns the instructions to insert before those of these numbers: a check of the value a loop
/// iterates over; and for a macro, including the body of a call block, the capture of every
/// variable that it names, as the library misses those that are sliced and namespaces that are
/// assigned to.
fn added<'s>(original: &Instructions<'s>) -> BTreeMap<u32, Vec<Instruction<'s>>> {
    let mut added: BTreeMap<u32, Vec<Instruction<'s>>> = BTreeMap::new();
    let mut closure = None;
    for index in 0.. {
        match original.get(index) {
            Some(Instruction::PushLoop(_)) => {
                let look = Instruction::ApplyFilter(ITERATED, Some(1), u8::MAX);
                added.insert(index, vec![look]);
            }
            Some(Instruction::GetClosure) => closure = Some(index),
            Some(Instruction::BuildMacro(_, body, _)) => {
                let end = closure.take().unwrap_or(index);
                let named = (*body..end).filter_map(|at| match original.get(at) {
                    Some(Instruction::Lookup(name)) if *name != "caller" => Some(*name),
                    _ => None,
                });
                let named: BTreeSet<&'s str> = named.collect();
                added.insert(end, named.into_iter().map(Instruction::Enclose).collect());
            }
            Some(_) => {}
            None => break,
        }
    }
    added
}

/// Checks the value of a loop: the library accepts none as an empty list.
fn iterated(value: &Value) -> Result<Value, Error> {
    match value.is_none() {
        true => Err(refusal("NoneType is not iterable")),
        false => Ok(value.clone()),
    }
}

/// `a + b`: if one of two strings is marked as safe, the other is escaped, as by markupsafe.
fn add(state: &mut State<'_, '_>, a: &Value, b: &Value) -> Result<Value, Error> {
    let unsupported = || {
        let (a, b) = (type_name(a), type_name(b));
        refusal(format!("unsupported operand types for +: {a} and {b}"))
    };
    let is_list = |value: &Value| matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    if let (Some(left), Some(right)) = (a.as_str(), b.as_str()) {
        if !a.is_safe() && !b.is_safe() {
            let mut text = Text::new(state);
            text.push(left)?;
            text.push(right)?;
            return Ok(text.finish().into());
        }
        let left = state.apply_filter("e", std::slice::from_ref(a))?;
        let right = state.apply_filter("e", std::slice::from_ref(b))?;
        let mut text = Text::new(state);
        text.push_str(&left)?;
        text.push_str(&right)?;
        return Ok(Value::from_safe_string(text.finish()));
    }
    if is_number(a) && is_number(b) {
        if float(a).is_some() || float(b).is_some() {
            return Ok((f64::try_from(a.clone())? + f64::try_from(b.clone())?).into());
        }
        let sum = i128::try_from(a.clone())?.checked_add(i128::try_from(b.clone())?);
        return sum.map(Value::from).ok_or_else(unsupported);
    }
    if !is_list(a) || !is_list(b) || a.is_tuple() != b.is_tuple() {
        return Err(unsupported());
    }
    let items: Vec<Value> = a.try_iter()?.chain(b.try_iter()?).collect();
    state.consume_fuel(items.len() as u64)?;
    Ok(match a.is_tuple() {
        true => Value::from(Tuple::from(items)),
        false => Value::from(items),
    })
}

fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

/// `a ~ b`.
fn concat(state: &State<'_, '_>, a: &Value, b: &Value) -> Result<Value, Error> {
    let mut text = Text::new(state);
    text.push_str(a)?;
    text.push_str(b)?;
    Ok(text.finish().into())
}

/// `a % b`: string formatting, or the remainder of a division.
fn remainder(state: &State<'_, '_>, a: &Value, b: &Value) -> Result<Value, Error> {
    if let Some(text) = a.as_str() {
        return format::percent(state, text, b).map(Value::from);
    }
    let unsupported = || {
        let (a, b) = (type_name(a), type_name(b));
        refusal(format!("unsupported operand types for %: {a} and {b}"))
    };
    if !is_number(a) || !is_number(b) {
        return Err(unsupported());
    }
    if !b.is_true() {
        return Err(refusal("modulo by zero"));
    }
    if float(a).is_none() && float(b).is_none() {
        let (a, b) = (i128::try_from(a.clone())?, i128::try_from(b.clone())?);
        let rest = a.wrapping_rem(b);
        let other_sign = rest != 0 && (rest < 0) != (b < 0);
        return Ok(Value::from(if other_sign { rest + b } else { rest }));
    }
    let (a, b) = (f64::try_from(a.clone())?, f64::try_from(b.clone())?);
    let rest = a % b;
    let other_sign = rest != 0.0 && (rest < 0.0) != (b < 0.0);
    Ok(Value::from(if other_sign { rest + b } else { rest }))
}

/// Refuses values that Python cannot order.
fn compare(a: &Value, b: &Value) -> Result<(), Error> {
    let class = |value: &Value| match value.kind() {
        ValueKind::Number | ValueKind::Bool => 1,
        ValueKind::String => 2,
        ValueKind::Seq | ValueKind::Iterable if value.is_tuple() => 3,
        ValueKind::Seq | ValueKind::Iterable => 4,
        _ => 0,
    };
    match class(a) == class(b) && class(a) > 0 {
        true => Ok(()),
        false => {
            let (a, b) = (type_name(a), type_name(b));
            Err(refusal(format!("{a} and {b} are not ordered")))
        }
    }
}

/// `value[start:stop:step]`: a string, list or tuple like the original.
fn slice(
    state: &State<'_, '_>,
    value: &Value,
    start: &Value,
    stop: &Value,
    step: &Value,
) -> Result<Value, Error> {
    let bound = |bound: &Value| match bound.is_none() {
        true => Ok(None),
        false if bound.kind() == ValueKind::Bool || bound.is_integer() => {
            // Bounds beyond the range are equivalent to the end.
            let number = i128::try_from(bound.clone())?.clamp(i64::MIN.into(), i64::MAX.into());
            Ok(i64::try_from(number).ok())
        }
        false => {
            let kind = type_name(bound);
            Err(refusal(format!(
                "a slice's bounds must be integers, not {kind}"
            )))
        }
    };
    let (start, stop) = (bound(start)?, bound(stop)?);
    let step = bound(step)?.unwrap_or(1);
    if step == 0 {
        return Err(refusal("a slice's step cannot be zero"));
    }
    if let Some(text) = value.as_str() {
        state.consume_fuel(text.len() as u64 / 64)?;
        let chars: Vec<char> = text.chars().collect();
        let taken = places(chars.len(), start, stop, step).filter_map(|i| chars.get(i));
        return Ok(taken.collect::<String>().into());
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            state.consume_fuel(items.len() as u64)?;
            let taken =
                places(items.len(), start, stop, step).filter_map(|i| items.get(i).cloned());
            let taken: Vec<Value> = taken.collect();
            Ok(match value.is_tuple() {
                true => Value::from(Tuple::from(taken)),
                false => Value::from(taken),
            })
        }
        ValueKind::Undefined => Err(refusal("an undefined value cannot be sliced")),
        // As for any other missing item.
        _ => Ok(Value::UNDEFINED),
    }
}

/// Python's `range(*slice(start, stop, step).indices(length))`.
fn places(
    length: usize,
    start: Option<i64>,
    stop: Option<i64>,
    step: i64,
) -> impl Iterator<Item = usize> {
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    let (least, most) = match step > 0 {
        true => (0, length),
        false => (-1, length - 1),
    };
    let place = |bound: i64| match bound < 0 {
        true => bound.saturating_add(length).max(least),
        false => bound.min(most),
    };
    let (first, last) = match step > 0 {
        true => (least, most),
        false => (most, least),
    };
    let mut at = start.map_or(first, place);
    let stop = stop.map_or(last, place);
    std::iter::from_fn(move || {
        let goes_on = if step > 0 { at < stop } else { at > stop };
        let now = goes_on.then_some(at)?;
        at = at.saturating_add(step);
        usize::try_from(now).ok()
    })
}
