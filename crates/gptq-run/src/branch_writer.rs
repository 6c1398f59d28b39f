//! One branch directory being written while the run goes on.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::Path;
use std::thread::scope;

use gptq_export::{ExportSource, TableType, write_gguf};
use gptq_format::{
    Checkpoint, FormatError, Half, OutputFormat, PackedLinear, ShardedWriter, StagedDir,
    TABLE_PIECE, TensorDigests, TensorSpec, copy_side_files, le_bytes, read_json, write_json,
};
use gptq_plan::{BranchFiles, BranchPlan, BranchReport, LinearReport, Plan, written_config};
use gptq_spec::ModelConfig;
use half::f16;
use serde_json::Value;

use crate::RunError;

/// An unfinished branch.
pub(crate) struct BranchWriter {
    dir: StagedDir,
    specs: Vec<TensorSpec>,
    half: Half,
    format: Box<dyn OutputFormat>,
    /// Name of the GGUF file to write in the end.
    gguf: Option<String>,
    weights: ShardedWriter,
    /// Digests of the written tensors, by module.
    digests: HashMap<String, TensorDigests>,
}

impl BranchWriter {
    /// Lays out the branch's files, and writes those that are known beforehand: with its configs the
    /// directory is a checkpoint from the start, whose tensors come.
    pub(crate) fn create(plan: &Plan, branch: &BranchPlan) -> Result<Self, FormatError> {
        let dir = StagedDir::create(&plan.branch_dir(branch))?;
        let specs = BranchFiles::of(branch, &plan.config).tensors(plan.half);
        let weights = ShardedWriter::create(dir.path(), &specs, plan.shard_size)?;
        let path = dir.path();
        copy_side_files(&plan.model_dir, path)?;
        let files = BranchFiles::of(branch, &plan.config);
        let settings = files.quantize_config(&plan.model_name);
        let base = plan.model_dir.join("config.json");
        let (mut config, _) = written_config(read_json(&base)?, plan.half)
            .map_err(|reason| FormatError::Malformed { path: base, reason })?;
        // A recipe's own settings were checked with it; those that a budget led to are known only now.
        let format = branch.layout();
        let modules = files.modules();
        format.write_settings(&settings, &modules, &mut config, path)?;
        // As the tensors have it, which may not be what the base's config says.
        let tied = ModelConfig::from_json(Value::Object(config.clone()));
        if tied.is_ok_and(|it| it.tied_embeddings) != plan.config.tied_embeddings {
            let tied = plan.config.tied_embeddings.into();
            config.insert("tie_word_embeddings".to_owned(), tied);
        }
        write_json(&path.join("config.json"), &config)?;
        dir.sync()?;
        Ok(BranchWriter {
            dir,
            specs,
            half: plan.half,
            format,
            gguf: branch.gguf_file(),
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
        let specs = BranchFiles::of(branch, &plan.config).tensors(plan.half);
        let weights = ShardedWriter::reopen(dir.path(), &specs, plan.shard_size)?;
        let format = branch.layout();
        for linear in linears {
            for spec in format.tensors(&linear.name, &linear.stored()) {
                weights.keep(&spec.name)?;
            }
        }
        Ok(BranchWriter {
            dir,
            specs,
            half: plan.half,
            format,
            gguf: branch.gguf_file(),
            weights,
            digests: HashMap::new(),
        })
    }

    /// Returns the directory that holds the branch until it is finished.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Copies in every tensor that stays as it is: what the branch shares with the base model, in
    /// name and shape.
    pub(crate) fn copy_shared(&mut self, checkpoint: &Checkpoint) -> Result<(), FormatError> {
        let shared = |spec: &&TensorSpec| checkpoint.contains(&spec.name);
        for spec in self.specs.iter().filter(shared) {
            let (half, name, shape) = (self.half, &spec.name, &spec.shape);
            if spec.dtype != half.dtype() {
                let view = checkpoint.view(name)?;
                match view.dtype == spec.dtype {
                    // Of no part that is run, or wide already: as it was.
                    true => self.weights.write(name, &view.bytes())?,
                    false => self.weights.write(name, le_bytes(&view.f32()?))?,
                }
                checkpoint.give_back(name);
                continue;
            }
            self.weights.write_pieces(name, |put| {
                checkpoint.half_pieces(half, name, shape, TABLE_PIECE, |_, piece| {
                    put(le_bytes(piece))
                })
            })?;
        }
        Ok(())
    }

    /// Writes a quantized linear's tensors.
    pub(crate) fn write(&mut self, module: &str, linear: &PackedLinear) -> Result<(), FormatError> {
        // What a solver makes of a scale that f16 cannot hold; of a grid turned round, the negative of it.
        let largest = |scale: &f16| scale.to_f32().abs() >= f16::MAX.to_f32();
        if linear.scales.iter().any(largest) {
            let name = format!("{module}.scales");
            return Err(FormatError::Scale { name });
        }
        let tensors = self.format.encode(module, linear)?;
        let (weights, format) = (&self.weights, &self.format);
        // Each takes a core about as long as the other: of six branches together, longer than solving does.
        let digests = scope(|scope| -> Result<_, FormatError> {
            let digests = scope.spawn(|| TensorDigests::of(&tensors));
            for tensor in &tensors {
                weights.write(&format.tensor_name(module, tensor.suffix), &tensor.bytes)?;
            }
            Ok(digests.join().expect("hashing cannot fail"))
        })?;
        self.digests.insert(module.to_owned(), digests);
        Ok(())
    }

    /// Fills in the digests of what was written.
    pub(crate) fn digest(&self, linears: &mut [LinearReport]) {
        for linear in linears.iter_mut().filter(|linear| linear.digests.is_none()) {
            linear.digests = self.digests.get(&linear.name).cloned();
        }
    }

    /// Syncs everything written so far.
    pub(crate) fn sync(&self) -> Result<(), FormatError> {
        self.weights.sync()
    }

    /// Writes the report and the branch's GGUF file, if it has one, and puts the directory in place. Fills in the report's
    /// `bytes` and its linears' `digests`.
    pub(crate) fn finish(self, report: &mut BranchReport) -> Result<(), RunError> {
        self.digest(&mut report.linears);
        report.bytes = self.weights.finish()?;
        if let Some(name) = &self.gguf {
            let target = self.dir.path().join(name);
            // What a run left that was stopped here.
            match std::fs::remove_file(&target) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(FormatError::io(&target)(error).into());
                }
                _ => {}
            }
            let source = ExportSource::open(self.dir.path())?;
            report.bytes += write_gguf(&source, TableType::default(), &target, &mut |_| ())?;
        }
        report.write(self.dir.path())?;
        Ok(self.dir.commit()?)
    }
}

#[cfg(test)]
mod tests {
    use gptq_format::{AutoGptq, Bits, GroupSize};
    use gptq_solver::{Grid, Settings};

    use super::*;

    #[test]
    fn a_scale_that_f16_cannot_hold_is_refused_on_grids_turned_round_too() {
        let settings = Settings {
            bits: Bits::Four,
            group_size: GroupSize::Row,
            sym: true,
            static_groups: false,
            scale_search: true,
            f16_scales: true,
            refine: 0,
        };
        let dir = tempfile::tempdir().unwrap();
        let dir = StagedDir::create(&dir.path().join("a")).unwrap();
        let mut writer = BranchWriter {
            specs: Vec::new(),
            half: Half::Bf16,
            format: Box::new(AutoGptq::V1),
            gguf: None,
            weights: ShardedWriter::create(dir.path(), &[], None).unwrap(),
            digests: HashMap::new(),
            dir,
        };
        // A grid is turned round where the group's largest weight is positive.
        for (largest, saturated) in [(-1e6, f16::MAX), (1e6, -f16::MAX)] {
            let weights = [(largest, 1.0), (0.0, 1.0)];
            let (grid, _) = Grid::<f64>::fit(weights.into_iter(), &settings);
            let scale = f16::from_f64(grid.scale);
            assert_eq!(scale, saturated);
            let linear = PackedLinear {
                bits: Bits::Four,
                in_features: 32,
                out_features: 32,
                codes: vec![0; 4 * 32],
                scales: vec![scale; 32],
                zeros: vec![8; 32],
                g_idx: vec![0; 32],
            };
            let error = writer.write("model.layers.0.mlp.up_proj", &linear);
            let line = error.unwrap_err().to_string();
            assert!(line.contains("up_proj.scales: a scale"), "{line}");
        }
    }
}
