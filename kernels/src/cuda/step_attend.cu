// Macro: DIM of a head.

// Attention of the new token over the cache, with all that surrounds it: a block is one query head and one part of the
// keys, whose results the last block of a head to end puts together.
struct Attend {
  const Half *q, *k, *v;
  const int* token;    // the token, and its position
  const float* table;  // cosines and sines of DIM / 2 frequencies; null if nothing is rotated
  Half *keys, *values; // [kv_heads, capacity, DIM]
  Half* out;
  float* scratch;  // [heads, splits, DIM + 2]
  int* ended;      // [heads], zeros between launches
  int heads, kv_heads, capacity, splits, window;
  float scale, cap;
};

// Lanes that have a key together, 8 features each; keys of a warp at once, in each of KEYS turns.
#define LANES (DIM / 8)
#define GROUPS (32 / LANES)
#define KEYS 4

struct Eight { float x[8]; };

__device__ __forceinline__ Eight widened(uint4 raw) {
  Eight r;
  const Half* h = (const Half*)&raw;
  for (int i = 0; i < 8; i++) r.x[i] = wide(h[i]);
  return r;
}

__device__ __forceinline__ uint4 eight_of(const Half* row) { return *(const uint4*)(row + threadIdx.x % LANES * 8); }

__device__ __forceinline__ Eight rotated(Eight r, const float* table) {
  const int lane = threadIdx.x % LANES;
  Eight y = r;
  for (int i = 0; i < 8; i++) {
    float other = __shfl_xor_sync(0xffffffffu, r.x[i], LANES / 2);
    int at = lane % (LANES / 2) * 8 + i;
    if (table) y.x[i] = wide(narrow(r.x[i] * table[at] + (lane < LANES / 2 ? -other : other) * table[DIM / 2 + at]));
  }
  return y;
}

__device__ __forceinline__ float dot(const Eight& a, const Eight& b) {
  float sum = 0;
  for (int i = 0; i < 8; i++) sum += a.x[i] * b.x[i];
  for (int d = LANES / 2; d > 0; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) attend(const __grid_constant__ Attend p) {
  constexpr int TURN = WARPS * GROUPS * KEYS;
  __shared__ float high[WARPS * GROUPS], sums[WARPS * GROUPS], parts[WARPS * GROUPS][DIM];
  __shared__ int last;
  const int group = threadIdx.x / LANES, lane = threadIdx.x % LANES, head = blockIdx.x, split = blockIdx.y;
  const int shares = p.heads / p.kv_heads, kv_head = head / shares;
  let_next_begin();
  // The token, the table and earlier rows of the cache are there before the step begins.
  const int at = p.token[1], begin = p.window > 0 && at >= p.window ? at - p.window + 1 : 0;
  // Splits have whole turns of keys; those that would have none are not needed.
  const int turns = (at - begin + TURN - 1) / TURN, each = max(1, (turns + p.splits - 1) / p.splits);
  const int needed = max(1, (turns + each - 1) / each);
  if (split >= needed) {
    wait_for_last();
    return;
  }
  const Half *keys = p.keys + (long long)kv_head * p.capacity * DIM, *values = p.values + (long long)kv_head * p.capacity * DIM;
  const int start = begin + split * each * TURN, stop = min(at, start + each * TURN);
  uint4 k[KEYS], v[KEYS];
  auto ask = [&](int first) {
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      // Another row stands in for those that are not there.
      int row = first + i * WARPS * GROUPS + group;
      row = row < stop ? row : start;
      k[i] = eight_of(keys + (long long)row * DIM);
      v[i] = eight_of(values + (long long)row * DIM);
    }
  };
  if (start < stop) ask(start);
  wait_for_last();
  const Eight q = rotated(widened(eight_of(p.q + head * DIM)), p.table);
  auto bounded = [&](float s) {
    s *= p.scale;
    return p.cap > 0 ? p.cap * tanhf(s / p.cap) : s;
  };
  float m = -1e30f, l = 0;
  Eight a;
  for (int i = 0; i < 8; i++) a.x[i] = 0;
  if (split == 0 && threadIdx.x < 32) {
    Eight k = rotated(widened(eight_of(p.k + kv_head * DIM)), p.table);
    uint4 value = eight_of(p.v + kv_head * DIM), key;
    for (int i = 0; i < 8; i++) ((Half*)&key)[i] = narrow(k.x[i]);
    float s = bounded(dot(q, k));
    if (group == 0) {
      if (kv_head * shares == head) {
        *(uint4*)(p.keys + ((long long)kv_head * p.capacity + at) * DIM + lane * 8) = key;
        *(uint4*)(p.values + ((long long)kv_head * p.capacity + at) * DIM + lane * 8) = value;
      }
      m = s;
      l = 1;
      a = widened(value);
    }
  }
  for (int first = start; first < stop; first += TURN) {
    float s[KEYS], most = m;
    if (first > start) ask(first);
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      float found = bounded(dot(q, widened(k[i])));
      s[i] = first + i * WARPS * GROUPS + group < stop ? found : -1e30f;
      most = fmaxf(most, s[i]);
    }
    float keep = __expf(m - most);
    l *= keep;
    for (int e = 0; e < 8; e++) a.x[e] *= keep;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      float w = s[i] == -1e30f ? 0 : __expf(s[i] - most);
      Eight value = widened(v[i]);
      l += w;
      for (int e = 0; e < 8; e++) a.x[e] += w * value.x[e];
    }
    m = most;
  }
  for (int i = 0; i < 8; i++) parts[group][lane * 8 + i] = a.x[i];
  if (lane == 0) high[group] = m, sums[group] = l;
  __syncthreads();
  float most = high[0];
  for (int w = 1; w < WARPS * GROUPS; w++) most = fmaxf(most, high[w]);
  float all = 0;
  for (int w = 0; w < WARPS * GROUPS; w++) all += sums[w] * __expf(high[w] - most);
  float* own = p.scratch + (long long)(head * p.splits + split) * (DIM + 2);
  for (int d = threadIdx.x; d < DIM; d += THREADS) {
    float x = 0;
    for (int w = 0; w < WARPS * GROUPS; w++) x += parts[w][d] * __expf(high[w] - most);
    if (needed == 1) p.out[head * DIM + d] = narrow(x / all);
    else own[d] = x;
  }
  if (needed == 1) return;
  if (threadIdx.x == 0) own[DIM] = most, own[DIM + 1] = all;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(p.ended + head, 1) == needed - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const float* of = p.scratch + (long long)head * p.splits * (DIM + 2);
  most = -1e30f;
  for (int s = 0; s < needed; s++) most = fmaxf(most, __ldcg(of + s * (DIM + 2) + DIM));
  all = 0;
  for (int s = 0; s < needed; s++) all += __ldcg(of + s * (DIM + 2) + DIM + 1) * __expf(__ldcg(of + s * (DIM + 2) + DIM) - most);
  for (int d = threadIdx.x; d < DIM; d += THREADS) {
    float x = 0;
    for (int s = 0; s < needed; s++) x += __ldcg(of + s * (DIM + 2) + d) * __expf(__ldcg(of + s * (DIM + 2) + DIM) - most);
    p.out[head * DIM + d] = narrow(x / all);
  }
  if (threadIdx.x == 0) p.ended[head] = 0;
}
