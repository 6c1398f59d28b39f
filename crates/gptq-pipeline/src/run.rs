//! The run: blocks in order, branches in lockstep on each loaded block.

use std::time::Instant;

use burn::tensor::DType;
use gptq_calibration::{Calibration, TextTokenizer};
use gptq_format::StagedDir;
use gptq_kernels::{Device, Engine, Hessian, Request, Work};
use gptq_model::{Block, Model, Stage};

use crate::branch_writer::BranchWriter;
use crate::memory::chunk_windows;
use crate::stream::Stream;
use crate::{BranchReport, LinearReport, PipelineError, Plan, Propagation};

/// What happens, as it happens.
#[derive(Debug)]
pub enum Event<'a> {
    /// Windows are drawn and the model is open; the blocks come next.
    Started {
        /// Tokens to calibrate on.
        tokens: usize,
        /// Linears each branch will quantise.
        linears: &'a [usize],
    },
    /// A linear of branch `branch` (an index into the plan) is done.
    Linear {
        /// Index into the plan's branches.
        branch: usize,
        /// Its numbers.
        report: &'a LinearReport,
    },
    /// A branch directory is in place.
    Finished {
        /// Index into the plan's branches.
        branch: usize,
        /// Its report.
        report: &'a BranchReport,
    },
}

/// Carries the plan out on `device`: one load, one tokenisation, one pass over the blocks, every
/// branch written. Reports come back in the plan's order.
///
/// # Errors
/// Whatever is wrong with the inputs is found before any block is run where it can be; an error
/// leaves no unfinished branch directory behind.
pub fn quantise(
    plan: &Plan,
    device: Device,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<BranchReport>, PipelineError> {
    let device = device.resolve()?;
    device.run(Quantise {
        plan,
        device,
        on_event,
    })
}

struct Quantise<'a> {
    plan: &'a Plan,
    device: Device,
    on_event: &'a mut dyn FnMut(Event<'_>),
}

impl Work for Quantise<'_> {
    type Output = Result<Vec<BranchReport>, PipelineError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let plan = self.plan;
        for branch in &plan.branches {
            StagedDir::check(&plan.branch_dir(branch))?;
        }
        let tokenizer = TextTokenizer::load(&plan.model_dir)?;
        let calibration = Calibration::draw(&plan.calibration, &tokenizer)?;
        let model = Model::<B>::open(&plan.model_dir, &device)?;
        let flows = model.embed(
            &calibration.windows,
            chunk_windows(plan.calibration.seq_len),
            DType::F16,
        )?;
        let mut run = Run {
            plan,
            model,
            outputs: Vec::new(),
            on_event: self.on_event,
        };
        for branch in &plan.branches {
            let writer = BranchWriter::create(plan, branch, run.model.checkpoint())?;
            let linears = Vec::new();
            run.outputs.push(Output {
                writer,
                linears,
                seconds: 0.0,
            });
        }
        run.announce();
        run.blocks(flows)?;
        run.finish(&calibration.manifest, &self.device.to_string())
    }
}

/// One branch as it grows.
struct Output {
    writer: BranchWriter,
    linears: Vec<LinearReport>,
    seconds: f64,
}

struct Run<'a, B: Engine> {
    plan: &'a Plan,
    model: Model<B>,
    outputs: Vec<Output>,
    on_event: &'a mut dyn FnMut(Event<'_>),
}

impl<B: Engine> Run<'_, B> {
    fn announce(&mut self) {
        let linears: Vec<usize> = self
            .plan
            .branches
            .iter()
            .map(|b| b.quantised_modules(&self.plan.config).len())
            .collect();
        (self.on_event)(Event::Started {
            tokens: self.plan.tokens(),
            linears: &linears,
        });
    }

    fn blocks(&mut self, flows: Vec<gptq_model::Flow<B>>) -> Result<(), PipelineError> {
        // Branches that solve a block's stages in different groups cannot share a stream.
        let mut streams: Vec<Stream<B>> = [true, false]
            .into_iter()
            .map(|sequential| {
                let branches = self.plan.branches.iter().enumerate();
                branches
                    .filter(|(_, b)| b.true_sequential == sequential)
                    .map(|(i, _)| i)
                    .collect::<Vec<_>>()
            })
            .filter(|branches| !branches.is_empty())
            .map(|branches| Stream::new(flows.clone(), branches))
            .collect();
        drop(flows);
        for layer in 0..self.plan.config.layers {
            let block = self.model.block(layer)?;
            let mut next = Vec::with_capacity(self.plan.branches.len());
            for stream in streams {
                let sequential = self.plan.branches[stream.branches[0]].true_sequential;
                let groups: Vec<&[Stage]> = match sequential {
                    true => Stage::ALL.chunks(1).collect(),
                    false => vec![&Stage::ALL],
                };
                self.stages(layer, stream, &block, &groups, &mut next)?;
            }
            streams = next;
        }
        Ok(())
    }

    /// Solves the first of `groups` for every branch of `stream`, moves on with the quantised
    /// weights, and goes on with the rest; a branch at a time, once they differ. Streams at the
    /// block's end are pushed to `done`.
    fn stages(
        &mut self,
        layer: usize,
        mut stream: Stream<B>,
        block: &Block<B>,
        groups: &[&[Stage]],
        done: &mut Vec<Stream<B>>,
    ) -> Result<(), PipelineError> {
        let Some((&group, rest)) = groups.split_first() else {
            done.push(stream);
            return Ok(());
        };
        let started = Instant::now();
        let grams = stream.grams(block, group, &self.plan.config);
        let branches = std::mem::take(&mut stream.branches);
        let shared = started.elapsed().as_secs_f64() / branches.len() as f64;
        let mut parent = Some(stream);
        for (i, &branch) in branches.iter().enumerate() {
            let started = Instant::now();
            let mut quantised = block.clone();
            for (&stage, gram) in group.iter().zip(&grams) {
                self.solve(layer, branch, stage, gram.clone(), &mut quantised)?;
            }
            if self.plan.propagation == Propagation::Dense {
                self.outputs[branch].seconds += shared + started.elapsed().as_secs_f64();
                continue;
            }
            // The last branch takes the parent's states over; the others share them.
            let mut own = match i + 1 < branches.len() {
                true => parent.clone(),
                false => parent.take(),
            }
            .expect("taken only by the last branch");
            own.branches = vec![branch];
            let own = own.advance(&quantised, group);
            self.outputs[branch].seconds += shared + started.elapsed().as_secs_f64();
            self.stages(layer, own, &quantised, rest, done)?;
        }
        if let Some(mut stream) = parent {
            stream.branches = branches;
            let stream = stream.advance(block, group);
            self.stages(layer, stream, block, rest, done)?;
        }
        Ok(())
    }

    /// Quantises one stage's linears for one branch: codes to its files, weights into `block`.
    fn solve(
        &mut self,
        layer: usize,
        branch: usize,
        stage: Stage,
        gram: burn::tensor::Tensor<B, 2>,
        block: &mut Block<B>,
    ) -> Result<(), PipelineError> {
        let settings = &self.plan.branches[branch];
        let (mut projections, mut requests) = (Vec::new(), Vec::new());
        for &projection in stage.projections() {
            if let Some(own) = settings.module(&projection.module(layer)) {
                let weight = block.linear(projection).weight.clone();
                requests.push(Request {
                    weight,
                    settings: own,
                });
                projections.push((projection, own));
            }
        }
        if projections.is_empty() {
            return Ok(());
        }
        let hessian = Hessian {
            act_order: settings.desc_act,
            damping: settings.damp_percent,
        };
        let started = Instant::now();
        let subset = B::solve(gram, hessian, requests).map_err(|source| {
            let modules = projections.iter().map(|(p, _)| p.module(layer));
            PipelineError::Solver {
                branch: settings.name.clone(),
                modules: modules.collect::<Vec<_>>().join(", "),
                source,
            }
        })?;
        let seconds = started.elapsed().as_secs_f64() / projections.len() as f64;
        for ((projection, own), solved) in projections.into_iter().zip(subset.solved) {
            let module = projection.module(layer);
            let packed = solved.quantized.pack(settings.format())?;
            self.outputs[branch].writer.write(&module, &packed)?;
            block.set_weight(projection, solved.weight);
            let (n_in, n_out) = projection.shape(&self.plan.config);
            let report = LinearReport {
                layer,
                name: module,
                shape: [n_out, n_in],
                bits: own.bits,
                group_size: own.group_size,
                relative_error: solved.relative_error,
                rtn_error: solved.rtn_error,
                ratio: match solved.rtn_error {
                    0.0 => 1.0,
                    rtn => solved.relative_error / rtn,
                },
                damp_percent: subset.damping,
                dead_columns: subset.dead_columns,
                seconds,
            };
            (self.on_event)(Event::Linear {
                branch,
                report: &report,
            });
            self.outputs[branch].linears.push(report);
        }
        Ok(())
    }

    fn finish(
        self,
        manifest: &gptq_calibration::Manifest,
        device: &str,
    ) -> Result<Vec<BranchReport>, PipelineError> {
        let plan = self.plan;
        let mut reports = Vec::with_capacity(plan.branches.len());
        for (i, (branch, output)) in plan.branches.iter().zip(self.outputs).enumerate() {
            let mut report = BranchReport {
                gptq_version: env!("CARGO_PKG_VERSION").to_owned(),
                model: plan.model_name.clone(),
                branch: branch.name.clone(),
                quantize_config: branch.quantize_config(&plan.model_name),
                preset: branch.preset,
                propagation: match plan.propagation {
                    Propagation::Quantised => "quantised".to_owned(),
                    Propagation::Dense => "dense".to_owned(),
                },
                calibration: manifest.clone(),
                device: device.to_owned(),
                bytes: 0,
                seconds: output.seconds,
                recipe: plan.recipe.clone(),
                linears: output.linears,
            };
            output.writer.finish(plan, &mut report)?;
            (self.on_event)(Event::Finished {
                branch: i,
                report: &report,
            });
            reports.push(report);
        }
        Ok(reports)
    }
}
