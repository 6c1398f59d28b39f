//! Licences and sources of every dependency, as `.cargo/deny.toml` allows them, and crates that link no device.
//! cargo-deny reads the same file and does more; this needs nothing but cargo.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use serde_json::Value;
use spdx::{Expression, ParseMode};

/// Crates that read and write files, and describe models and runs: neither they nor what they depend on may
/// link Burn or CUDA, so that fuzz targets and whatever else reads reports build in a minute.
const WITHOUT_DEVICES: [&str; 9] = [
    "gptq-format",
    "gptq-solver",
    "gptq-spec",
    "gptq-calibration",
    "gptq-ranks",
    "gptq-plan",
    "gptq-export",
    "gptq-eval",
    "gptq-report",
];
/// Prefixes of the names of packages that link one.
const DEVICES: [&str; 3] = ["burn", "cubecl", "cudarc"];

/// Allowed licences and sources.
struct Policy {
    licences: BTreeSet<String>,
    registries: BTreeSet<String>,
}

/// Returns one line for each dependency that is not allowed.
pub(crate) fn complaints(root: &Path) -> anyhow::Result<Vec<String>> {
    let policy = Policy::read(&root.join(".cargo/deny.toml"))?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root)
        .output()?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "cargo metadata: {errors}");
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let nodes = metadata["resolve"]["nodes"].as_array();
    let used: BTreeSet<&str> = (nodes.context("no nodes")?.iter())
        .filter_map(|node| node["id"].as_str())
        .collect();
    let packages = metadata["packages"].as_array().context("no packages")?;
    let used = packages
        .iter()
        .filter(|package| package["id"].as_str().is_some_and(|id| used.contains(id)));
    let licences = used.filter_map(|package| policy.complaint(package));
    Ok(licences.chain(devices(&metadata)).collect())
}

/// One line for each crate of [`WITHOUT_DEVICES`] that depends on a device's package, directly or not.
fn devices(metadata: &Value) -> Vec<String> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages = list(&metadata["packages"]).into_iter();
    let names: BTreeMap<String, String> = packages
        .map(|package| (text(&package["id"]), text(&package["name"])))
        .collect();
    // Dependencies of tests are not linked.
    let linked = |dep: &Value| {
        let kinds = list(&dep["dep_kinds"]);
        kinds.iter().any(|kind| kind["kind"].is_null())
    };
    let nodes = list(&metadata["resolve"]["nodes"]).into_iter();
    let uses: BTreeMap<String, Vec<String>> = nodes
        .map(|node| {
            let deps = list(&node["deps"]).into_iter().filter(linked);
            (
                text(&node["id"]),
                deps.map(|dep| text(&dep["pkg"])).collect(),
            )
        })
        .collect();
    let complaint = |crate_name: &str| {
        let id = names.iter().find(|(_, name)| *name == crate_name)?.0;
        let mut seen = BTreeSet::from([id]);
        let mut next = vec![id];
        while let Some(id) = next.pop() {
            let name = &names[id];
            if DEVICES.iter().any(|device| name.starts_with(device)) {
                return Some(format!(
                    "{crate_name}: links {name}, and must link no device"
                ));
            }
            next.extend(uses[id].iter().filter(|dep| seen.insert(*dep)));
        }
        None
    };
    WITHOUT_DEVICES
        .iter()
        .filter_map(|name| complaint(name))
        .collect()
}

impl Policy {
    fn read(path: &Path) -> anyhow::Result<Policy> {
        let deny: toml::Value = toml::from_str(&fs::read_to_string(path)?)?;
        let list = |table: &str, key: &str| {
            let list = deny[table][key].as_array();
            let list = list.with_context(|| format!("{table}.{key} is not a list"))?;
            let texts = list.iter().filter_map(|text| text.as_str());
            anyhow::Ok(texts.map(str::to_owned).collect())
        };
        Ok(Policy {
            licences: list("licenses", "allow")?,
            registries: list("sources", "allow-registry")?,
        })
    }

    fn complaint(&self, package: &Value) -> Option<String> {
        let name = package["name"].as_str().unwrap_or_default();
        // Workspace crates have no source.
        let source = package["source"].as_str()?;
        let known = source
            .strip_prefix("registry+")
            .is_some_and(|url| self.registries.contains(url));
        if !known {
            return Some(format!("{name}: comes from {source}"));
        }
        let licence = package["license"].as_str().unwrap_or_default();
        (!self.permits(licence)).then(|| format!("{name}: its licence is {licence:?}"))
    }

    /// Returns true if an SPDX expression is satisfied. Older manifests write OR as a slash.
    fn permits(&self, expression: &str) -> bool {
        let expression = Expression::parse_mode(expression, ParseMode::LAX);
        expression
            .is_ok_and(|it| it.evaluate(|licence| self.licences.contains(&licence.to_string())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy {
            licences: ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"]
                .map(String::from)
                .into(),
            registries: ["https://crates".to_owned()].into(),
        }
    }

    #[test]
    fn an_expression_is_met_by_one_side_of_or_and_both_of_and() {
        for (expression, met) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("GPL-3.0 OR MIT", true),
            ("GPL-3.0/MIT", true),
            ("GPL-3.0 AND MIT", false),
            ("(GPL-3.0 OR MIT) AND ISC", true),
            ("ISC AND (GPL-3.0 OR Zlib)", false),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("Apache-2.0", false),
            ("MIT MIT", false),
            ("(MIT", false),
            ("", false),
        ] {
            assert_eq!(policy().permits(expression), met, "{expression}");
        }
    }

    #[test]
    fn a_dependency_from_elsewhere_or_under_another_licence_is_complained_about() {
        let package = |source: &str, license: &str| serde_json::json!({"name": "x", "source": source, "license": license});
        let complain = |p| policy().complaint(&p);
        assert_eq!(complain(package("registry+https://crates", "MIT")), None);
        assert!(complain(package("git+https://crates", "MIT")).is_some());
        assert!(complain(package("registry+https://crates", "GPL-3.0")).is_some());
        assert!(complain(serde_json::json!({"name": "own", "source": null})).is_none());
    }
}
