//! Attention of one new token over a cache, with all that surrounds it, in one launch.
//!
//! A cube has one query head. Its planes take the keys in turn, each with a running maximum `m`, sum
//! `l = Σ exp(s - m)` and `a = Σ exp(s - m) v`; in the end these meet in shared memory, in a fixed order. A
//! unit holds the same few elements of every row of `dim`. The new key is rotated, and written with its
//! value to row `at` of the caches by the first query head of those that share them; no cube reads that row.

use std::mem;

use burn::tensor::{DType, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};

use super::{
    Cuda,
    buffer::{self, array},
    error::Error,
};
use crate::Scores;

/// Units of a plane, and planes of a cube.
const UNITS: usize = 32;
const PLANES: usize = 16;
/// Keys that a plane asks for at once.
const KEYS: usize = 4;
/// Below every score; its difference from any of them is an exponent of zero.
const LOWEST: f32 = -1e30;

/// This unit's elements of head `start`, rotated, rounded as [`super::rotary`] does.
#[cube]
fn rotated<F: Float, N: Size>(
    x: &Array<Vector<F, N>>,
    start: usize,
    cos: Vector<f32, N>,
    sin: Vector<f32, N>,
) -> Vector<F, N> {
    let lane = UNIT_POS_X as usize;
    let own = Vector::<f32, N>::cast_from(x[start + lane]);
    let other = Vector::<f32, N>::cast_from(x[start + (lane + UNITS / 2) % UNITS]);
    let mut sign = f32::new(1.0);
    if lane < UNITS / 2 {
        sign = f32::new(-1.0);
    }
    Vector::<F, N>::cast_from(own * cos + other * sin * Vector::<f32, N>::new(sign))
}

/// `Σ a b` over the plane.
#[cube]
fn dot<N: Size>(a: Vector<f32, N>, b: Vector<f32, N>) -> f32 {
    let product = a * b;
    let mut sum = f32::new(0.0);
    #[unroll]
    for i in 0..product.vector_size() {
        sum += product[i];
    }
    plane_sum(sum)
}

/// A score below its bound: `cap tanh(score / cap)`.
#[cube]
fn bounded(score: f32, cap: f32, #[comptime] softcap: bool) -> f32 {
    if comptime!(softcap) {
        cap - 2.0 * cap / (1.0 + (2.0 * score / cap).exp())
    } else {
        score
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn decode_attention_kernel<F: Float, N: Size>(
    q: &Array<Vector<F, N>>,
    k: &Array<Vector<F, N>>,
    v: &Array<Vector<F, N>>,
    cos: &Array<Vector<f32, N>>,
    sin: &Array<Vector<f32, N>>,
    keys: &mut Array<Vector<F, N>>,
    values: &mut Array<Vector<F, N>>,
    out: &mut Array<Vector<F, N>>,
    shared: u32,
    capacity: u32,
    at: u32,
    begin: u32,
    scale: f32,
    cap: f32,
    #[comptime] softcap: bool,
    #[define(F)] _dtype: StorageType,
) {
    let mut high = SharedMemory::<f32>::new(PLANES);
    let mut sums = SharedMemory::<f32>::new(PLANES);
    let mut parts = SharedMemory::<Vector<f32, N>>::new(comptime!(PLANES * UNITS));
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let head = CUBE_POS_X as usize;
    let kv_head = head / shared as usize;
    let at = at as usize;
    let cos = cos[lane % (UNITS / 2)];
    let sin = sin[lane % (UNITS / 2)];
    let query = Vector::<f32, N>::cast_from(rotated(q, head * UNITS, cos, sin))
        * Vector::<f32, N>::new(scale);
    let first = kv_head * capacity as usize * UNITS + lane;

    let mut m = f32::new(LOWEST);
    let mut l = f32::new(0.0);
    let mut a = Vector::<f32, N>::new(0.0);
    if plane == 0 {
        let key = rotated(k, kv_head * UNITS, cos, sin);
        let value = v[kv_head * UNITS + lane];
        if kv_head * shared as usize == head {
            keys[first + at * UNITS] = key;
            values[first + at * UNITS] = value;
        }
        let found = dot(query, Vector::<f32, N>::cast_from(key));
        m = bounded(found, cap, softcap);
        l = f32::new(1.0);
        a = Vector::<f32, N>::cast_from(value);
    }
    let mut j = begin as usize + plane;
    while j < at {
        let mut key = Array::<Vector<F, N>>::new(KEYS);
        let mut value = Array::<Vector<F, N>>::new(KEYS);
        let mut score = Array::<f32>::new(KEYS);
        #[unroll]
        for i in 0..KEYS {
            // Row 0 stands in for rows that are not there.
            let row = select(j + i * PLANES < at, j + i * PLANES, 0);
            key[i] = keys[first + row * UNITS];
            value[i] = values[first + row * UNITS];
        }
        let mut highest = m;
        #[unroll]
        for i in 0..KEYS {
            let found = dot(query, Vector::<f32, N>::cast_from(key[i]));
            let found = bounded(found, cap, softcap);
            score[i] = select(j + i * PLANES < at, found, f32::new(LOWEST));
            highest = highest.max(score[i]);
        }
        let keep = (m - highest).exp();
        l *= keep;
        a *= Vector::<f32, N>::new(keep);
        #[unroll]
        for i in 0..KEYS {
            let weight = (score[i] - highest).exp();
            l += weight;
            a += Vector::<f32, N>::cast_from(value[i]) * Vector::<f32, N>::new(weight);
        }
        m = highest;
        j += comptime!(KEYS * PLANES);
    }
    parts[plane * UNITS + lane] = a;
    if lane == 0 {
        high[plane] = m;
        sums[plane] = l;
    }
    sync_cube();
    if plane == 0 {
        let mut highest = high[0];
        #[unroll]
        for other in 1..PLANES {
            highest = highest.max(high[other]);
        }
        let mut total = f32::new(0.0);
        let mut all = Vector::<f32, N>::new(0.0);
        #[unroll]
        for other in 0..PLANES {
            let keep = (high[other] - highest).exp();
            total += sums[other] * keep;
            all += parts[other * UNITS + lane] * Vector::<f32, N>::new(keep);
        }
        out[head * UNITS + lane] = Vector::<F, N>::cast_from(all / Vector::<f32, N>::new(total));
    }
}

/// Returns true if [`attend_next`] takes heads of `dim` elements: a power of two of them per unit.
pub(crate) fn attends(dim: usize) -> bool {
    matches!(dim, 64 | 128 | 256)
}

/// See [`crate::Engine::attend_next`].
///
/// # Errors
///
/// Other dtypes, shapes that do not fit, or a cache that is full.
pub fn attend_next(
    [q, k, v]: [Tensor<Cuda, 4>; 3],
    [cos, sin]: [Tensor<Cuda, 2>; 2],
    keys: &mut Tensor<Cuda, 3>,
    values: &mut Tensor<Cuda, 3>,
    at: usize,
    scores: Scores,
) -> Result<Tensor<Cuda, 3>, Error> {
    let [_, _, heads, dim] = q.dims();
    let [kv_heads, capacity, _] = keys.dims();
    let fits = q.dims() == [1, 1, heads, dim]
        && [&k, &v].iter().all(|x| x.dims() == [1, 1, kv_heads, dim])
        && [&*keys, &*values]
            .iter()
            .all(|x| x.dims() == [kv_heads, capacity, dim])
        && [&cos, &sin].iter().all(|x| x.dims() == [1, dim / 2])
        && heads.is_multiple_of(kv_heads)
        && at < capacity
        && attends(dim);
    if !fits {
        return Err(Error::Shape {
            operation: "attend_next",
            reason: format!(
                "q {:?}, k {:?}, v {:?}, keys {:?}, values {:?}, cos {:?}, sin {:?}, row {at}",
                q.dims(),
                k.dims(),
                v.dims(),
                keys.dims(),
                values.dims(),
                cos.dims(),
                sin.dims()
            ),
        });
    }
    // The caches are written to, so they must have no other holder: the caller's handle makes room for a tensor
    // that is at hand, and what somebody else holds still is copied.
    let aside = v.clone().reshape([1, kv_heads, dim]);
    let own = |name, held: &mut Tensor<Cuda, 3>| {
        let held = buffer::half("attend_next", name, mem::replace(held, aside.clone()))?;
        Ok::<_, Error>(if held.can_mut() { held } else { held.copy() })
    };
    let (held_keys, held_values) = (own("keys", keys)?, own("values", values)?);
    let half = |name, x| buffer::half("attend_next", name, x);
    let single = |name, x| buffer::float("attend_next", name, x, DType::F32);
    let (q, k, v) = (half("q", q)?, half("k", k)?, half("v", v)?);
    let (cos, sin) = (single("cos", cos)?, single("sin", sin)?);
    let out = buffer::empty(&q, [1, 1, heads * dim], q.dtype);
    // SAFETY: a cube per query head; rows below `capacity` of `kv_heads` caches, `UNITS` vectors each.
    unsafe {
        decode_attention_kernel::launch_unchecked::<CudaRuntime>(
            &out.client,
            CubeCount::new_1d(heads as u32),
            CubeDim::new_2d(UNITS as u32, PLANES as u32),
            dim / UNITS,
            array(&q),
            array(&k),
            array(&v),
            array(&cos),
            array(&sin),
            array(&held_keys),
            array(&held_values),
            array(&out),
            (heads / kv_heads) as u32,
            capacity as u32,
            at as u32,
            scores.first_key(at) as u32,
            scores
                .scale
                .map_or((dim as f32).sqrt().recip(), |it| it as f32),
            scores.softcap.unwrap_or(1.0) as f32,
            scores.softcap.is_some(),
            q.dtype.into(),
        );
    }
    *keys = buffer::into_float(held_keys);
    *values = buffer::into_float(held_values);
    Ok(buffer::into_float(out))
}
