//! Reports as earlier versions wrote them.

use std::fs;
use std::path::Path;

use gptq_plan::BranchReport;
use serde_json::Value;

#[test]
fn digests_of_an_earlier_report_are_read_by_suffix_and_written_the_same() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/matrix/main");
    let text = fs::read(dir.join("report.json")).unwrap();
    let earlier: Value = serde_json::from_slice(&text).unwrap();
    let report = BranchReport::read(&dir).unwrap();
    let again = serde_json::to_value(&report).unwrap();
    assert!(!report.linears.is_empty());
    for (at, linear) in report.linears.iter().enumerate() {
        let recorded = &earlier["linears"][at]["digests"];
        let digests = linear.digests.as_ref().unwrap();
        for suffix in ["qweight", "qzeros", "scales", "g_idx"] {
            assert_eq!(digests.get(suffix), recorded[suffix].as_str(), "{suffix}");
        }
        assert_eq!(&again["linears"][at]["digests"], recorded);
    }
}
