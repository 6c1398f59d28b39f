//! Zip files built by hand, so that their headers can be wrong, and files written by PyTorch.

use std::fs;
use std::path::PathBuf;

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::Checkpoint;
use crate::pickle::tests::Pickle;

/// An entry of a zip file; its header may contradict its data.
#[derive(Clone)]
struct Entry {
    name: String,
    data: Vec<u8>,
    method: u16,
    flags: u16,
    /// Sizes in the header, compressed and uncompressed.
    sizes: [u64; 2],
    /// Error of the local header's declared offset.
    shift: i64,
}

fn entry(name: &str, data: &[u8]) -> Entry {
    Entry {
        name: name.into(),
        data: data.into(),
        method: 0,
        flags: 0,
        sizes: [data.len() as u64; 2],
        shift: 0,
    }
}

/// Returns the zip file; `zip64` puts sizes and offsets into extra fields, as in files over 4 GiB.
fn zip(entries: &[Entry], zip64: bool) -> Vec<u8> {
    let le16 = |v: usize| (v as u16).to_le_bytes();
    let le32 = |v: u64| (v as u32).to_le_bytes();
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let offset = (file.len() as i64 + entry.shift) as u64;
        let [compressed, plain] = entry.sizes;
        let mut common = Vec::new();
        common.extend(le16(45));
        common.extend(entry.flags.to_le_bytes());
        common.extend(entry.method.to_le_bytes());
        common.extend([0; 8]); // time, date, checksum
        let sizes = |v| if zip64 { u64::from(u32::MAX) } else { v };
        common.extend(le32(sizes(compressed)));
        common.extend(le32(sizes(plain)));
        common.extend(le16(entry.name.len()));

        file.extend(b"PK\x03\x04");
        file.extend(&common);
        file.extend(le16(0));
        file.extend(entry.name.as_bytes());
        file.extend(&entry.data);

        let mut extra = Vec::new();
        if zip64 {
            extra.extend([1, 0, 24, 0]);
            for value in [plain, compressed, offset] {
                extra.extend(value.to_le_bytes());
            }
        }
        directory.extend(b"PK\x01\x02");
        directory.extend(le16(45));
        directory.extend(&common);
        directory.extend(le16(extra.len()));
        directory.extend([0; 10]); // comment, disk, attributes
        directory.extend(le32(sizes(offset)));
        directory.extend(entry.name.as_bytes());
        directory.extend(&extra);
    }
    let start = file.len() as u64;
    let (count, length) = (entries.len() as u64, directory.len() as u64);
    file.extend(&directory);
    if zip64 {
        let record = file.len() as u64;
        file.extend(b"PK\x06\x06");
        file.extend(44u64.to_le_bytes());
        file.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        for value in [count, count, length, start] {
            file.extend(value.to_le_bytes());
        }
        file.extend(b"PK\x06\x07\0\0\0\0");
        file.extend(record.to_le_bytes());
        file.extend(1u32.to_le_bytes());
    }
    file.extend(b"PK\x05\x06\0\0\0\0");
    match zip64 {
        true => file.extend([0xff; 12]),
        false => {
            file.extend(le16(entries.len()));
            file.extend(le16(entries.len()));
            file.extend(le32(length));
            file.extend(le32(start));
        }
    }
    file.extend([0, 0]);
    file
}

/// Returns `{"w": a view of 6 halves}`.
fn pickle(offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
    Pickle::new()
        .raw(b"}")
        .text("w")
        .tensor("0", 6, offset, shape, strides)
        .raw(b"s.")
        .0
}

fn halves() -> Vec<u8> {
    (0..6)
        .flat_map(|v| f16::from_f32(v as f32).to_le_bytes())
        .collect()
}

fn entries_of(pickle: &[u8]) -> Vec<Entry> {
    vec![
        entry("a/data.pkl", pickle),
        entry("a/byteorder", b"little"),
        entry("a/data/0", &halves()),
        entry("a/version", b"3\n"),
    ]
}

fn whole() -> Vec<Entry> {
    entries_of(&pickle(0, &[2, 3], &[3, 1]))
}

fn refusal(bytes: &[u8]) -> String {
    read(bytes).expect_err("it was read")
}

#[test]
fn a_view_that_repeats_its_elements_without_end_is_refused() {
    for (shape, taken) in [
        (vec![6, 1 << 20], true),
        (vec![1 << 15, 1 << 15], false),
        (vec![i32::MAX, i32::MAX], false),
    ] {
        let strides = vec![0; shape.len()];
        let file = zip(&entries_of(&pickle(0, &shape, &strides)), false);
        match taken {
            true => assert_eq!(read(&file).unwrap().len(), 1),
            false => assert!(refusal(&file).contains("repeats the elements"), "{shape:?}"),
        }
    }
}

#[test]
fn tensors_are_views_of_the_mapped_file() {
    for zip64 in [false, true] {
        let bytes = zip(&whole(), zip64);
        let places = read(&bytes).unwrap();
        let (name, place) = &places[0];
        assert_eq!((name.as_str(), &place.shape[..]), ("w", &[2, 3][..]));
        assert_eq!(place.strides, None);
        assert_eq!(bytes[place.bytes.clone()], halves());
    }
}

#[test]
fn views_that_reach_outside_their_storage_are_refused() {
    for (offset, shape, strides) in [
        (1, &[2, 3][..], &[3, 1][..]),
        (0, &[7], &[1]),
        (0, &[2, 2], &[5, 1]),
        (7, &[], &[]),
        (7, &[0], &[1]),
        (0, &[i32::MAX; 8], &[0; 8]),
        (0, &[2, i32::MAX, i32::MAX], &[i32::MAX, i32::MAX, i32::MAX]),
        (i32::MAX, &[1], &[1]),
    ] {
        let line = refusal(&zip(&entries_of(&pickle(offset, shape, strides)), false));
        assert!(
            line.contains("tensor w extends beyond"),
            "{shape:?}: {line}"
        );
    }
    // Views that end exactly at the storage's end are valid.
    for (offset, shape, strides) in [
        (3, &[3][..], &[1][..]),
        (5, &[], &[]),
        (6, &[0], &[1]),
        (5, &[4, 1], &[0, 9]),
    ] {
        let bytes = zip(&entries_of(&pickle(offset, shape, strides)), false);
        assert!(read(&bytes).is_ok(), "{shape:?}");
    }
}

#[test]
fn lying_entries_are_refused() {
    let lie = |which: usize, change: &dyn Fn(&mut Entry)| {
        let mut entries = whole();
        change(&mut entries[which]);
        [false, true].map(|zip64| refusal(&zip(&entries, zip64)))
    };
    for (lines, word) in [
        // A compression bomb: compressed entries are never read.
        (lie(2, &|e| e.method = 8), "a/data/0 is compressed"),
        (lie(0, &|e| e.method = 8), "a/data.pkl is compressed"),
        (lie(2, &|e| e.flags = 1), "a/data/0 is encrypted"),
        (lie(2, &|e| e.sizes[1] = 1 << 30), "two lengths"),
        (lie(2, &|e| e.sizes = [1 << 31; 2]), "truncated"),
        (lie(2, &|e| e.sizes = [10; 2]), "its storage has 10 bytes"),
        (lie(2, &|e| e.shift = 1 << 31), "truncated"),
        (lie(2, &|e| e.shift = 1), "truncated"),
        // Its length extends into the next entry.
        (lie(2, &|e| e.sizes = [60; 2]), "overlap"),
        (lie(2, &|e| e.name = "a/data.pkl".into()), "two entries"),
        (lie(2, &|e| e.name = "b/data.pkl".into()), "exactly one"),
        (
            lie(2, &|e| e.name = "a/data/1".into()),
            "\"0\" of tensor w is missing",
        ),
        (lie(2, &|e| e.name = "a\n".into()), "not plain text"),
        (lie(2, &|e| e.name = "x".repeat(600)), "not plain text"),
        (lie(0, &|e| e.name = "a/pkl".into()), "exactly one"),
        (lie(1, &|e| e.data = b"biggie".into()), "big-endian"),
    ] {
        for line in lines {
            assert!(line.contains(word), "no {word:?} in: {line}");
        }
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = zip(&whole(), false);
    for keep in 0..whole.len() {
        assert!(read(&whole[..keep]).is_err(), "{keep} bytes");
    }
}

#[test]
fn a_storage_key_is_only_ever_looked_up_among_the_entries() {
    let pickle = Pickle::new()
        .raw(b"}")
        .text("w")
        .tensor("../../../../etc/passwd", 6, 0, &[6], &[1])
        .raw(b"s.");
    let line = refusal(&zip(&entries_of(&pickle.0), false));
    assert!(line.contains("is missing"), "{line}");
}

proptest! {
    #[test]
    fn any_damage_ends_in_places_inside_the_file_or_a_sentence(
        zip64: bool,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = zip(&whole(), zip64);
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for (_, place) in read(&bytes).unwrap_or_default() {
            prop_assert!(bytes.get(place.bytes).is_some());
        }
    }
}

fn pytorch(file: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../tests/golden/bin", file]
        .iter()
        .collect()
}

/// Opens a directory with one of PyTorch's files under `name`.
fn checkpoint(file: &str, name: &str) -> Result<Checkpoint, FormatError> {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(pytorch(file), dir.path().join(name)).unwrap();
    Checkpoint::open(dir.path())
}

#[test]
fn what_pytorch_wrote_is_what_pytorch_reads() {
    let found = checkpoint("dtypes.bin", "pytorch_model.bin").unwrap();
    let expected = checkpoint("dtypes.safetensors", "model.safetensors").unwrap();
    let names: Vec<&str> = expected.names().collect();
    assert_eq!(found.names().collect::<Vec<_>>(), names);
    assert_eq!(names.len(), 16);
    for name in names {
        let (a, b) = (found.view(name).unwrap(), expected.view(name).unwrap());
        assert_eq!((a.dtype, a.shape), (b.dtype, b.shape), "{name}");
        assert_eq!(a.bytes(), b.bytes(), "{name}");
        if !["int64", "bool"].contains(&name) {
            assert_eq!(
                found.f16(name, a.shape).unwrap(),
                expected.f16(name, b.shape).unwrap(),
                "{name}"
            );
        }
    }
    let line = found.f16("int64", &[3]).unwrap_err().to_string();
    assert!(
        line.contains("tensor int64") && line.contains("I64"),
        "{line}"
    );
}

#[test]
fn views_keep_their_strides_and_share_their_storages() {
    let bytes = fs::read(pytorch("dtypes.bin")).unwrap();
    let places: BTreeMap<String, Place> = read(&bytes).unwrap().into_iter().collect();
    assert_eq!(places["transposed"].strides, Some(vec![1, 8]));
    assert_eq!(places["expanded"].strides, Some(vec![0, 1]));
    let (first, second) = (
        &places["shared.first"].bytes,
        &places["shared.second"].bytes,
    );
    assert_eq!(second.start - first.start, 16 * 4);
}
