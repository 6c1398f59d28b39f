//! Origins of the branches, with each distinct one listed once.

use gptq_calibration::Manifest;
use gptq_plan::BranchReport;
use serde::Serialize;

use crate::Matrix;

/// The origin of some branches.
#[derive(Serialize)]
pub(crate) struct Provenance<'a> {
    pub branches: Vec<&'a str>,
    pub calibration: &'a Manifest,
    pub recipe: &'a str,
    pub command: Option<&'a str>,
    pub device: &'a str,
    pub gptq_version: &'a str,
}

/// Returns one entry per distinct origin, in the order of the branches.
pub(crate) fn provenance(matrix: &Matrix) -> Vec<Provenance<'_>> {
    let mut groups: Vec<(&BranchReport, Provenance<'_>)> = Vec::new();
    for branch in &matrix.branches {
        let report = &branch.report;
        let same = |other: &BranchReport| {
            other.calibration == report.calibration
                && other.recipe == report.recipe
                && other.command == report.command
                && other.device == report.device
                && other.gptq_version == report.gptq_version
        };
        match groups.iter_mut().find(|(first, _)| same(first)) {
            Some((_, group)) => group.branches.push(&report.branch),
            None => {
                let own = Provenance {
                    branches: vec![&report.branch],
                    calibration: &report.calibration,
                    recipe: &report.recipe,
                    command: report.command.as_deref(),
                    device: &report.device,
                    gptq_version: &report.gptq_version,
                };
                groups.push((report, own));
            }
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}
