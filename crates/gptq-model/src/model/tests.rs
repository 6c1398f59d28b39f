//! The forward pass compared with Transformers' logits and with itself in other layouts.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use gptq_format::{ShardedWriter, TensorSpec, read_json, write_json};
use gptq_kernels::Cpu;
use gptq_spec::model_types;
use safetensors::Dtype;
use serde_json::{Value, json};

use burn::tensor::s;

use super::*;
use crate::Decoder;

pub(super) fn root(path: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../tests", path]
        .iter()
        .collect()
}

fn logits(dir: &Path, windows: &[Vec<u32>]) -> Vec<f32> {
    let model = Model::<Cpu>::open(dir, &Default::default()).unwrap();
    let mut flow = model
        .embed(windows, windows.len(), DType::F32)
        .unwrap()
        .remove(0);
    for layer in 0..model.config().layers {
        flow = model.block(layer).unwrap().forward(flow);
    }
    let logits = model.head().unwrap().logits(flow.residual);
    logits.into_data().to_vec().unwrap()
}

/// Inputs and logits computed by Transformers.
pub(super) struct Golden {
    pub(super) windows: Vec<Vec<u32>>,
    /// Positions of a window where logits were taken.
    pub(super) positions: Vec<usize>,
    /// `[windows, positions, vocabulary]`.
    pub(super) logits: Vec<f32>,
}

impl Golden {
    pub(super) fn read(path: &str) -> Golden {
        let bytes = fs::read(root(path)).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let words = |name: &str| -> Vec<[u8; 4]> {
            file.tensor(name).unwrap().data().as_chunks().0.to_vec()
        };
        let ints = |name: &str| words(name).into_iter().map(u32::from_le_bytes);
        let ids: Vec<u32> = ints("input_ids").collect();
        let seq = file.tensor("input_ids").unwrap().shape()[1];
        Golden {
            windows: ids.chunks(seq).map(<[u32]>::to_vec).collect(),
            positions: ints("positions").map(|p| p as usize).collect(),
            logits: words("logits")
                .into_iter()
                .map(f32::from_le_bytes)
                .collect(),
        }
    }

    /// Returns the largest difference from the logits of the model in `dir`.
    fn worst(&self, dir: &Path) -> f32 {
        let found = logits(dir, &self.windows);
        let (windows, seq) = (self.windows.len(), self.windows[0].len());
        let vocabulary = found.len() / (windows * seq);
        assert_eq!(
            self.logits.len(),
            windows * self.positions.len() * vocabulary
        );
        let mut expected = self.logits.chunks(vocabulary);
        let mut worst = 0f32;
        for window in 0..windows {
            for &position in &self.positions {
                let at = (window * seq + position) * vocabulary;
                for (a, b) in found[at..at + vocabulary]
                    .iter()
                    .zip(expected.next().unwrap())
                {
                    assert!(a.is_finite());
                    worst = worst.max((a - b).abs());
                }
            }
        }
        worst
    }
}

fn windows() -> Vec<Vec<u32>> {
    Golden::read("golden/medi_tiny_logits.safetensors").windows
}

/// Two f32 programs that sum in different orders. A sum of n products with rounding errors of 2^-24
/// each is off by about sqrt(n) 2^-24 of itself: 2e-6 for the widest of 768. Ten such sums follow
/// each other in a block, and their errors add like random steps: 1e-5 after three blocks, with
/// logits up to 50. A missing bias or norm changes logits by their own size.
const TOLERANCE: f32 = 2e-3;

#[test]
fn logits_are_those_of_transformers() {
    let worst =
        Golden::read("golden/medi_tiny_logits.safetensors").worst(&root("models/medi-tiny"));
    assert!(worst < TOLERANCE, "largest difference {worst}");
}

/// Returns the names of the tiny models in `golden/families`.
pub(super) fn fixtures() -> Vec<String> {
    let entries = fs::read_dir(root("golden/families")).unwrap();
    let dirs = entries.map(|entry| entry.unwrap().path());
    let models = dirs.filter(|dir| dir.join("logits.safetensors").exists());
    let name = |dir: PathBuf| dir.file_name().unwrap().to_str().unwrap().to_owned();
    models.map(name).collect()
}

#[test]
fn every_family_gives_the_logits_of_transformers() {
    let mut types = std::collections::BTreeSet::new();
    for fixture in fixtures() {
        let dir = format!("golden/families/{fixture}");
        let golden = Golden::read(&format!("{dir}/logits.safetensors"));
        let worst = golden.worst(&root(&dir));
        assert!(worst < TOLERANCE, "{fixture}: largest difference {worst}");
        let config: Value = read_json(&root(&dir).join("config.json")).unwrap();
        types.insert(config["model_type"].as_str().unwrap().to_owned());
    }
    let families = model_types();
    assert!(types.iter().map(String::as_str).eq(families), "{types:?}");
}

#[test]
fn every_family_continues_as_transformers_does() {
    for fixture in fixtures() {
        let dir = root(&format!("golden/families/{fixture}"));
        let golden: Value = read_json(&dir.join("greedy.json")).unwrap();
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(golden[key].clone()).unwrap();
        let (mut context, tokens) = (ids("prompt"), ids("tokens"));
        let model = Model::<Cpu>::open(&dir, &Default::default()).unwrap();
        let mut decoder = Decoder::load(&model).unwrap();
        for (step, &token) in tokens.iter().enumerate() {
            let logits = decoder.next_logits(&context).unwrap();
            let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            assert_eq!(best, Some(token as usize), "{fixture}, token {step}");
            context.push(token);
        }
    }
}

#[test]
fn the_llama3_fixture_shows_whether_frequencies_are_rescaled() {
    let dir = tempfile::tempdir().unwrap();
    let from = root("golden/families/llama3");
    fs::copy(
        from.join("model.safetensors"),
        dir.path().join("model.safetensors"),
    )
    .unwrap();
    let config: Value = read_json(&from.join("config.json")).unwrap();
    let golden = Golden::read("golden/families/llama3/logits.safetensors");
    // With changed parameters, and in Transformers 4's spelling.
    let worst = |changes: &[(&str, Value)]| {
        let mut rope = config["rope_parameters"].clone();
        for (key, value) in changes {
            rope[*key] = value.clone();
        }
        let mut config = config.clone();
        config.as_object_mut().unwrap().remove("rope_parameters");
        config["rope_theta"] = rope["rope_theta"].clone();
        config["rope_scaling"] = rope;
        write_json(&dir.path().join("config.json"), &config).unwrap();
        golden.worst(dir.path())
    };
    assert!(worst(&[]) < TOLERANCE);
    for (key, value) in [
        ("rope_type", json!("default")),
        ("rope_type", json!("linear")),
        ("factor", json!(4.0)),
        ("low_freq_factor", json!(1.9)),
        ("high_freq_factor", json!(11.0)),
        ("original_max_position_embeddings", json!(8192)),
    ] {
        let worst = worst(&[(key, value.clone())]);
        assert!(worst > 10.0 * TOLERANCE, "{key} = {value}: {worst}");
    }
}

/// The logits after `context`, whose first tokens are predicted from before, in steps of these sizes.
fn stepwise(dir: &Path, context: &[u32], steps: &[usize]) -> Vec<f32> {
    let model = Model::<Cpu>::open(dir, &Default::default()).unwrap();
    let mut decoder = Decoder::load(&model).unwrap();
    let (mut end, mut logits) = (0, Vec::new());
    for step in steps {
        end += step;
        logits = decoder.next_logits(&context[..end]).unwrap();
    }
    assert_eq!(end, context.len());
    logits
}

#[test]
fn tokens_after_a_cache_see_their_window_and_no_more() {
    for fixture in fixtures() {
        let dir = root(&format!("golden/families/{fixture}"));
        let golden = Golden::read(&format!("golden/families/{fixture}/logits.safetensors"));
        let context = &golden.windows[0][..golden.windows[0].len().min(64)];
        let n = context.len();
        let whole = stepwise(&dir, context, &[n]);
        // One token at a time, and several, before and after windows (24) are full.
        for steps in [
            vec![n / 4, n - n / 4 - 1, 1],
            [vec![n / 2], vec![1; n - n / 2]].concat(),
        ] {
            let found = stepwise(&dir, context, &steps);
            let pairs = found.iter().zip(&whole);
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < TOLERANCE, "{fixture}, {steps:?}: {worst}");
        }
    }
}

#[test]
fn the_tap_shows_what_the_linears_receive() {
    let model = Model::<Cpu>::open(&root("models/medi-tiny"), &Default::default()).unwrap();
    let windows = windows();
    let before = model.embed(&windows, 2, DType::F32).unwrap().remove(0);
    let block = model.block(0).unwrap();
    let product = |name: &str, x: &Tensor<Cpu, 2>| {
        let mut linears = block.spec().linears().iter();
        let at = linears.position(|linear| linear.name.ends_with(name));
        let weight = block.linear(at.unwrap()).weight.dense(DType::F32);
        x.clone().matmul(weight.transpose())
    };
    let close = |a: Tensor<Cpu, 2>, b: Tensor<Cpu, 2>| {
        let (size, error) = (
            b.clone().abs().max().into_scalar(),
            (a - b).abs().max().into_scalar(),
        );
        assert!(error <= 1e-5 * size, "{error} of {size}");
    };

    // The first token of a window attends only to itself: its activation is its value.
    let x = block.input(0, &before);
    let after_qkv = block.advance(0..1, before.clone());
    let value = product("v_proj", &x).slice(s![0..1]); // two key heads of 64
    let heads = [0, 0, 1, 1].map(|kv| value.clone().slice([0..1, kv * 64..kv * 64 + 64]));
    let x = block.input(1, &after_qkv);
    close(x.clone().slice(s![0..1]), Tensor::cat(heads.to_vec(), 1));

    let after_o = block.advance(1..2, after_qkv.clone());
    close(
        after_o.residual.clone() - after_qkv.residual,
        product("o_proj", &x),
    );

    let x = block.input(2, &after_o);
    let after_gate = block.advance(2..3, after_o.clone());
    let (gate, up) = (product("gate_proj", &x), product("up_proj", &x));
    let x = block.input(3, &after_gate);
    close(x.clone(), burn::tensor::activation::silu(gate) * up);

    let after = block.advance(3..4, after_gate);
    close(
        after.residual.clone() - after_o.residual,
        product("down_proj", &x),
    );
    close(after.residual, block.forward(before).residual);
}

/// A copy of medi-tiny with other tensors and another config.
struct Variant {
    config: Value,
    tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
}

impl Variant {
    fn of_medi_tiny() -> Variant {
        let dir = root("models/medi-tiny");
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let copy = |name: &str| {
            let view = checkpoint.view(name).unwrap();
            (
                name.to_owned(),
                (view.shape.to_vec(), view.bytes().into_owned()),
            )
        };
        Variant {
            config: read_json(&dir.join("config.json")).unwrap(),
            tensors: checkpoint.names().map(copy).collect(),
        }
    }

    fn logits(&self, shard_size: Option<u64>, windows: &[Vec<u32>]) -> Vec<f32> {
        let dir = tempfile::tempdir().unwrap();
        write_json(&dir.path().join("config.json"), &self.config).unwrap();
        let specs: Vec<TensorSpec> = self
            .tensors
            .iter()
            .map(|(name, (shape, _))| TensorSpec {
                name: name.clone(),
                dtype: Dtype::F16,
                shape: shape.clone(),
            })
            .collect();
        let writer = ShardedWriter::create(dir.path(), &specs, shard_size).unwrap();
        for (name, (_, bytes)) in &self.tensors {
            writer.write(name, bytes).unwrap();
        }
        writer.finish().unwrap();
        logits(dir.path(), windows)
    }
}

#[test]
fn shards_and_the_older_config_spelling_change_nothing() {
    let windows = vec![windows()[0][..40].to_vec()];
    let mut variant = Variant::of_medi_tiny();
    let expected = variant.logits(None, &windows);
    let config = variant.config.as_object_mut().unwrap();
    config.remove("rope_parameters");
    config.remove("dtype");
    config.insert("rope_theta".into(), json!(10000.0));
    config.insert("torch_dtype".into(), json!("float16"));
    assert_eq!(variant.logits(Some(1_000_000), &windows), expected);
}

#[test]
fn grouped_query_attention_equals_multi_head_attention_with_repeated_keys() {
    let windows = vec![windows()[1][..70].to_vec()];
    let mut variant = Variant::of_medi_tiny();
    let expected = variant.logits(None, &windows);
    variant.config["num_key_value_heads"] = json!(4);
    for (name, (shape, bytes)) in &mut variant.tensors {
        if name.contains("k_proj") || name.contains("v_proj") {
            shape[0] *= 2;
            let heads: Vec<&[u8]> = bytes.chunks(bytes.len() / 2).collect();
            *bytes = [heads[0], heads[0], heads[1], heads[1]].concat();
        }
    }
    let found = variant.logits(None, &windows);
    let worst = found
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(worst < 1e-3, "largest difference {worst}");
}

#[test]
fn tied_embeddings_serve_as_the_output_projection() {
    let windows = vec![windows()[0][..20].to_vec()];
    let mut variant = Variant::of_medi_tiny();
    let embedding = variant.tensors["model.embed_tokens.weight"].clone();
    variant.tensors.insert("lm_head.weight".into(), embedding);
    let untied = variant.logits(None, &windows);
    variant.tensors.remove("lm_head.weight");
    variant.config["tie_word_embeddings"] = json!(true);
    assert_eq!(variant.logits(None, &windows), untied);
}

#[test]
fn tokens_of_another_vocabulary_are_refused() {
    let model = Model::<Cpu>::open(&root("models/medi-tiny"), &Default::default()).unwrap();
    let error = model
        .embed(&[vec![1, 4096]], 1, DType::F32)
        .unwrap_err()
        .to_string();
    assert!(error.contains("4096"), "{error}");
}

#[test]
fn logits_with_the_cache_are_those_without() {
    let dir = root("models/medi-tiny");
    let tokens = windows().concat();
    let model = Model::<Cpu>::open(&dir, &Default::default()).unwrap();
    let mut decoder = Decoder::load(&model).unwrap();
    let whole = logits(&dir, std::slice::from_ref(&tokens));
    let mut worst = 0f32;
    // A prompt at once, single tokens, a second turn of more than one block of queries, and back to
    // a shorter context.
    for end in [100, 101, 102, 420, 421, 512, 150, 151] {
        let found = decoder.next_logits(&tokens[..end]).unwrap();
        let expected = &whole[(end - 1) * 4096..end * 4096];
        for (a, b) in found.iter().zip(expected) {
            worst = worst.max((a - b).abs());
        }
    }
    // The same f32 products in other shapes, summed in other orders; logits reach about 20.
    assert!(worst < 5e-4, "largest difference {worst}");
}

#[test]
fn codes_that_gptqmodel_packed_give_the_logits_of_its_weights() {
    let golden = root("golden/gptqmodel_w4g128-act");
    let packed = Checkpoint::open_file(&golden.join("linears.safetensors")).unwrap();
    let base = Checkpoint::open(&root("models/medi-tiny")).unwrap();
    let rest = base.names().filter(|name| !name.contains("_proj."));
    let views: Vec<_> = (packed.names().map(|n| packed.view(n).unwrap()))
        .chain(rest.map(|n| base.view(n).unwrap()))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let spec = |view: &gptq_format::TensorView<'_>| TensorSpec {
        name: view.name.into(),
        dtype: view.dtype,
        shape: view.shape.into(),
    };
    let specs: Vec<TensorSpec> = views.iter().map(spec).collect();
    let writer = ShardedWriter::create(dir.path(), &specs, None).unwrap();
    for view in &views {
        writer.write(view.name, &view.bytes()).unwrap();
    }
    writer.finish().unwrap();
    fs::copy(golden.join("config.json"), dir.path().join("config.json")).unwrap();

    let worst = Golden::read("golden/gptqmodel_w4g128-act/logits.safetensors").worst(dir.path());
    assert!(worst < TOLERANCE, "largest difference {worst}");
}
