//! Measures the CUDA engine's operations at the shapes of a 7B layer and prints a table.
//!
//! Each figure is the median of repeated runs between two synchronizations of the device, on random
//! values, compared with the device's peak rates. Run it alone on the device. The arguments
//! `solve`, `forward` or `generate` select one part; scales are searched, as by default, unless
//! `plain` is given.

use std::time::Instant;

use burn::tensor::{DType, Distribution, Int, Tensor, TensorData, backend::Backend};
use cudarc::driver::CudaContext;
use gptq_format::{Bits, GroupSize, PackedLinear};
use gptq_kernels::cuda::{
    Cuda, Device, attend_next, causal_attention, embedding, gram_add, gram_zeros, linear,
    packed_linear, resident, rms_norm, rotary, solve, swiglu,
};
use gptq_kernels::{HessianOptions, Problem, Request, Scores};
use gptq_solver::Settings;
use half::f16;

const WINDOW: usize = 4096;
const HIDDEN: usize = 4096;
const WIDE: usize = 11008;
const HEADS: usize = 32;
const HEAD: usize = 128;
/// Windows per call, and in total.
const CHUNK: usize = 4;
const WINDOWS: usize = 128;

fn random<const D: usize>(shape: [usize; D], deviation: f64, device: &Device) -> Tensor<Cuda, D> {
    let distribution = Distribution::Normal(0.0, deviation);
    Tensor::random(shape, distribution, (device, DType::F16))
}

/// Returns the median seconds of `run`, after a warm-up run; results are kept until the device is
/// done.
fn seconds<T>(device: &Device, repeats: usize, mut run: impl FnMut() -> T) -> f64 {
    let mut once = || {
        Cuda::sync(device).expect("the device answers");
        let start = Instant::now();
        let kept = run();
        Cuda::sync(device).expect("the device answers");
        drop(kept);
        start.elapsed().as_secs_f64()
    };
    let cold = once();
    if cold > 1.0 {
        println!("  (first run {cold:.2} s)");
    }
    let mut times: Vec<f64> = (0..repeats).map(|_| once()).collect();
    times.sort_by(f64::total_cmp);
    times[repeats / 2]
}

/// Peak rates of the device.
struct Ceilings {
    /// Copy from device to device, bytes read and written, in GB/s.
    copy: f64,
    /// An f16 product of square matrices by cuBLAS, in TFLOP/s.
    product: f64,
}

impl Ceilings {
    fn measure(device: &Device) -> Ceilings {
        const BYTES: usize = 1 << 30;
        const SIDE: usize = 8192;
        let context = CudaContext::new(device.index).expect("the device was found");
        let stream = context.default_stream();
        let from = stream.alloc_zeros::<u8>(BYTES).expect("1 GiB is free");
        let mut to = stream.alloc_zeros::<u8>(BYTES).expect("1 GiB is free");
        let copy = seconds(device, 20, || {
            stream.memcpy_dtod(&from, &mut to).expect("a copy");
            stream.synchronize().expect("the device answers");
        });
        drop((from, to));
        // Dropping the last owner would destroy the context that Burn uses.
        std::mem::forget(context);
        let [x, w] = [0; 2].map(|_| random([SIDE, SIDE], 1.0, device));
        let product = seconds(device, 20, || linear(x.clone(), w.clone()).unwrap());
        let ceilings = Ceilings {
            copy: 2.0 * BYTES as f64 / 1e9 / copy,
            product: 2.0 * (SIDE as f64).powi(3) / 1e12 / product,
        };
        println!(
            "| ceiling: copy of 1 GiB | {:.3} ms | {:.0} GB/s | |\n\
             | ceiling: product [8192, 8192] -> 8192 | {:.3} ms | {:.0} TFLOP/s | |",
            copy * 1e3,
            ceilings.copy,
            product * 1e3,
            ceilings.product
        );
        ceilings
    }

    /// Prints a row for `amount` TFLOP or GB in `time` seconds.
    fn row(&self, name: &str, time: f64, amount: f64, unit: &str) {
        let ceiling = match unit {
            "TFLOP/s" => self.product,
            _ => self.copy,
        };
        let rate = amount / time;
        println!(
            "| {name} | {:.3} ms | {rate:.0} {unit} | {:.0} % |",
            time * 1e3,
            100.0 * rate / ceiling
        );
    }
}

fn main() {
    if gptq_kernels::Device::Cuda(0).resolve().is_err() {
        println!("skipped: no CUDA device");
        return;
    }
    let device = Device::new(0);
    let only = std::env::args().nth(1).filter(|arg| arg != "plain");
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    println!("| operation | median | rate | of the ceiling |\n|---|---|---|---|");
    let ceilings = Ceilings::measure(&device);
    if wanted("forward") {
        let time = forward(&device, &ceilings) * (WINDOWS / CHUNK) as f64;
        println!(
            "| layer, {WINDOWS} windows: forward and Gram | {:.0} ms | | |",
            time * 1e3
        );
    }
    if wanted("generate") {
        generate(&device, &ceilings);
    }
    if wanted("solve") {
        println!("| layer: solving | {:.0} ms | | |", solving(&device) * 1e3);
    }
}

/// Measures the forward pass and the Gram matrices of a chunk of windows; returns seconds.
fn forward(device: &Device, ceilings: &Ceilings) -> f64 {
    let tokens = CHUNK * WINDOW;
    let mut forward = 0.0;

    for (inside, outs) in [(HIDDEN, &[HIDDEN, WIDE][..]), (WIDE, &[HIDDEN][..])] {
        let x = random([tokens, inside], 1.0, device);
        for &out in outs {
            let w = random([out, inside], 0.02, device);
            let time = seconds(device, 20, || linear(x.clone(), w.clone()).unwrap());
            let work = 2.0 * (tokens * inside * out) as f64;
            ceilings.row(
                &format!("linear [{tokens}, {inside}] -> {out}"),
                time,
                work / 1e12,
                "TFLOP/s",
            );
            let layers = if inside == WIDE {
                1.0
            } else if out == WIDE {
                2.0
            } else {
                4.0
            };
            forward += layers * time;
        }
        let mut gram = Some(gram_zeros([inside, inside], device).unwrap());
        let time = seconds(device, 20, || {
            gram = Some(gram_add(gram.take().unwrap(), x.clone()).unwrap());
        });
        let work = 2.0 * (tokens * inside * inside) as f64;
        let name = format!("gram [{tokens}, {inside}], as if full");
        ceilings.row(&name, time, work / 1e12, "TFLOP/s");
        forward += if inside == WIDE { time } else { 3.0 * time };
    }

    let shape = [CHUNK, WINDOW, HEADS, HEAD];
    let [q, k, v] = [0; 3].map(|_| random(shape, 1.0, device));
    let time = seconds(device, 10, || {
        causal_attention(q.clone(), k.clone(), v.clone(), Scores::default()).unwrap()
    });
    let work = 2.0 * (CHUNK * HEADS * WINDOW * WINDOW * HEAD) as f64;
    ceilings.row(
        "causal attention [4, 4096, 32, 128]",
        time,
        work / 1e12,
        "TFLOP/s",
    );
    forward += time;
    for (what, scores) in [
        (
            "window of 1024",
            Scores {
                window: Some(1024),
                ..Scores::default()
            },
        ),
        (
            "softcap",
            Scores {
                softcap: Some(50.0),
                ..Scores::default()
            },
        ),
    ] {
        let time = seconds(device, 10, || {
            causal_attention(q.clone(), k.clone(), v.clone(), scores).unwrap()
        });
        let seen = match scores.window {
            Some(window) => (window * (2 * WINDOW - window)) as f64,
            None => (WINDOW * WINDOW) as f64,
        };
        let work = 2.0 * (CHUNK * HEADS * HEAD) as f64 * seen;
        let name = format!("causal attention [4, 4096, 32, 128], {what}");
        ceilings.row(&name, time, work / 1e12, "TFLOP/s");
    }
    let gemma = [CHUNK, WINDOW, 16, 256];
    let [gq, gk, gv] = [0; 3].map(|_| random(gemma, 1.0, device));
    for (what, scores) in [
        ("plain", Scores::default()),
        (
            "softcap",
            Scores {
                softcap: Some(50.0),
                ..Scores::default()
            },
        ),
    ] {
        let time = seconds(device, 10, || {
            causal_attention(gq.clone(), gk.clone(), gv.clone(), scores).unwrap()
        });
        let work = 2.0 * (CHUNK * 16 * WINDOW * WINDOW * 256) as f64;
        let name = format!("causal attention [4, 4096, 16, 256], {what}");
        ceilings.row(&name, time, work / 1e12, "TFLOP/s");
    }

    let gigabytes = |elements: usize| (elements * 2) as f64 / 1e9;
    let x = random([tokens, HIDDEN], 1.0, device);
    let weight = random([HIDDEN], 1.0, device);
    let time = seconds(device, 20, || {
        rms_norm(x.clone(), weight.clone(), 1e-5).unwrap()
    });
    ceilings.row(
        "rms_norm [16384, 4096]",
        time,
        gigabytes(2 * tokens * HIDDEN),
        "GB/s",
    );
    forward += 2.0 * time;
    let table = Tensor::<Cuda, 2>::random(
        [WINDOW, HEAD / 2],
        Distribution::Uniform(-1.0, 1.0),
        (device, DType::F32),
    );
    let time = seconds(device, 20, || {
        rotary(q.clone(), table.clone(), table.clone()).unwrap()
    });
    ceilings.row(
        "rotary [4, 4096, 32, 128]",
        time,
        gigabytes(2 * tokens * HIDDEN),
        "GB/s",
    );
    forward += 2.0 * time;
    let gate = random([tokens, WIDE], 1.0, device);
    let up = random([tokens, WIDE], 1.0, device);
    let time = seconds(device, 20, || swiglu(gate.clone(), up.clone()).unwrap());
    ceilings.row(
        "swiglu [16384, 11008]",
        time,
        gigabytes(3 * tokens * WIDE),
        "GB/s",
    );
    forward += time;
    let time = seconds(device, 20, || {
        x.clone() + q.clone().reshape([tokens, HIDDEN])
    });
    ceilings.row(
        "residual (Burn) [16384, 4096]",
        time,
        gigabytes(3 * tokens * HIDDEN),
        "GB/s",
    );
    forward += 2.0 * time;
    let ids: Vec<i32> = (0..tokens as i32).map(|at| at * 7919 % 32_000).collect();
    let ids =
        Tensor::<Cuda, 1, Int>::from_data(TensorData::new(ids, [tokens]), (device, DType::I32));
    let words = random([32_000, HIDDEN], 1.0, device);
    let time = seconds(device, 20, || {
        embedding(ids.clone(), words.clone()).unwrap()
    });
    ceilings.row(
        "embedding [16384, 4096]",
        time,
        gigabytes(2 * tokens * HIDDEN),
        "GB/s",
    );
    forward
}

/// Measures one token: attention over a cache, and linear layers on packed weights. More weights
/// than fit the L2 cache take turns.
fn generate(device: &Device, ceilings: &Ceilings) {
    const BYTES: usize = 400 << 20;
    for held in [128, 1024, WINDOW] {
        let bytes = 2 * 2 * HEADS * held * HEAD;
        let one = || random([1, 1, HEADS, HEAD], 1.0, device);
        let table = || random([1, HEAD / 2], 1.0, device).cast(DType::F32);
        let (q, k, v, cos, sin) = (one(), one(), one(), table(), table());
        let mut caches: Vec<_> = (0..BYTES.div_ceil(bytes).min(64))
            .map(|_| [0; 2].map(|_| random([HEADS, held + 1, HEAD], 1.0, device)))
            .collect();
        let count = caches.len();
        let time = seconds(device, 10, || {
            let each = caches.iter_mut().map(|[keys, values]| {
                let qkv = [q.clone(), k.clone(), v.clone()];
                let (tables, plain) = ([cos.clone(), sin.clone()], Scores::default());
                attend_next(qkv, tables, keys, values, held, plain).unwrap()
            });
            each.collect::<Vec<_>>()
        });
        ceilings.row(
            &format!("attention of one token over {held}, 32 heads of 128"),
            time / count as f64,
            bytes as f64 / 1e9,
            "GB/s",
        );
    }
    for (bits, code) in [(Bits::Four, 0x7654_3210), (Bits::Eight, 0x7080_9010)] {
        for [inside, out] in [[HIDDEN, HIDDEN], [HIDDEN, WIDE], [WIDE, HIDDEN]] {
            let (b, groups) = (bits.get(), inside / 128);
            let packed = PackedLinear {
                bits,
                in_features: inside,
                out_features: out,
                codes: vec![code; inside / 32 * b * out],
                scales: vec![f16::from_f32(0.01); groups * out],
                zeros: vec![bits.symmetric_zero(); groups * out],
                // With act order, a group's columns are not contiguous.
                g_idx: (0..inside)
                    .map(|i| (i * 5 % inside % groups) as i32)
                    .collect(),
            };
            // A cell of the grid holds scale and zero point.
            let bytes = 4 * (packed.codes.len() + packed.scales.len());
            let layers: Vec<_> = (0..BYTES.div_ceil(bytes))
                .map(|_| resident(&packed, device).unwrap())
                .collect();
            let x = random([1, inside], 1.0, device);
            let time = seconds(device, 10, || {
                let each = layers
                    .iter()
                    .map(|layer| packed_linear(x.clone(), layer).unwrap());
                each.collect::<Vec<_>>()
            });
            ceilings.row(
                &format!("packed linear, one token, {b} bits, [{out}, {inside}]"),
                time / layers.len() as f64,
                bytes as f64 / 1e9,
                "GB/s",
            );
        }
    }
}

/// Returns the seconds for solving all linear layers of a decoder layer.
fn solving(device: &Device) -> f64 {
    let tokens = CHUNK * WINDOW;
    let mut solving = 0.0;
    for (subset, inside, outs) in [
        ("q, k, v", HIDDEN, &[HIDDEN, HIDDEN, HIDDEN][..]),
        ("o", HIDDEN, &[HIDDEN][..]),
        ("gate, up", HIDDEN, &[WIDE, WIDE][..]),
        ("down", WIDE, &[HIDDEN][..]),
    ] {
        let x = random([tokens, inside], 1.0, device);
        let gram = gram_add(gram_zeros([inside, inside], device).unwrap(), x).unwrap();
        let settings = Settings {
            bits: Bits::Four,
            group_size: GroupSize::Columns(128),
            sym: true,
            static_groups: false,
            scale_search: !std::env::args().any(|arg| arg == "plain"),
            f16_scales: true,
            refine: 0,
        };
        let layers: Vec<_> = outs
            .iter()
            .map(|&out| Request {
                weight: random([out, inside], 0.02, device),
                settings,
                residual: None,
                keep_unrounded: false,
            })
            .collect();
        let hessian = HessianOptions {
            act_order: true,
            damping: 0.1,
        };
        let mut errors = [0.0; 2];
        let time = seconds(device, 3, || {
            let problem = Problem {
                gram: gram.clone(),
                mismatch: None,
                requests: layers.clone(),
            };
            let subset = solve(vec![problem], hessian).unwrap().remove(0);
            errors = [subset.solved[0].relative_error, subset.solved[0].rtn_error];
        });
        println!(
            "| solve {subset} ({inside} columns) | {:.1} ms | errors {errors:.5?} | |",
            time * 1e3
        );
        solving += time;
    }
    solving
}
