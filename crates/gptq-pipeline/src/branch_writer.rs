//! One branch directory being written while the run goes on.

use gptq_format::{
    Checkpoint, FormatError, PackedLinear, ShardedWriter, StagedDir, copy_side_files, read_json,
    write_json,
};
use serde_json::Value;

use crate::{BranchPlan, BranchReport, Plan};

/// An unfinished branch; dropped, it leaves nothing behind.
pub(crate) struct BranchWriter {
    dir: StagedDir,
    weights: ShardedWriter,
}

impl BranchWriter {
    /// Lays out the branch's files and copies in every tensor that stays as it is.
    pub(crate) fn create(
        plan: &Plan,
        branch: &BranchPlan,
        checkpoint: &Checkpoint,
    ) -> Result<Self, FormatError> {
        let dir = StagedDir::create(&plan.branch_dir(branch))?;
        let specs = branch.tensors(&plan.config);
        let mut weights = ShardedWriter::create(dir.path(), &specs, plan.shard_size)?;
        // What the branch shares with the base model, in name and shape.
        for spec in specs.iter().filter(|spec| checkpoint.contains(&spec.name)) {
            let values = checkpoint.f16(&spec.name, &spec.shape)?;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            weights.write(&spec.name, &bytes)?;
        }
        Ok(BranchWriter { dir, weights })
    }

    /// Writes a quantised linear's four tensors.
    pub(crate) fn write(&mut self, module: &str, linear: &PackedLinear) -> Result<(), FormatError> {
        let words = |values: &[u32]| {
            values
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        let scales: Vec<u8> = linear.scales.iter().flat_map(|v| v.to_le_bytes()).collect();
        let g_idx: Vec<u8> = linear.g_idx.iter().flat_map(|v| v.to_le_bytes()).collect();
        for (suffix, bytes) in [
            ("qweight", words(&linear.qweight)),
            ("qzeros", words(&linear.qzeros)),
            ("scales", scales),
            ("g_idx", g_idx),
        ] {
            self.weights.write(&format!("{module}.{suffix}"), &bytes)?;
        }
        Ok(())
    }

    /// Writes configs, side files and the report, and puts the directory in place. Fills in the
    /// report's `bytes`.
    pub(crate) fn finish(self, plan: &Plan, report: &mut BranchReport) -> Result<(), FormatError> {
        report.bytes = self.weights.finish()?;
        let dir = self.dir.path();
        copy_side_files(&plan.model_dir, dir)?;
        let quantize_config = serde_json::to_value(&report.quantize_config)
            .expect("a config of plain values always serialises");
        let mut config: Value = read_json(&plan.model_dir.join("config.json"))?;
        config["quantization_config"] = quantize_config;
        // Whatever the base was in, what is written here is f16.
        for key in ["dtype", "torch_dtype"] {
            if let Some(dtype) = config.get_mut(key) {
                *dtype = "float16".into();
            }
        }
        write_json(&dir.join("config.json"), &config)?;
        write_json(&dir.join("quantize_config.json"), &report.quantize_config)?;
        report.write(dir)?;
        self.dir.commit()
    }
}
