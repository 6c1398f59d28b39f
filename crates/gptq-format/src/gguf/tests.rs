//! Files that are written are read back, by this crate and by a reader of blocks written from their description; damaged files end
//! in one line.

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::formats::random_linear::{random_linear, shape};

/// Dequantizes rows as ggml's description of the blocks has it, one element at a time.
fn described(kind: GgufType, bytes: &[u8], n_out: usize, n_in: usize) -> Vec<f32> {
    let size = kind.block().1;
    let mut all = Vec::new();
    for o in 0..n_out {
        for i in 0..n_in {
            let block = &bytes[(o * n_in + i) / 32 * size..][..size];
            let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
            let j = i % 32;
            let nibble = |qs: &[u8]| if j < 16 { qs[j] & 15 } else { qs[j - 16] >> 4 };
            let q = match kind {
                GgufType::Q4_0 => f32::from(nibble(&block[2..])) - 8.0,
                GgufType::Q5_0 => {
                    let fifth = block[2 + j / 8] >> (j % 8) & 1;
                    f32::from(nibble(&block[6..]) | fifth << 4) - 16.0
                }
                _ => f32::from(block[2 + j] as i8),
            };
            all.push(d * q);
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn blocks_hold_the_weights_to_the_bit(
        bits in prop::sample::select(Bits::ALL.to_vec()),
        columns in prop::sample::select(vec![32usize, 64, 96, 128]),
        groups in 1usize..4,
        row in any::<bool>(),
        sym in any::<bool>(),
        heads in prop::sample::select(vec![0usize, 2, 4]),
        seed in any::<u64>(),
    ) {
        let shape = shape(bits, columns, groups, row);
        let (n_in, n_out) = (shape.in_features, shape.out_features);
        let Ok(kind) = GgufType::of_linear(&shape, sym, false) else {
            prop_assert!(bits == Bits::Eight && !sym);
            return Ok(());
        };
        let rows = if heads == 0 { GgufRows::Same } else { GgufRows::Paired(heads) };
        let linear = random_linear(&shape, sym, seed);
        let bytes = encode_blocks(&linear.pack(), kind, rows, "m").unwrap();
        let expected = linear.dequantize();
        let found = described(kind, &bytes, n_out, n_in);
        for (at, source) in rows.sources(n_out).into_iter().enumerate() {
            for i in 0..n_in {
                // A zero may lose its sign, as a code less its zero point has none.
                prop_assert_eq!(found[at * n_in + i], expected[source * n_in + i]);
            }
        }
        let decoded = decode_blocks(&bytes, kind, rows, [n_out, n_in], "m").unwrap();
        prop_assert_eq!(decoded.dequantize(), expected);
    }

    #[test]
    fn any_bytes_end_in_a_file_or_one_line(mut bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..400) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.gguf");
        let file = written(&dir.path().join("whole.gguf"));
        let at = at.min(file.len());
        let mut damaged = file[..at].to_vec();
        damaged.append(&mut bytes);
        damaged.extend(file.get(damaged.len()..).unwrap_or_default());
        std::fs::write(&path, damaged).unwrap();
        if let Err(error) = GgufFile::open(&path) {
            let line = error.to_string();
            prop_assert!(line.contains("m.gguf") && !line.contains('\n'), "{}", line);
        }
    }
}

/// A small file with metadata of every kind.
fn written(path: &std::path::Path) -> Vec<u8> {
    let tensors = [
        GgufTensor {
            name: "a.weight".into(),
            kind: GgufType::Q4_0,
            shape: vec![2, 64],
        },
        GgufTensor {
            name: "b.weight".into(),
            kind: GgufType::F32,
            shape: vec![3],
        },
    ];
    let writer = GgufWriter::create(path, &metadata(), &tensors).unwrap();
    writer.write("b.weight", &[1; 12]).unwrap();
    writer.write("a.weight", &[2; 72]).unwrap();
    writer.finish().unwrap();
    std::fs::read(path).unwrap()
}

fn metadata() -> Vec<(String, GgufValue)> {
    let texts = vec!["one".to_owned(), "zwei".to_owned()];
    [
        ("general.architecture", GgufValue::Text("llama".into())),
        ("a.u32", GgufValue::U32(7)),
        ("a.i32", GgufValue::I32(-7)),
        ("a.f32", GgufValue::F32(0.5)),
        ("a.u64", GgufValue::U64(1 << 40)),
        ("a.bool", GgufValue::Bool(true)),
        ("a.u32s", GgufValue::U32s(vec![1, 2])),
        ("a.i32s", GgufValue::I32s(vec![1, -2])),
        ("a.f32s", GgufValue::F32s(vec![1.5])),
        ("a.bools", GgufValue::Bools(vec![true, false])),
        ("a.texts", GgufValue::Texts(texts)),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

#[test]
fn parts_of_a_tensor_come_in_any_order_and_make_up_all_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let experts = GgufTensor {
        name: "experts".into(),
        kind: GgufType::Q4_0,
        shape: vec![3, 2, 64],
    };
    assert_eq!(experts.bytes(), Some(3 * 72));
    let writer = GgufWriter::create(&path, &[], &[experts]).unwrap();
    writer.write_at("experts", 144, &[3; 72]).unwrap();
    writer.write_at("experts", 0, &[1; 72]).unwrap();
    for (name, start, length) in [
        ("experts", 0, 72),
        ("experts", 71, 10),
        ("experts", 140, 10),
        ("experts", 72, 73),
        ("experts", 200, 72),
        ("experts", usize::MAX, 2),
        ("expert", 0, 1),
    ] {
        let written = writer.write_at(name, start, &vec![9; length]);
        assert!(written.is_err(), "{name} {start} {length}");
    }
    writer.write_at("experts", 72, &[]).unwrap();
    writer.write_at("experts", 72, &[2; 72]).unwrap();
    writer.finish().unwrap();
    let file = GgufFile::open(&path).unwrap();
    let expected = [[1; 72], [2; 72], [3; 72]].concat();
    assert_eq!(file.tensor("experts").unwrap().1, expected);

    let path = dir.path().join("short.gguf");
    let tensor = GgufTensor {
        name: "a".into(),
        kind: GgufType::F32,
        shape: vec![4],
    };
    let writer = GgufWriter::create(&path, &[], &[tensor]).unwrap();
    writer.write_at("a", 0, &[0; 12]).unwrap();
    let line = writer.finish().unwrap_err().to_string();
    assert!(line.contains("tensor a"), "{line}");
}

#[test]
fn metadata_and_tensors_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    written(&path);
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.metadata, metadata().into_iter().collect());
    let (tensor, bytes) = file.tensor("a.weight").unwrap();
    assert_eq!(
        (tensor.kind, &*tensor.shape, bytes),
        (GgufType::Q4_0, &[2, 64][..], &[2; 72][..])
    );
    assert_eq!(file.tensor("b.weight").unwrap().1, [1; 12]);
    assert!(file.tensor("c").is_err());
    assert_eq!(file.tensors().count(), 2);
}

#[test]
fn hostile_headers_are_refused_by_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let whole = written(&dir.path().join("whole.gguf"));
    let refuse = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        edit(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        GgufFile::open(&path)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default()
    };
    let many = u64::MAX.to_le_bytes();
    let at = whole.windows(8).position(|it| it == b"a.weight").unwrap();
    for (line, words) in [
        (refuse(&|it| it[0] = b'X'), "does not begin with GGUF"),
        (refuse(&|it| it[4] = 2), "version 2, not 3"),
        (
            refuse(&|it| it[8..16].copy_from_slice(&many)),
            "over a limit",
        ),
        (
            refuse(&|it| it[16..24].copy_from_slice(&many)),
            "over a limit",
        ),
        (
            refuse(&|it| it[24..32].copy_from_slice(&many)),
            "ends early",
        ),
        (refuse(&|it| it.truncate(60)), "ends early"),
        (refuse(&|it| it[at + 8] = 9), "has 9 dimensions"),
        (
            refuse(&|it| it[at + 12..at + 20].copy_from_slice(&many)),
            "not within the file",
        ),
        (refuse(&|it| it[at + 12] = 63), "not within the file"),
        (refuse(&|it| it[at + 28] = 200), "has the type 200"),
        (refuse(&|it| it[at + 32] = 1), "not within the file"),
        (
            refuse(&|it| it.truncate(it.len() - 40)),
            "not within the file",
        ),
    ] {
        assert!(line.contains(words), "{words:?} is not in {line:?}");
    }
}

#[test]
fn what_no_type_holds_is_refused() {
    let of = |bits, columns, sym, scattered| {
        let refused = GgufType::of_linear(&shape(bits, columns, 2, false), sym, scattered);
        refused.map_err(|refusal| refusal.to_string())
    };
    assert_eq!(of(Bits::Three, 64, false, false), Ok(GgufType::Q4_0));
    assert_eq!(of(Bits::Four, 64, false, false), Ok(GgufType::Q5_0));
    assert!(
        of(Bits::Eight, 64, false, false)
            .unwrap_err()
            .contains("asymmetric codes of 8 bits")
    );
    assert!(
        of(Bits::Four, 64, true, true)
            .unwrap_err()
            .contains("desc_act = false")
    );
    assert!(
        of(Bits::Four, 48, true, false)
            .unwrap_err()
            .contains("multiple of 32")
    );
}

#[test]
fn rows_of_a_head_are_paired_as_llama_cpp_rotates_them() {
    // Two heads of six features: of each, the halves alternate.
    let expected = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11];
    assert_eq!(GgufRows::Paired(2).sources(12), expected);
}

#[test]
fn rounding_to_q8_0_spans_the_largest_value() {
    let values: Vec<f32> = (0..32).map(|i| (i - 16) as f32 / 16.0 * 3.0).collect();
    let mut bytes = Vec::new();
    q8_0(&values, &mut bytes);
    let found = described(GgufType::Q8_0, &bytes, 1, 32);
    assert!(
        values
            .iter()
            .zip(&found)
            .all(|(a, b)| (a - b).abs() <= 3.0 / 127.0 * 0.51)
    );
    assert_eq!(bytes[2] as i8, -127);
}

/// `tests/golden/make_gguf.py` has the same metadata and says what the tensors are.
#[test]
fn a_file_of_the_package_gguf_is_read_and_written_byte_for_byte() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("../../tests/golden/gguf/blocks.gguf");
    let file = GgufFile::open(&path).unwrap();
    for kind in [GgufType::Q4_0, GgufType::Q5_0, GgufType::Q8_0] {
        let (tensor, bytes) = file.tensor(kind.name()).unwrap();
        assert_eq!((tensor.kind, &*tensor.shape), (kind, &[4, 96][..]));
        let decoded = decode_blocks(bytes, kind, GgufRows::Same, [4, 96], "x").unwrap();
        let (_, expected) = file.tensor(&format!("{}.values", kind.name())).unwrap();
        let expected = expected.as_chunks::<4>().0.iter();
        let expected: Vec<f32> = expected.map(|it| f32::from_le_bytes(*it)).collect();
        assert_eq!(decoded.dequantize(), expected, "{}", kind.name());
    }
    let texts = |all: &[&str]| GgufValue::Texts(all.iter().map(|it| (*it).to_owned()).collect());
    let metadata = [
        ("general.architecture", GgufValue::Text("llama".into())),
        ("a.u32", GgufValue::U32(7)),
        ("a.i32", GgufValue::I32(-7)),
        ("a.f32", GgufValue::F32(0.5)),
        ("a.u64", GgufValue::U64(1 << 40)),
        ("a.bool", GgufValue::Bool(true)),
        ("a.text", GgufValue::Text("Zwölf".into())),
        ("a.texts", texts(&["eins", "▁zwei"])),
        ("a.i32s", GgufValue::I32s(vec![1, -2, 3])),
        ("a.f32s", GgufValue::F32s(vec![0.5, -1.5])),
    ];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
    assert_eq!(file.metadata, metadata.iter().cloned().collect());
    let kinds = [GgufType::Q4_0, GgufType::Q5_0, GgufType::Q8_0];
    let names = kinds.map(|it| [it.name().to_owned(), format!("{}.values", it.name())]);
    let tensors = names
        .as_flattened()
        .iter()
        .map(|name| file.tensor(name).unwrap().0.clone());
    let tensors: Vec<GgufTensor> = tensors.collect();
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own.gguf");
    let writer = GgufWriter::create(&own, &metadata, &tensors).unwrap();
    for name in names.as_flattened() {
        writer.write(name, file.tensor(name).unwrap().1).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(std::fs::read(own).unwrap(), std::fs::read(path).unwrap());
}
