//! What a branch's bytes depend on, key by key: by it a run tells whether what lies in its output
//! directory is its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use gptq_calibration::Calibration;
use gptq_format::{Checkpoint, FormatError, le_bytes, sha256, sha256_file, side_file, side_files};
use gptq_kernels::Device;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Plan, Propagation, sources};

/// The key of a quick digest of the model's tensors.
pub(crate) const WEIGHTS: &str = "model.weights";
/// Differences that a message names; the others are counted.
const NAMED: usize = 3;
/// Most characters of a value that a message shows.
const SHOWN: usize = 60;

/// Keys with dots, and their values as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(BTreeMap<String, String>);

impl Fingerprint {
    /// Of one value.
    pub(crate) fn of(key: &str, value: &impl Serialize) -> Self {
        let mut print = Fingerprint::default();
        let value = serde_json::to_value(value);
        print.add(key, &value.expect("plain values always serialise"));
        print
    }

    /// Adds the leaves of `value`.
    fn add(&mut self, key: &str, value: &Value) {
        match value {
            Value::Object(entries) => {
                for (name, value) in entries {
                    self.add(&format!("{key}.{name}"), value);
                }
            }
            Value::Array(values) => {
                for (i, value) in values.iter().enumerate() {
                    self.add(&format!("{key}.{i}"), value);
                }
            }
            leaf => {
                self.0.insert(key.to_owned(), leaf.to_string());
            }
        }
    }

    /// The text under a key.
    pub(crate) fn text(&self, key: &str) -> Option<String> {
        serde_json::from_str(self.0.get(key)?).ok()
    }

    /// The same without one key.
    pub(crate) fn without(mut self, key: &str) -> Self {
        self.0.remove(key);
        self
    }

    /// What is not as it was, in half a line; `None` when everything is.
    pub fn difference(&self, now: &Fingerprint) -> Option<String> {
        let keys: Vec<&String> = (self.0.keys())
            .chain(now.0.keys().filter(|key| !self.0.contains_key(*key)))
            .filter(|&key| self.0.get(key) != now.0.get(key))
            .collect();
        let show = |values: &Fingerprint, key: &String| match values.0.get(key) {
            None => "not set".to_owned(),
            Some(value) => value.chars().take(SHOWN).collect(),
        };
        // What is listed is counted in a key, and known to people by its name.
        let name = |key: &str| {
            let (entry, _) = key.rsplit_once('.')?;
            let name = self.0.get(&format!("{entry}.name"))?.trim_matches('"');
            Some(format!(" ({name})")).filter(|_| entry.ends_with(|c: char| c.is_ascii_digit()))
        };
        let named = keys.iter().take(NAMED).map(|key| {
            let (then, now) = (show(self, key), show(now, key));
            let name = name(key).unwrap_or_default();
            format!("{key}{name} was {then}, is {now}")
        });
        let mut named: Vec<String> = named.collect();
        match keys.len() {
            0 => None,
            n => {
                if n > NAMED {
                    named.push(format!("and {} more", n - NAMED));
                }
                Some(named.join("; "))
            }
        }
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn of(value: Value) -> Fingerprint {
        let mut print = Fingerprint::default();
        print.add("branch", &value);
        print
    }

    #[test]
    fn differences_are_named_by_key() {
        let one = of(json!({"bits": 4, "damp": 0.1, "overrides": [{"pattern": "*"}]}));
        assert_eq!(one.difference(&one), None);
        let two = of(json!({"bits": 8, "damp": 0.1}));
        assert_eq!(
            one.difference(&two).unwrap(),
            "branch.bits was 4, is 8; branch.overrides.0.pattern was \"*\", is not set"
        );
        let file = |hash: &str| of(json!({"files": [{"name": "rows.json", "sha256": hash}]}));
        assert_eq!(
            file("a").difference(&file("b")).unwrap(),
            "branch.files.0.sha256 (rows.json) was \"a\", is \"b\""
        );
        let many = |n: usize| of(json!(vec![n; 5]));
        assert!(
            many(1)
                .difference(&many(2))
                .unwrap()
                .ends_with("and 2 more")
        );
    }
}
