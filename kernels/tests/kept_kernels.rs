//! Compiled kernels are cached between processes, and damaged ones are compiled again. Without a
//! CUDA device this prints that it was skipped and passes.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{DType, Tensor, TensorData};
use gptq_kernels::{Device, Engine, Scores, Work, keep_kernels};
use half::f16;

const DIRECTORY: &str = "GPTQ_TEST_KERNELS";
const FIRST: &str = "VALUES ";

/// Uses one of our own kernels, and two of CubeCL's.
struct Compute;

impl Work for Compute {
    type Output = Vec<f32>;

    fn run<B: Engine>(self, device: B::Device) -> Vec<f32> {
        let values: Vec<f16> = (0..64 * 2 * 64)
            .map(|i| f16::from_f32(((i * 37 % 101) as f32 - 50.0) / 40.0))
            .collect();
        let data = TensorData::new(values, [1, 64, 2, 64]);
        let q = Tensor::<B, 4>::from_data(data, (&device, DType::F16));
        let out =
            B::causal_attention(q.clone(), q.clone(), q, Scores::default()).reshape([64, 128]);
        let out = B::swiglu(out.clone(), out);
        let out = out.cast(DType::F32).into_data();
        out.to_vec().expect("it was cast")
    }
}

/// Runs a separate process that computes with kernels cached in `directory`; returns its result.
fn compute(directory: &Path) -> String {
    let name = "kernels_are_kept_and_damaged_ones_are_compiled_again";
    let again = Command::new(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(DIRECTORY, directory)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&again.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&again.stderr);
    assert!(again.status.success(), "{text}\n{stderr}");
    let values = text.lines().find_map(|line| line.split_once(FIRST));
    values.expect("it says what it found").1.to_owned()
}

/// Returns every file below `directory` except the use markers, with its content.
fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut paths = vec![directory.to_owned()];
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            paths.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else if !path.ends_with("used") {
            found.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

/// Returns the files of the single finished set.
fn sealed(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let in_set = |path: &Path| path.to_string_lossy().contains("/set-");
    let files = files(directory)
        .into_iter()
        .filter(|(path, _)| in_set(path));
    let files: Vec<_> = files.collect();
    assert!(
        files.iter().any(|(path, _)| path.ends_with("seal")),
        "no finished set: {:?}",
        files.iter().map(|(path, _)| path).collect::<Vec<_>>()
    );
    files
}

#[test]
fn kernels_are_kept_and_damaged_ones_are_compiled_again() {
    if let Some(directory) = env::var_os(DIRECTORY) {
        keep_kernels(directory.into());
        let values = Device::Cuda(0).run(Compute).unwrap();
        assert!(values.iter().all(|value| value.is_finite()));
        let bits: Vec<String> = values
            .iter()
            .map(|v| format!("{:08x}", v.to_bits()))
            .collect();
        println!("{FIRST}{}", bits.concat());
        return;
    }
    if Device::Cuda(0).resolve().is_err() {
        println!("skipped: no CUDA device");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let expected = compute(directory);
    let kept = sealed(directory);
    let attention = |path: &Path| {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        name.starts_with("causal_attention") && name.ends_with(".ptx")
    };
    let (ptx, bytes) = kept
        .iter()
        .find(|(path, _)| attention(path))
        .expect("our own");
    assert_eq!(bytes.last(), Some(&0), "it ends in a NUL");
    let chunk = kept
        .iter()
        .find(|(path, _)| path.extension().is_some_and(|e| e == "cbor"));
    let (chunk, cbor) = chunk.expect("CubeCL's");
    let contents = |files: &[(PathBuf, Vec<u8>)]| -> Vec<Vec<u8>> {
        files.iter().map(|(_, bytes)| bytes.clone()).collect()
    };

    // Cached kernels are used unchanged: nothing new is compiled.
    assert_eq!(compute(directory), expected);
    assert!(contents(&sealed(directory)) == contents(&kept));

    let half = bytes.len() / 2;
    let cases: [(&Path, &[u8]); 5] = [
        (ptx, &bytes[..half]),
        (ptx, b""),
        (ptx, &bytes[..bytes.len() - 1]),
        (chunk, &cbor[..cbor.len() / 2]),
        (chunk, b"not what was written"),
    ];
    for (path, damage) in cases {
        // The set's name changes each time it is written again.
        let own = path.file_name().unwrap();
        let now = sealed(directory);
        let (path, _) = now.iter().find(|(path, _)| path.ends_with(own)).unwrap();
        fs::write(path, damage).unwrap();
        assert_eq!(compute(directory), expected, "{} bytes", damage.len());
        let again = sealed(directory);
        let ptx = |files: &[(PathBuf, Vec<u8>)]| {
            let found = files.iter().find(|(path, _)| attention(path));
            found.unwrap().1.clone()
        };
        assert!(ptx(&again) == *bytes, "it was compiled again and kept");
    }
}
