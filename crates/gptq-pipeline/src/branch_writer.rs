//! One branch directory being written while the run goes on.

use std::collections::HashMap;
use std::path::Path;

use gptq_format::{
    Checkpoint, FormatError, Half, LinearDigests, PackedLinear, ShardedWriter, StagedDir,
    TensorSpec, copy_side_files, le_bytes, read_json, write_json,
};
use half::f16;
use serde_json::Value;

use crate::{BranchPlan, BranchReport, LinearReport, Plan};

/// An unfinished branch.
pub(crate) struct BranchWriter {
    dir: StagedDir,
    specs: Vec<TensorSpec>,
    half: Half,
    weights: ShardedWriter,
    /// Of what was written, by module.
    digests: HashMap<String, LinearDigests>,
}

/// A linear's tensors.
const SUFFIXES: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

impl BranchWriter {
    /// Lays out the branch's files, and writes those that are known beforehand: with its configs the
    /// directory is a checkpoint from the start, whose tensors come.
    pub(crate) fn create(plan: &Plan, branch: &BranchPlan) -> Result<Self, FormatError> {
        let dir = StagedDir::create(&plan.branch_dir(branch))?;
        let specs = branch.tensors(&plan.config, plan.half);
        let weights = ShardedWriter::create(dir.path(), &specs, plan.shard_size)?;
        let path = dir.path();
        copy_side_files(&plan.model_dir, path)?;
        let settings = branch.quantize_config(&plan.model_name, &plan.config);
        let mut config: Value = read_json(&plan.model_dir.join("config.json"))?;
        config["quantization_config"] =
            serde_json::to_value(&settings).expect("a config of plain values always serialises");
        // Whatever the base was in, this is what is written here.
        let spelt = |key: &&str| config.get(*key).is_some();
        let mut keys: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(spelt).collect();
        if keys.is_empty() {
            keys.push("torch_dtype");
        }
        for key in keys {
            config[key] = plan.half.torch_name().into();
        }
        write_json(&path.join("config.json"), &config)?;
        write_json(&path.join("quantize_config.json"), &settings)?;
        dir.sync()?;
        Ok(BranchWriter {
            dir,
            specs,
            half: plan.half,
            weights,
            digests: HashMap::new(),
        })
    }

    /// Goes on with a branch that was begun, whose `linears` are on the disk.
    pub(crate) fn reopen(
        plan: &Plan,
        branch: &BranchPlan,
        linears: &[LinearReport],
    ) -> Result<Self, FormatError> {
        let dir = StagedDir::reopen(&plan.branch_dir(branch))?;
        let specs = branch.tensors(&plan.config, plan.half);
        let mut weights = ShardedWriter::reopen(dir.path(), &specs, plan.shard_size)?;
        for linear in linears {
            for suffix in SUFFIXES {
                weights.keep(&format!("{}.{suffix}", linear.name))?;
            }
        }
        Ok(BranchWriter {
            dir,
            specs,
            half: plan.half,
            weights,
            digests: HashMap::new(),
        })
    }

    /// Where it is until it is finished.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Copies in every tensor that stays as it is: what the branch shares with the base model, in
    /// name and shape.
    pub(crate) fn copy_shared(&mut self, checkpoint: &Checkpoint) -> Result<(), FormatError> {
        let shared = |spec: &&TensorSpec| checkpoint.contains(&spec.name);
        for spec in self.specs.iter().filter(shared) {
            let bytes = checkpoint.half_bytes(self.half, &spec.name, &spec.shape)?;
            self.weights.write(&spec.name, &bytes)?;
            checkpoint.give_back(&spec.name);
        }
        Ok(())
    }

    /// Writes a quantised linear's four tensors.
    pub(crate) fn write(&mut self, module: &str, linear: &PackedLinear) -> Result<(), FormatError> {
        // What a solver makes of a scale that f16 cannot hold.
        if linear.scales.contains(&f16::MAX) {
            let name = format!("{module}.scales");
            return Err(FormatError::Scale { name });
        }
        let tensors = [
            le_bytes(&linear.qweight),
            le_bytes(&linear.qzeros),
            le_bytes(&linear.scales),
            le_bytes(&linear.g_idx),
        ];
        for (suffix, bytes) in SUFFIXES.iter().zip(tensors) {
            self.weights.write(&format!("{module}.{suffix}"), &bytes)?;
        }
        self.digests
            .insert(module.to_owned(), LinearDigests::of(linear));
        Ok(())
    }

    /// Fills in the digests of what was written.
    pub(crate) fn digest(&self, linears: &mut [LinearReport]) {
        for linear in linears.iter_mut().filter(|linear| linear.digests.is_none()) {
            linear.digests = self.digests.get(&linear.name).cloned();
        }
    }

    /// Waits until everything written so far is on the disk.
    pub(crate) fn sync(&mut self) -> Result<(), FormatError> {
        self.weights.sync()
    }

    /// Writes the report, and puts the directory in place. Fills in the report's `bytes` and its
    /// linears' `digests`.
    pub(crate) fn finish(self, report: &mut BranchReport) -> Result<(), FormatError> {
        self.digest(&mut report.linears);
        report.bytes = self.weights.finish()?;
        report.write(self.dir.path())?;
        self.dir.commit()
    }
}
