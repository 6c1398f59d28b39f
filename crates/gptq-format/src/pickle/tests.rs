//! Pickles written as opcodes, valid and hostile.

use proptest::prelude::*;

use super::*;

/// Builder of a pickle.
#[derive(Clone, Default)]
pub(crate) struct Pickle(pub(crate) Vec<u8>);

impl Pickle {
    pub(crate) fn new() -> Pickle {
        Pickle(vec![0x80, 2])
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Pickle {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn text(self, text: &str) -> Pickle {
        let length = (text.len() as u32).to_le_bytes();
        self.raw(b"X").raw(&length).raw(text.as_bytes())
    }

    fn int(self, n: i32) -> Pickle {
        self.raw(b"J").raw(&n.to_le_bytes())
    }

    fn global(self, module: &str, name: &str) -> Pickle {
        self.raw(format!("c{module}\n{name}\n").as_bytes())
    }

    fn ints(self, values: &[i32]) -> Pickle {
        let marked = self.raw(b"(");
        values.iter().fold(marked, |p, &n| p.int(n)).raw(b"t")
    }

    /// Appends `_rebuild_tensor_v2` of a half storage of `elements`.
    pub(crate) fn tensor(
        self,
        key: &str,
        elements: i32,
        offset: i32,
        shape: &[i32],
        strides: &[i32],
    ) -> Pickle {
        self.global("torch._utils", "_rebuild_tensor_v2")
            .raw(b"((")
            .text("storage")
            .global("torch", "HalfStorage")
            .text(key)
            .text("cpu")
            .int(elements)
            .raw(b"tQ")
            .int(offset)
            .ints(shape)
            .ints(strides)
            .raw(b"\x89")
            .global("collections", "OrderedDict")
            .raw(b")RtR")
    }

    fn refusal(&self) -> String {
        read(&self.0).expect_err("it was read")
    }
}

/// Returns `{"w": tensor}`.
fn one() -> Pickle {
    Pickle::new()
        .raw(b"}q\0")
        .text("w")
        .tensor("0", 6, 0, &[2, 3], &[3, 1])
        .raw(b"s.")
}

#[test]
fn a_state_dict_is_read_as_tensors_by_name() {
    let pickle = one().0;
    let state = read(&pickle).unwrap();
    let expected = TorchTensor {
        storage: Storage {
            dtype: Dtype::F16,
            key: "0",
            elements: 6,
        },
        offset: 0,
        shape: vec![2, 3],
        strides: vec![3, 1],
    };
    assert_eq!(state, StateDict::from([("w", expected)]));
}

#[test]
fn a_global_that_is_not_known_is_refused_by_name() {
    for (module, name) in [
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch", "QInt8Storage"),
        ("", ""),
    ] {
        let line = Pickle::new()
            .global(module, name)
            .raw(b"X\x01\0\0\0a\x85R.")
            .refusal();
        assert!(line.contains(&format!("{module}.{name}")), "{line}");
        assert!(line.contains("nothing was executed"), "{line}");
    }
}

#[test]
fn every_opcode_torch_save_does_not_write_is_refused_by_name() {
    let known = b".(NKMJGXUcQ)t]ae}suRbqrhj\x85\x86\x87\x88\x89\x8a";
    for opcode in 0..=255u8 {
        let line = Pickle::new().raw(&[opcode]).refusal();
        let refused = line.contains("torch.save does not write");
        assert_eq!(refused, !known.contains(&opcode), "{opcode:#04x}: {line}");
    }
    let line = Pickle::new().raw(b"c__main__\nX\n)\x81.").refusal();
    assert!(line.contains("__main__.X"), "{line}");
    let line = Pickle::new().raw(b"}}\x93").refusal();
    assert!(line.contains("STACK_GLOBAL"), "{line}");
}

#[test]
fn calls_with_other_arguments_are_refused() {
    let dict = Pickle::new().global("collections", "OrderedDict");
    for (pickle, word) in [
        (
            dict.clone().raw(b"K\x01\x85R."),
            "calls a class or function with other arguments",
        ),
        (dict.clone().raw(b"NR."), "tuple"),
        (Pickle::new().raw(b"N)R."), "calls None"),
        (
            Pickle::new().global("torch", "HalfStorage").raw(b")R."),
            "calls a class or function",
        ),
        (Pickle::new().raw(b"NQ."), "tuple"),
        (Pickle::new().raw(b")Q."), "not a storage"),
        (
            Pickle::new()
                .raw(b"}")
                .text("w")
                .tensor("0", 6, -1, &[2], &[1])
                .raw(b"s."),
            "-1",
        ),
        (
            Pickle::new()
                .raw(b"}")
                .text("w")
                .tensor("0", 6, 0, &[2, 3], &[1])
                .raw(b"s."),
            "strides",
        ),
        (
            Pickle::new()
                .raw(b"}")
                .text("w")
                .tensor("0", 6, 0, &[1; 9], &[1; 9])
                .raw(b"s."),
            "9 dimensions",
        ),
    ] {
        let line = pickle.refusal();
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}

#[test]
fn limits_hold_where_memory_would_grow() {
    let repeated = |bytes: &[u8], times: usize| Pickle::new().raw(&bytes.repeat(times)).refusal();
    for (line, word) in [
        (repeated(b"(", 1000), "64 deep"),
        (repeated(b"N", 1 << 17), "stacks over"),
        (repeated(b"}0", 1), "POP"),
        // An empty dict, appended to a list again and again.
        (
            Pickle::new()
                .raw(b"]")
                .raw(&b"}a".repeat(1 << 17))
                .refusal(),
            "dicts",
        ),
        // The same tuple, doubled and dropped.
        (
            Pickle::new()
                .raw(b"]")
                .raw(&b"NNN\x87a".repeat(1 << 19))
                .refusal(),
            "values",
        ),
        (
            Pickle::new().raw(&[0; MAX_BYTES]).refusal(),
            "its pickle has 16777218 bytes",
        ),
        (
            Pickle::new().raw(b"X\xff\xff\xff\xff").refusal(),
            "text of 4294967295 bytes",
        ),
        (
            Pickle::new().raw(b"c").raw(&[b'a'; 600]).refusal(),
            "name over 512",
        ),
        (
            Pickle::new().raw(b"\x8a\xff").raw(&[1; 255]).refusal(),
            "64 bits",
        ),
    ] {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
    let many = (0..1u32 << 21).fold(Pickle::new().raw(b"N"), |p, at| {
        p.raw(b"r").raw(&at.to_le_bytes())
    });
    assert!(many.refusal().contains("values"));
}

#[test]
fn whatever_is_no_dict_of_tensors_is_refused() {
    for (pickle, word) in [
        (Pickle::new().raw(b"N."), "no dict"),
        (Pickle::new().raw(b"}."), "no tensor by name"),
        (Pickle::new().raw(b"}K\x01Ns."), "not text"),
        (Pickle::new().raw(b"}NNNu."), "mark"),
        (Pickle::new().raw(b"}(NNNu."), "without a value"),
        (Pickle::new().raw(b"(."), "empty stack"),
        (Pickle::new().raw(b"h\x05."), "never defined"),
        (Pickle::new().raw(b"}X\x02\0\0\0a\nNs."), "a\\n"),
        (Pickle(vec![0x80, 4, b'.']), "protocol 4"),
        (Pickle(b"}.".to_vec()), "protocol number"),
        (Pickle(vec![]), "truncated"),
    ] {
        let line = pickle.refusal();
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}

proptest! {
    #[test]
    fn any_bytes_end_in_tensors_or_a_sentence(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = read(&[&[0x80, 2], &bytes[..]].concat());
    }

    #[test]
    fn any_damage_to_a_real_pickle_ends_in_tensors_or_a_sentence(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = one().0;
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let _ = read(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn known_opcodes_in_any_order_end_in_tensors_or_a_sentence(
        opcodes in prop::collection::vec(
            prop::sample::select(&b"(N)t]ae}suRbQ\x85\x86\x87\x88.q\x01h\x01K\x02"[..]), 0..300)
    ) {
        let _ = read(&[&[0x80, 2], &opcodes[..]].concat());
    }
}
