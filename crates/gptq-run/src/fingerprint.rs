//! The fingerprints of a run and its branches.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use gptq_calibration::Calibration;
use gptq_format::{Checkpoint, FormatError, le_bytes, sha256, sha256_file, side_file, side_files};
use gptq_kernels::Device;
use gptq_plan::{Fingerprint, Plan, Propagation};
use serde_json::json;

use crate::sources;

/// The key of a quick digest of the model's tensors.
pub(crate) const WEIGHTS: &str = "model.weights";
/// A plan's.
#[derive(Default)]
pub(crate) struct Fingerprints {
    /// In the plan's order.
    pub(crate) branches: Vec<Fingerprint>,
    /// What must not change while a run is unfinished, and says nothing about a finished branch: the
    /// program and the device.
    pub(crate) run: Fingerprint,
    /// Sizes and times of the model's files. Where they changed, an unfinished run goes by the tensors.
    pub(crate) files: Fingerprint,
    /// Digest of what comes before the first block.
    pub(crate) embedding: String,
}

impl Fingerprints {
    pub(crate) fn new(
        plan: &Plan,
        calibration: &Calibration,
        checkpoint: &Checkpoint,
        device: Device,
        card: Option<String>,
    ) -> Result<Self, FormatError> {
        let dir = &plan.model_dir;
        let config = dir.join("config.json");
        let config = fs::read(&config).map_err(FormatError::io(&config))?;
        let side = side_files(dir)?.into_iter().map(|name| {
            let file = side_file(dir, &name)?;
            Ok::<_, FormatError>((name, file.map(|file| sha256(&file))))
        });
        let side = side.collect::<Result<BTreeMap<_, _>, _>>()?;
        let tokens = calibration.windows.concat();
        let mut shared = Fingerprint::default();
        shared.add(
            "model",
            &json!({
                "name": plan.model_name,
                "dtype": plan.half,
                "config": sha256(&config),
                "weights": checkpoint.sample_digest()?,
                "side_files": side,
            }),
        );
        let manifest = serde_json::to_value(&calibration.manifest);
        shared.add("calibration", &manifest.unwrap_or_default());
        shared.add("calibration.windows", &json!(sha256(le_bytes(&tokens))));
        let dense = plan.propagation == Propagation::Dense;
        shared.add(
            "propagate",
            &json!(if dense { "dense" } else { "quantised" }),
        );
        // A limit to damping stops a run and changes no byte of it.
        let clamps = plan.numerics.clamp_overflow;
        shared.add("numerics.clamp_overflow", &json!(clamps));
        shared.add("output.shard_size", &json!(plan.shard_size));
        let branches = plan.branches.iter().map(|branch| {
            let mut all = shared.clone();
            all.add("branch", &serde_json::to_value(branch).unwrap_or_default());
            all
        });
        Ok(Fingerprints {
            branches: branches.collect(),
            run: run(device, card),
            files: files(checkpoint)?,
            embedding: sources::embedding(checkpoint, &plan.config)?,
        })
    }
}

/// `card` is the device's name, where there are several of a kind: another may sum in another order.
fn run(device: Device, card: Option<String>) -> Fingerprint {
    let mut run = Fingerprint::default();
    run.add(
        "gptq",
        &json!({"version": env!("CARGO_PKG_VERSION"), "program": program()}),
    );
    let kind = match device {
        Device::Cuda(_) => "cuda",
        Device::Auto | Device::Cpu => "cpu",
    };
    run.add("device", &json!(kind));
    if let Some(card) = card {
        run.add("device.name", &json!(card));
    }
    run
}

/// Size and time of each of the model's files.
fn files(checkpoint: &Checkpoint) -> Result<Fingerprint, FormatError> {
    let mut files = Fingerprint::default();
    for name in checkpoint.files() {
        let path = checkpoint.dir().join(name);
        let meta = fs::metadata(&path).map_err(FormatError::io(&path))?;
        let written = match meta.modified() {
            Ok(time) => format!(", written {}", humantime::format_rfc3339_millis(time)),
            Err(_) => String::new(),
        };
        files.add(name, &json!(format!("{} bytes{written}", meta.len())));
    }
    Ok(files)
}

/// SHA-256 of the running program, where it can be read: two builds of one version may differ, and a
/// copy or a second install of the same is the same.
fn program() -> Option<String> {
    // What runs, even if another was put in its place since.
    let running = sha256_file(Path::new("/proc/self/exe"));
    running
        .or_else(|_| sha256_file(&std::env::current_exe().unwrap_or_default()))
        .ok()
}
