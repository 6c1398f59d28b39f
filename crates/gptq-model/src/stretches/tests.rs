//! Stretches against whole texts, for every family.

use std::fs;
use std::path::PathBuf;

use burn::tensor::DType;
use gptq_kernels::Cpu;
use gptq_spec::ModelConfig;

use super::*;
use crate::{Cache, Flow, Model};

fn fixtures() -> Vec<PathBuf> {
    let families = [env!("CARGO_MANIFEST_DIR"), "../../tests/golden/families"];
    let entries = fs::read_dir(families.iter().collect::<PathBuf>()).unwrap();
    let dirs = entries.map(|entry| entry.unwrap().path());
    let mut dirs: Vec<_> = dirs
        .filter(|dir| dir.join("model.safetensors").exists())
        .collect();
    dirs.sort();
    dirs
}

fn tokens(seed: u32, len: usize) -> Vec<u32> {
    let step = |x: &u32| Some(x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    let values = std::iter::successors(Some(seed), step).skip(1);
    values.map(|x| (x >> 16) % 512).take(len).collect()
}

/// Logits of every token of `text`, as one window.
fn whole(model: &Model<Cpu>, text: &[u32]) -> Vec<f32> {
    let flows = model.embed(&[text.to_vec()], 1, DType::F32).unwrap();
    let mut flow = flows.into_iter().next().unwrap();
    for layer in 0..model.config().layers {
        flow = model.block(layer).unwrap().forward(flow);
    }
    logits(model, flow)
}

fn logits(model: &Model<Cpu>, flow: Flow<Cpu>) -> Vec<f32> {
    let logits = model.head().unwrap().logits(flow.residual);
    logits.into_data().to_vec().unwrap()
}

/// Positions up to which these configs' rotary frequencies are those of short texts.
fn longest(config: &ModelConfig, texts: &[usize]) -> Option<usize> {
    let longest = *texts.iter().max()?;
    let ropes = [&config.rope, &config.sliding_rope];
    let same = |len: &usize| ropes.iter().all(|rope| rope.scaling.agrees(*len, longest));
    texts.iter().all(same).then_some(longest)
}

#[test]
fn texts_that_share_their_beginnings_get_the_logits_of_whole_ones_in_every_family() {
    let stretch = |start, len, continued| Stretch {
        start,
        len,
        continued,
    };
    // Two texts that begin with 30 tokens, of which one goes on in two ways; a text by itself, one of nearly its length,
    // and a short one. The second chunk goes on where the first ends.
    let chunks = [
        vec![
            stretch(0, 30, true),
            stretch(30, 5, true),
            stretch(35, 1, false),
            stretch(0, 41, false),
        ],
        vec![stretch(0, 40, false), stretch(0, 3, false)],
        vec![stretch(0, 30, true), stretch(30, 9, true)],
        vec![stretch(39, 4, false), stretch(30, 2, false)],
    ];
    let (shared, one, two) = (tokens(1, 30), tokens(2, 5), tokens(3, 1));
    let (three, four) = (tokens(7, 9), tokens(8, 4));
    let alone = [tokens(4, 41), tokens(5, 40), tokens(6, 3)];
    let fifth = tokens(9, 2);
    let inputs = [
        [&shared[..], &one, &two, &alone[0]].concat(),
        [&alone[1][..], &alone[2]].concat(),
        [&shared[..], &three].concat(),
        [&four[..], &fifth].concat(),
    ];
    let texts = [
        [&shared[..], &one, &two].concat(),
        alone[0].clone(),
        alone[1].clone(),
        alone[2].clone(),
        [&shared[..], &three, &four].concat(),
        [&shared[..], &fifth].concat(),
    ];
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let mut compared = 0;
    for dir in fixtures() {
        let model = Model::<Cpu>::open(&dir, &Default::default()).unwrap();
        let config = model.config();
        let Some(longest) = longest(config, &lengths) else {
            continue;
        };
        let mut flows = model.embed(&inputs, 1, DType::F32);
        let layouts: Vec<StretchLayout<Cpu>> = chunks
            .iter()
            .map(|chunk| StretchLayout::new(chunk, longest, &Default::default()))
            .collect();
        for layer in 0..config.layers {
            let block = model.block(layer).unwrap();
            let mut cache = Cache::new(config.block(layer), DType::F32, &Default::default());
            flows = flows.map(|flows| {
                let both = flows.into_iter().zip(&layouts);
                both.map(|(flow, layout)| block.forward_stretches(flow, layout, &mut cache))
                    .collect()
            });
        }
        let found: Vec<Vec<f32>> = flows
            .unwrap()
            .into_iter()
            .map(|flow| logits(&model, flow))
            .collect();
        let vocabulary = config.vocabulary;
        let rows = |chunk: usize, from: usize, to: usize| {
            &found[chunk][from * vocabulary..to * vocabulary]
        };
        let found = [
            rows(0, 0, 36).to_vec(),
            rows(0, 36, 77).to_vec(),
            rows(1, 0, 40).to_vec(),
            rows(1, 40, 43).to_vec(),
            [rows(2, 0, 39), rows(3, 0, 4)].concat(),
            [rows(2, 0, 30), rows(3, 4, 6)].concat(),
        ];
        for (text, found) in texts.iter().zip(&found) {
            let right = whole(&model, text);
            assert_eq!(right.len(), found.len());
            let off = right.iter().zip(found).map(|(a, b)| (a - b).abs());
            let worst = off.fold(0f32, f32::max);
            // Sums of f32 in another order, on logits of a few units.
            assert!(worst < 2e-4, "{}: {worst}", dir.display());
        }
        compared += 1;
    }
    assert!(compared > 20, "{compared}");
}

#[test]
fn beginnings_of_nearly_one_length_are_run_together() {
    let beginning = |len| Stretch {
        start: 0,
        len,
        continued: false,
    };
    let placed = [96, 40, 100, 88, 39, 87].map(beginning);
    let placed: Vec<(usize, Stretch)> = (0..).zip(placed).collect();
    let lengths = |group: &Vec<(usize, Stretch)>| -> Vec<usize> {
        group.iter().map(|(_, it)| it.len).collect()
    };
    let found: Vec<Vec<usize>> = groups(&placed).iter().map(lengths).collect();
    assert_eq!(found, [vec![100, 96, 88], vec![87], vec![40, 39]]);
}
