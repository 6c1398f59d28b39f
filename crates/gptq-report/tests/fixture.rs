//! The committed set of reports, as a matrix in a temporary directory.

use std::fs::{self, File};
use std::path::Path;

use gptq_plan::BranchReport;
use gptq_report::Matrix;
use tempfile::TempDir;

/// Copies the reports and adds weight files of the size they state; `edit` may change one.
pub(crate) fn matrix_with(edit: impl Fn(&mut BranchReport)) -> Matrix {
    let target = directory(edit);
    Matrix::read(target.path()).unwrap()
}

pub(crate) fn directory(edit: impl Fn(&mut BranchReport)) -> TempDir {
    let target = TempDir::new().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/matrix");
    for branch in fs::read_dir(source).unwrap() {
        let branch = branch.unwrap();
        let own = target.path().join(branch.file_name());
        fs::create_dir(&own).unwrap();
        for file in fs::read_dir(branch.path()).unwrap() {
            let file = file.unwrap();
            fs::write(own.join(file.file_name()), fs::read(file.path()).unwrap()).unwrap();
        }
        let mut report = BranchReport::read(&own).unwrap();
        edit(&mut report);
        let weights = File::create(own.join("model.safetensors")).unwrap();
        weights.set_len(report.bytes).unwrap();
        fs::write(
            own.join("report.json"),
            serde_json::to_vec(&report).unwrap(),
        )
        .unwrap();
    }
    target
}
