//! A run keeps within its host memory budget, counting its allocations and the resident pages of
//! mapped files, with checkpoints and hidden states larger than the budget. A single test, because
//! it counts the whole process.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use gptq_format::{ShardedWriter, TensorSpec, le_bytes, write_json};
use gptq_kernels::Device;
use gptq_plan::{FetchedInputs, Memory, Plan, Recipe};
use gptq_ranks::OneRank;
use gptq_run::{RunError, RunOptions, quantize};
use gptq_spec::ModelConfig;
use half::{bf16, f16};
use peak_alloc::PeakAlloc;
use safetensors::Dtype;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Writes a checkpoint of `layers` blocks with the bundled model's tokenizer; returns the bytes of
/// its weights.
fn checkpoint(dir: &Path, hidden: usize, wide: usize, layers: usize) -> u64 {
    checkpoint_of(dir, [hidden, wide, layers, 4096], Dtype::F16)
}

/// Does the same with a vocabulary of any size, which the tokenizer need not fill, and weights in
/// f16 or bf16.
fn checkpoint_of(dir: &Path, [hidden, wide, layers, vocabulary]: [usize; 4], dtype: Dtype) -> u64 {
    fs::create_dir(dir).unwrap();
    let tokenizer = Path::new(REPOSITORY).join("tests/models/medi-tiny");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tokenizer.join(file), dir.join(file)).unwrap();
    }
    let config = json!({
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": layers, "num_attention_heads": hidden / 64, "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    });
    write_json(&dir.join("config.json"), &config).unwrap();
    let tensors = ModelConfig::from_json(config)
        .unwrap()
        .tensors()
        .into_iter();
    let specs = tensors.map(|tensor| TensorSpec {
        name: tensor.name,
        dtype,
        shape: tensor.shape,
    });
    let specs: Vec<TensorSpec> = specs.collect();
    let writer = ShardedWriter::create(dir, &specs, None).unwrap();
    let mut state = 1u64;
    for spec in &specs {
        let one = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Uniform in ±0.035: a deviation of 0.02.
            ((state >> 40) as f32 / 8_388_608.0 - 1.0) * 0.035
        };
        let values: Vec<f32> = match spec.shape.len() {
            1 => vec![1.0; hidden],
            _ => (0..spec.bytes() / 2).map(one).collect(),
        };
        let values: Vec<u16> = (values.into_iter())
            .map(|value| match dtype {
                Dtype::BF16 => bf16::from_f32(value).to_bits(),
                _ => f16::from_f32(value).to_bits(),
            })
            .collect();
        writer.write(&spec.name, le_bytes(&values)).unwrap();
    }
    writer.finish().unwrap()
}

fn plan(dir: &Path, samples: usize, branches: &str) -> Plan {
    let rows =
        Path::new(REPOSITORY).join("calibration/wikidoc/wikidoc_patient_information_1000.json");
    let (model, out) = (dir.join("model"), dir.join("out"));
    let text = format!(
        "[model]\nsource = {model:?}\n[calibration]\nsource = {rows:?}\nrows = \"0:300\"\n\
         samples = {samples}\nseq_len = 128\n[output]\ndir = {out:?}\n{branches}"
    );
    let recipe = Recipe::parse(&dir.join("r.toml"), text).unwrap();
    let plan = Plan::new(&recipe, &FetchedInputs::default()).unwrap();
    assert_eq!(
        plan.config,
        ModelConfig::read(&model.join("config.json")).unwrap()
    );
    plan
}

/// Returns the resident bytes of mapped files, including the program's own.
fn mapped() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssFile:"));
    let kilobytes = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kilobytes.parse::<u64>().unwrap() << 10
}

/// Runs within `budget`; returns the peak of allocated bytes, and that of resident file bytes,
/// sampled after each linear layer.
fn peak(plan: &Plan, budget: u64) -> Result<[u64; 2], RunError> {
    let options = RunOptions {
        profile: false,
        device_memory: None,
        host_memory: Some(budget),
        scratch: None,
        save_every: Duration::ZERO,
        restart: true,
        stop: &AtomicBool::new(false),
    };
    ALLOCATOR.reset_peak_usage();
    let (before, mut most) = (mapped(), 0);
    quantize(plan, Device::Cpu, &OneRank, options, &mut |_| {
        most = most.max(mapped().saturating_sub(before));
    })?;
    Ok([ALLOCATOR.peak_usage() as u64, most])
}

#[test]
fn host_memory_stays_within_its_budget() {
    // A checkpoint several times larger than the budget, so blocks are loaded and dropped. Only one
    // linear layer in each is solved, which takes as much memory as all of them, and less time.
    let dir = tempfile::tempdir().unwrap();
    let bytes = checkpoint(&dir.path().join("model"), 256, 512, 320);
    let skip: String = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    ]
    .map(|name| format!("[[branch.override]]\nmatch = \"*.{name}\"\nskip = true\n"))
    .concat();
    let branch = format!("[[branch]]\nname = \"a\"\nbits = 4\npreset = \"standard\"\n{skip}");
    let large = plan(dir.path(), 4, &branch);
    let budget = Memory::of(&large).least_cpu;
    assert!(bytes > 4 * budget, "{bytes} bytes for a budget of {budget}");
    let [used, mapped] = peak(&large, budget).unwrap();
    println!("checkpoint {bytes}, budget {budget}, used {used}, mapped {mapped}");
    assert!(used <= budget + budget / 10, "{used} of {budget}");
    assert!(
        mapped <= budget / 2,
        "{mapped} bytes of {bytes} stay mapped"
    );
    let error = peak(&large, budget / 2).unwrap_err().to_string();
    assert!(error.contains("--host-memory"), "{error}");

    // A vocabulary that is most of the model, in a dtype that is converted for the device and for
    // the branches: at most pieces of it besides the embedding itself, and for each branch
    // separately.
    let dir = tempfile::tempdir().unwrap();
    let shape = [256, 512, 2, 1 << 16];
    let bytes = checkpoint_of(&dir.path().join("model"), shape, Dtype::BF16);
    let second = branch.replace("\"a\"", "\"b\"");
    let vocabulary = plan(dir.path(), 4, &format!("{branch}{second}"));
    let table = (shape[0] * shape[3]) as u64;
    let budget = Memory::of(&vocabulary).least_cpu;
    let [used, mapped] = peak(&vocabulary, budget).unwrap();
    println!("checkpoint {bytes}, table {table}, budget {budget}, used {used}, mapped {mapped}");
    assert!(used <= budget, "{used} of {budget}");
    // The table in compute dtype, and less than its size for everything else.
    assert!(used < 2 * table * 4, "{used} for a table of {}", table * 4);
    assert!(mapped <= bytes / 4, "{mapped} bytes of {bytes} stay mapped");

    // Hidden states larger than the budget go to disk, and a larger budget is used for them. Saved
    // beside the journal too, they are read back one chunk at a time.
    let dir = tempfile::tempdir().unwrap();
    checkpoint(&dir.path().join("model"), 64, 64, 2);
    let branches: String = (0..6)
        .map(|i| format!("[[branch]]\nname = \"b{i}\"\nbits = 4\ngroup_size = 64\n"))
        .collect();
    let wide = plan(dir.path(), 1200, &branches);
    let (least, states) = (Memory::of(&wide).least_cpu, Memory::of(&wide).states);
    assert!(states > least, "{states} bytes for a budget of {least}");
    for (budget, stay) in [(least, 0), (least + states / 2, states / 4)] {
        let [used, _] = peak(&wide, budget).unwrap();
        println!("states {states}, budget {budget}, used {used}");
        assert!(used <= budget + budget / 10, "{used} of {budget}");
        assert!(
            used >= stay,
            "{used} of {budget}: states went to the disk for nothing"
        );
    }
}
