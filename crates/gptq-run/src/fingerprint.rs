//! The fingerprints of a run and its branches.

use std::collections::BTreeMap;
use std::fs;

use gptq_calibration::Calibration;
use gptq_format::{
    Checkpoint, FormatError, le_bytes, sample_digest, sha256, side_file, side_files,
};
use gptq_kernels::Device;
use gptq_plan::{Fingerprint, Plan, Propagation};
use gptq_ranks::{Collective, host};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::program::program;
use crate::{RunError, sources};

/// Key of the sample digest of the model's tensors.
pub(crate) const WEIGHTS: &str = "model.weights";
/// A plan's.
#[derive(Default)]
pub(crate) struct Fingerprints {
    /// Fingerprints of the branches, in the plan's order.
    pub(crate) branches: Vec<Fingerprint>,
    /// Values that must not change during an interrupted run but do not matter for finished
    /// branches: the program and the device.
    pub(crate) run: Fingerprint,
    /// Sizes and times of the model's files. If they changed, an interrupted run compares the
    /// tensors.
    pub(crate) files: Fingerprint,
    /// Digest of the weights before the first block.
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
                "weights": sample_digest(checkpoint)?,
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
        // A damping limit stops a run and does not change its output.
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

/// Values that the ranks of one run have in common.
#[derive(Serialize, Deserialize)]
struct Common {
    host: String,
    print: Fingerprint,
}

impl Fingerprints {
    /// Compares those of all ranks with rank 0's.
    ///
    /// # Errors
    /// On rank 0, the first that has another, with the difference.
    pub(crate) fn compare(&self, ranks: &dyn Collective) -> Result<(), RunError> {
        if ranks.share().size == 1 {
            return Ok(());
        }
        let mut print = Fingerprint::default();
        print.add("run", &serde_json::to_value(&self.run).unwrap_or_default());
        print.add(
            "branches",
            &serde_json::to_value(&self.branches).unwrap_or_default(),
        );
        print.add("cpu", &json!(instructions()));
        let host = host();
        let own = Common { host, print };
        let text = serde_json::to_vec(&own).expect("plain values always serialize");
        for (rank, text) in ranks.gather(text)?.iter().enumerate().skip(1) {
            let other: Option<Common> = serde_json::from_slice(text).ok();
            let (host, difference) = match other {
                None => (String::new(), Some("another version of gptq".to_owned())),
                Some(other) => (other.host, own.print.difference(&other.print)),
            };
            if let Some(difference) = difference {
                return Err(RunError::OtherRank {
                    rank,
                    host,
                    difference,
                });
            }
        }
        // The others wait for rank 0's word.
        ranks.broadcast(Vec::new())?;
        Ok(())
    }
}

/// The processor's instructions that products choose their order of sums by.
fn instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let known = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let known: [(&str, bool); 0] = [];
    known
        .into_iter()
        .filter_map(|(name, has)| has.then_some(name))
        .collect()
}

/// `card` is the device's name if there are several kinds: another device may sum in another order.
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

/// Returns size and time of each of the model's files.
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
