//! Invariants of any correct GPTQ, and agreement with AutoGPTQ's own f64 run.

use std::collections::BTreeMap;

use gptq_format::{AutoGptq, GroupSize, OutputFormat};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;

use super::*;
use crate::output_energy;

fn settings(bits: Bits, group_size: GroupSize) -> Settings {
    Settings {
        bits,
        group_size,
        sym: true,
        static_groups: false,
        scale_search: false,
        f16_scales: true,
        refine: 0,
    }
}

/// Weights `[rows, cols]` and the Gram matrix of correlated inputs.
fn problem(rows: usize, cols: usize, seed: u64) -> (DMatrix<f64>, DMatrix<f64>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = |r, c| DMatrix::from_fn(r, c, |_, _| rng.random_range(-1.0..1.0));
    let w = uniform(rows, cols);
    let mix = uniform(cols, cols);
    let x = mix * uniform(cols, 3 * cols);
    (w, &x * x.transpose())
}

#[test]
fn every_block_size_gives_the_same_codes() {
    let (w, h) = problem(70, 256, 1);
    let factor = Factor::new(&h, true, 0.1).unwrap();
    let static_groups = Settings {
        static_groups: true,
        ..settings(Bits::Four, GroupSize::Columns(32))
    };
    for (settings, blocks) in [
        (settings(Bits::Four, GroupSize::Row), [1, 5, 32, 128]),
        (settings(Bits::Three, GroupSize::Row), [1, 5, 32, 128]),
        (static_groups, [1, 5, 32, 128]),
        // Grids from updated weights are found at a panel's start, so here a block has to be at
        // most a group for all of them to see the same updates.
        (
            settings(Bits::Four, GroupSize::Columns(128)),
            [128, 128, 128, 128],
        ),
    ] {
        let expected = solve(&w, &factor, &settings).codes;
        for block in blocks {
            let codes = solve_in_blocks(&w, &factor, &settings, block).codes;
            assert_eq!(codes, expected, "{settings:?} block {block}");
        }
    }
}

#[test]
fn the_error_is_the_rounding_residuals_times_the_inverse_factor() {
    // W - Q = E U, so E = (W - Q) M; and E_j U_jj is the rounding error of column j, at most half a
    // step unless the code was clamped.
    let (w, h) = problem(40, 200, 2);
    let settings = settings(Bits::Eight, GroupSize::Row);
    let factor = Factor::new(&h, true, 0.1).unwrap();
    let solution = solve(&w, &factor, &settings);
    let d = &w - solution.dequantize();
    let d = DMatrix::from_fn(40, 200, |r, k| d[(r, factor.order[k])]);
    let e = d * &factor.upper;
    for j in 0..200 {
        for r in 0..40 {
            let code = solution.codes[(r, factor.order[j])];
            let residual = e[(r, j)] / factor.upper[(j, j)];
            if code > 0 && code < 255 {
                assert!(residual.abs() <= 0.5 * solution.scales[(r, 0)] * (1.0 + 1e-9));
            }
        }
    }
}

#[test]
fn diagonal_hessian_reduces_to_rtn() {
    let (w, _) = problem(33, 128, 3);
    let h = DMatrix::from_diagonal(&nalgebra::DVector::from_fn(128, |i, _| {
        1.0 + (i * 37 % 11) as f64
    }));
    for (bits, group_size) in [
        (Bits::Two, GroupSize::Columns(32)),
        (Bits::Four, GroupSize::Row),
        (Bits::Eight, GroupSize::Columns(64)),
    ] {
        let settings = settings(bits, group_size);
        let factor = Factor::new(&h, false, 0.1).unwrap();
        assert_eq!(
            solve(&w, &factor, &settings).codes,
            round_to_nearest(&w, &settings).codes
        );
    }
}

#[test]
fn with_act_order_the_order_of_the_inputs_does_not_matter() {
    let (w, h) = problem(20, 96, 4);
    let shuffle: Vec<usize> = (0..96).map(|i| i * 35 % 96).collect();
    let w2 = DMatrix::from_fn(20, 96, |r, c| w[(r, shuffle[c])]);
    let h2 = DMatrix::from_fn(96, 96, |r, c| h[(shuffle[r], shuffle[c])]);
    let settings = settings(Bits::Four, GroupSize::Columns(32));
    let one = solve(&w, &Factor::new(&h, true, 0.1).unwrap(), &settings);
    let two = solve(&w2, &Factor::new(&h2, true, 0.1).unwrap(), &settings);
    for (c, &from) in shuffle.iter().enumerate() {
        assert_eq!(two.codes.column(c), one.codes.column(from));
        assert_eq!(two.g_idx[c], one.g_idx[from]);
    }
}

#[test]
fn scaling_the_hessian_changes_no_code() {
    let (w, h) = problem(16, 64, 5);
    let settings = settings(Bits::Three, GroupSize::Columns(32));
    let one = solve(&w, &Factor::new(&h, true, 0.1).unwrap(), &settings);
    let two = solve(
        &w,
        &Factor::new(&(h * 4096.0), true, 0.1).unwrap(),
        &settings,
    );
    assert_eq!(one.codes, two.codes);
}

#[test]
fn weights_of_a_dead_column_become_zero() {
    let (w, mut h) = problem(10, 64, 6);
    for j in [3, 40] {
        h.row_mut(j).fill(0.0);
        h.column_mut(j).fill(0.0);
    }
    let factor = Factor::new(&h, true, 0.1).unwrap();
    assert_eq!(factor.dead, [3, 40]);
    let q = solve(&w, &factor, &settings(Bits::Four, GroupSize::Columns(32))).dequantize();
    assert!(
        q.column(3)
            .iter()
            .chain(q.column(40).iter())
            .all(|&v| v == 0.0)
    );
}

#[test]
fn gptq_beats_round_to_nearest_on_the_calibration_inputs() {
    let (w, h) = problem(64, 256, 7);
    for (bits, group) in [
        (Bits::Two, 64),
        (Bits::Three, 128),
        (Bits::Four, 128),
        (Bits::Eight, 32),
    ] {
        let settings = settings(bits, GroupSize::Columns(group));
        let gptq = solve(&w, &Factor::new(&h, true, 0.01).unwrap(), &settings).dequantize();
        let rtn = round_to_nearest(&w, &settings).dequantize();
        let (gptq, rtn) = (
            output_energy(&(&w - gptq), &h),
            output_energy(&(&w - rtn), &h),
        );
        assert!(gptq < 0.8 * rtn, "{bits} bits: {gptq} against {rtn}");
    }
}

#[test]
fn groups_that_do_not_fit_the_block_are_solved_whole() {
    let (w, h) = problem(8, 192, 8);
    let factor = Factor::new(&h, true, 0.1).unwrap();
    for group in [24, 48, 96, 192] {
        let settings = settings(Bits::Four, GroupSize::Columns(group));
        let solution = solve(&w, &factor, &settings);
        assert_eq!(solution.scales.shape(), (8, 192 / group));
        let rtn = round_to_nearest(&w, &settings).dequantize();
        assert!(output_energy(&(&w - solution.dequantize()), &h) < output_energy(&(&w - rtn), &h));
    }
}

/// AutoGPTQ's own results; `tests/golden/README.md` describes how they were made.
struct Golden {
    bytes: Vec<u8>,
    cases: Vec<serde_json::Value>,
}

impl Golden {
    fn load() -> Golden {
        let dir = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/autogptq_solver"
        );
        Golden {
            bytes: std::fs::read(format!("{dir}.safetensors")).unwrap(),
            cases: serde_json::from_slice(&std::fs::read(format!("{dir}.json")).unwrap()).unwrap(),
        }
    }

    /// Returns a tensor of any dtype as an f64 matrix `[rows, cols]`.
    fn matrix(&self, name: &str) -> DMatrix<f64> {
        let file = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let bytes = view.data();
        let values: Vec<f64> = match view.dtype() {
            safetensors::Dtype::F64 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b))
                .collect(),
            safetensors::Dtype::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect(),
            safetensors::Dtype::F16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).to_f64())
                .collect(),
            safetensors::Dtype::I32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f64::from(i32::from_le_bytes(*b)))
                .collect(),
            safetensors::Dtype::U8 => bytes.iter().map(|&b| f64::from(b)).collect(),
            other => panic!("{other:?}"),
        };
        let rows = if view.shape().len() == 2 {
            view.shape()[0]
        } else {
            1
        };
        DMatrix::from_row_slice(rows, values.len() / rows, &values)
    }
}

fn case_settings(case: &serde_json::Value) -> Settings {
    let flag = |key: &str| case[key].as_bool().unwrap();
    Settings {
        bits: Bits::try_from(case["bits"].as_u64().unwrap() as u32).unwrap(),
        group_size: GroupSize::try_from(case["group_size"].as_i64().unwrap()).unwrap(),
        sym: flag("sym"),
        static_groups: flag("static_groups"),
        scale_search: false,
        f16_scales: false,
        refine: 0,
    }
}

/// Runs `check(name, w, h, factor inputs, settings, entry)` on all 24 cases.
fn each_golden_case(
    mut check: impl FnMut(&Golden, &str, &DMatrix<f64>, &DMatrix<f64>, &serde_json::Value),
) {
    let golden = Golden::load();
    let mut layers = BTreeMap::new();
    assert_eq!(golden.cases.len(), 24);
    for entry in &golden.cases {
        let layer = entry["layer"].as_str().unwrap();
        let (w, h) = layers.entry(layer.to_owned()).or_insert_with(|| {
            (
                golden.matrix(&format!("{layer}/weight")),
                golden.matrix(&format!("{layer}/hessian")),
            )
        });
        check(&golden, layer, w, h, entry);
    }
}

fn factor_for<T: Real>(h: &DMatrix<T>, case: &serde_json::Value) -> Factor<T> {
    Factor::new(
        h,
        case["desc_act"].as_bool().unwrap(),
        case["damp_percent"].as_f64().unwrap(),
    )
    .unwrap()
}

#[test]
fn f64_codes_agree_with_autogptq_but_for_exact_ties() {
    each_golden_case(|golden, layer, w, h, entry| {
        let case = &entry["case"];
        let name = case["name"].as_str().unwrap();
        let prefix = format!("{layer}/{name}");
        let codes = golden.matrix(&format!("{prefix}/codes"));
        let scales = golden.matrix(&format!("{prefix}/scales"));
        let factor = factor_for(h, case);
        let ours = solve(w, &factor, &case_settings(case));

        let g_idx = golden.matrix(&format!("{prefix}/g_idx"));
        assert!(
            ours.g_idx
                .iter()
                .zip(g_idx.iter())
                .all(|(&a, &b)| a as f64 == b),
            "{prefix}: g_idx"
        );
        let zeros = golden.matrix(&format!("{prefix}/zeros"));

        // A tie broken the other way changes the rest of its row, so a row is followed up to its
        // first difference, which must be a tie: the weight to be rounded, from AutoGPTQ's own
        // codes before it and W + (W - Q) Ũ, lies half way between two codes.
        let n = w.ncols();
        let mut tied_rows = 0;
        for r in 0..w.nrows() {
            let differs = |&k: &usize| {
                let c = factor.order[k];
                f64::from(ours.codes[(r, c)]) != codes[(r, c)]
            };
            let Some(k) = (0..n).find(differs) else {
                for g in 0..scales.ncols() {
                    let (a, b) = (ours.scales[(r, g)], scales[(r, g)]);
                    assert!(
                        (a - b).abs() <= 1e-9 * b,
                        "{prefix}: scale [{r}, {g}] {a} {b}"
                    );
                    assert_eq!(
                        f64::from(ours.zeros[(r, g)]),
                        zeros[(r, g)],
                        "{prefix}: zero"
                    );
                }
                continue;
            };
            let mut value = w[(r, factor.order[k])];
            for p in 0..k {
                let c = factor.order[p];
                let g = g_idx[(0, c)] as usize;
                let q = scales[(r, g)] * (codes[(r, c)] - zeros[(r, g)]);
                value += (w[(r, c)] - q) * factor.upper[(p, k)] / factor.upper[(k, k)];
            }
            let c = factor.order[k];
            let steps = value / scales[(r, g_idx[(0, c)] as usize)];
            let from_tie = (steps - steps.floor() - 0.5).abs();
            assert!(
                from_tie < 1e-9,
                "{prefix}: row {r} column {c} differs, {from_tie} from a tie"
            );
            tied_rows += 1;
        }
        assert!(
            tied_rows * 50 <= w.nrows(),
            "{prefix}: {tied_rows} rows hit a tie"
        );

        // The error measured by AutoGPTQ's run is ours, too.
        let error = output_energy(&(w - ours.dequantize()), h) / output_energy(w, h);
        let theirs = entry["relative_output_error"].as_f64().unwrap();
        assert!(
            (error / theirs - 1.0).abs() < 1e-3,
            "{prefix}: error {error} against {theirs}"
        );
    });
}

#[test]
fn f32_agrees_with_autogptq_on_nearly_every_code() {
    each_golden_case(|golden, layer, w, h, entry| {
        let case = &entry["case"];
        let prefix = format!("{layer}/{}", case["name"].as_str().unwrap());
        let codes = golden.matrix(&format!("{prefix}/codes"));
        let (w32, h32) = (w.map(|v| v as f32), h.map(|v| v as f32));
        let ours = solve(&w32, &factor_for(&h32, case), &case_settings(case));
        let same = ours
            .codes
            .iter()
            .zip(codes.iter())
            .filter(|&(&a, &b)| f64::from(a) == b)
            .count();
        let share = same as f64 / codes.len() as f64;
        assert!(share >= 0.995, "{prefix}: {share} of the codes");
        let q = ours.dequantize().map(f64::from);
        let error = output_energy(&(w - q), h) / output_energy(w, h);
        let theirs = entry["relative_output_error"].as_f64().unwrap();
        assert!(
            (error / theirs - 1.0).abs() < 0.01,
            "{prefix}: {error} against {theirs}"
        );
    });
}

#[test]
fn rounding_scales_to_f16_first_costs_no_accuracy() {
    each_golden_case(|_, layer, w, h, entry| {
        let case = &entry["case"];
        let settings = Settings {
            f16_scales: true,
            ..case_settings(case)
        };
        let ours = solve(w, &factor_for(h, case), &settings);
        let error = output_energy(&(w - ours.dequantize()), h) / output_energy(w, h);
        let theirs = entry["relative_output_error"].as_f64().unwrap();
        assert!(
            error / theirs < 1.02,
            "{layer} {case}: {error} against {theirs}"
        );
        // The written weights are the solved ones: f16 scales convert without loss.
        let written = ours.clone().into_quantized().dequantize();
        let solved = ours.dequantize();
        for (i, value) in written.iter().enumerate() {
            let exact = solved[(i / w.ncols(), i % w.ncols())];
            assert!((f64::from(*value) - exact).abs() <= 6e-8 * exact.abs());
        }
    });
}

#[test]
fn searching_scales_lowers_the_error_of_real_layers() {
    each_golden_case(|_, layer, w, h, entry| {
        let case = &entry["case"];
        let settings = Settings {
            scale_search: true,
            f16_scales: true,
            ..case_settings(case)
        };
        let ours = solve(w, &factor_for(h, case), &settings);
        let error = output_energy(&(w - ours.dequantize()), h) / output_energy(w, h);
        let plain = entry["relative_output_error"].as_f64().unwrap();
        // At 8 bits clipping gains little; below, the gain is 4 to 50 %.
        let bound = if settings.bits == Bits::Eight {
            1.01
        } else {
            0.97
        };
        assert!(error / plain < bound, "{layer} {case}: {}", error / plain);
    });
}

#[test]
fn packing_gives_autogptqs_words() {
    let golden = Golden::load();
    let layer = "packed/model.layers.0.self_attn.q_proj";
    for (name, bits, group) in [
        ("w2g64", Bits::Two, 64),
        ("w3g128", Bits::Three, 128),
        ("w4g128", Bits::Four, 128),
        ("w8g32", Bits::Eight, 32),
    ] {
        let get = |part: &str| golden.matrix(&format!("{layer}/{name}/{part}"));
        let linear = QuantizedLinear {
            bits,
            in_features: 256,
            out_features: 256,
            // Column-major memory of [out, in] is the [in, out] order of the format.
            codes: get("codes").iter().map(|&v| v as u8).collect(),
            scales: get("scales")
                .transpose()
                .iter()
                .map(|&v| f16::from_f64(v))
                .collect(),
            zeros: get("zeros").iter().map(|&v| v as u8).collect(),
            g_idx: get("g_idx").iter().map(|&v| v as i32).collect(),
        };
        assert_eq!(linear.groups(), 256 / group);
        let packed = linear.pack();
        let encoded = AutoGptq::V1.encode(name, &packed).unwrap();
        let words = |m: DMatrix<f64>| {
            m.transpose()
                .iter()
                .flat_map(|&v| (v as i64 as u32).to_le_bytes())
                .collect::<Vec<_>>()
        };
        for (part, suffix) in encoded.iter().zip(["qweight", "qzeros"]) {
            assert_eq!(part.suffix, suffix);
            assert_eq!(*part.bytes, words(get(suffix)), "{name} {suffix}");
        }
        assert_eq!(packed.unpack(), linear);
    }
}
