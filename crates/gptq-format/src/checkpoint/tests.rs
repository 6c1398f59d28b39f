//! Directories of small files, complete and incomplete.

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

    let named =
        r#"{"weight_map": {"x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}"#;
    fs::write(&index, named).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["x", "y"]);
    let [gone, elsewhere] = checkpoint.notes() else {
        panic!("{:?}", checkpoint.notes());
    };
    assert!(gone.contains("lists z, which no file contains"), "{gone}");
    assert!(
        elsewhere.contains("lists x in a different file"),
        "{elsewhere}"
    );
    let line = checkpoint.view("z").map(|_| ()).unwrap_err().to_string();
    let says = "index.json says it is in a.safetensors, which does not contain it";
    assert!(line.contains(says), "{line}");
    fs::write(&index, r#"{"weight_map": {"x": "../a.safetensors"}}"#).unwrap();
    assert!(matches!(
        Checkpoint::open(dir.path()),
        Err(FormatError::Malformed { .. })
    ));
}

#[test]
fn a_tensor_in_two_shards_counts_where_the_index_says_or_both_are_equal() {
    let dir = tempfile::tempdir().unwrap();
    let shard = |i: usize, value: f32| {
        let name = format!("model-0000{i}-of-00002.safetensors");
        let tensor = ("x", Dtype::F32, vec![1], f32_bytes(&[value]));
        write(&dir.path().join(name), &[tensor]);
    };
    let x = || Checkpoint::open(dir.path()).map(|it| it.f16("x", &[1]).unwrap()[0].to_f32());
    shard(1, 2.0);
    shard(2, 2.0);
    assert_eq!(x().unwrap(), 2.0);
    shard(2, 3.0);
    let line = x().unwrap_err().to_string();
    assert!(
        line.contains("tensor x is in model-00001") && line.contains("model-00002"),
        "{line}"
    );
    let index = r#"{"weight_map": {"x": "model-00002-of-00002.safetensors", "y": "model-00001-of-00002.safetensors"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(x().unwrap(), 3.0);
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
