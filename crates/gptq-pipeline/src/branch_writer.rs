//! One branch directory being written while the run goes on.

use std::collections::HashMap;

use gptq_format::{
    Checkpoint, FormatError, LinearDigests, PackedLinear, ShardedWriter, StagedDir, TensorSpec,
    copy_side_files, le_bytes, read_json, write_json,
};
use serde_json::Value;

use crate::{BranchPlan, BranchReport, Plan};

/// An unfinished branch; dropped, it leaves nothing behind.
pub(crate) struct BranchWriter {
    dir: StagedDir,
    specs: Vec<TensorSpec>,
    weights: ShardedWriter,
    /// Of what was written, by module.
    digests: HashMap<String, LinearDigests>,
}

impl BranchWriter {
    /// Lays out the branch's files.
    pub(crate) fn create(plan: &Plan, branch: &BranchPlan) -> Result<Self, FormatError> {
        let dir = StagedDir::create(&plan.branch_dir(branch))?;
        let specs = branch.tensors(&plan.config);
        let weights = ShardedWriter::create(dir.path(), &specs, plan.shard_size)?;
        Ok(BranchWriter {
            dir,
            specs,
            weights,
            digests: HashMap::new(),
        })
    }

    /// Copies in every tensor that stays as it is: what the branch shares with the base model, in
    /// name and shape.
    pub(crate) fn copy_shared(&mut self, checkpoint: &Checkpoint) -> Result<(), FormatError> {
        let shared = |spec: &&TensorSpec| checkpoint.contains(&spec.name);
        for spec in self.specs.iter().filter(shared) {
            let bytes = checkpoint.f16_bytes(&spec.name, &spec.shape)?;
            self.weights.write(&spec.name, &bytes)?;
        }
        Ok(())
    }

    /// Writes a quantised linear's four tensors.
    pub(crate) fn write(&mut self, module: &str, linear: &PackedLinear) -> Result<(), FormatError> {
        for (suffix, bytes) in [
            ("qweight", le_bytes(&linear.qweight)),
            ("qzeros", le_bytes(&linear.qzeros)),
            ("scales", le_bytes(&linear.scales)),
            ("g_idx", le_bytes(&linear.g_idx)),
        ] {
            self.weights.write(&format!("{module}.{suffix}"), &bytes)?;
        }
        self.digests
            .insert(module.to_owned(), LinearDigests::of(linear));
        Ok(())
    }

    /// Writes configs, side files and the report, and puts the directory in place. Fills in the
    /// report's `bytes` and its linears' `digests`.
    pub(crate) fn finish(
        mut self,
        plan: &Plan,
        report: &mut BranchReport,
    ) -> Result<(), FormatError> {
        report.bytes = self.weights.finish()?;
        for linear in &mut report.linears {
            linear.digests = self.digests.remove(&linear.name);
        }
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
