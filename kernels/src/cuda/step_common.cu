// What the kernels of a step of one token share (step_launch.rs). A launch is one operation with its neighbours folded in;
// what it reads that no earlier launch of the step writes is asked for before it waits for the one before it. Macros: BF16, and
// WARPS of a block.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int uint32;

#if BF16
typedef __nv_bfloat16 Half;
__device__ __forceinline__ float wide(Half x) { return __bfloat162float(x); }
__device__ __forceinline__ Half narrow(float x) { return __float2bfloat16(x); }
#else
typedef __half Half;
__device__ __forceinline__ float wide(Half x) { return __half2float(x); }
__device__ __forceinline__ Half narrow(float x) { return __float2half(x); }
#endif

/// The launch after this one may begin.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Waits until the launches before this one have ended.
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#define THREADS (32 * WARPS)

/// The sum over a block, to every thread. `room` has a float for each warp.
__device__ float block_sum(float x, float* room) {
  for (int d = 16; d > 0; d >>= 1) x += __shfl_xor_sync(0xffffffffu, x, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < WARPS; i++) sum += room[i];
  return sum;
}

__device__ float block_max(float x, float* room) {
  for (int d = 16; d > 0; d >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  float most = 0;
  for (int i = 0; i < WARPS; i++) most = fmaxf(most, room[i]);
  return most;
}

// Norms: 0 none, 1 in f32 and rounded before the weight, 2 in f32 to the end with an offset of the weight, 3 that, with
// the mean taken off.
struct Norm {
  const Half* weight;
  int kind;
  float eps, offset;
};

/// Brings `n` features to shared memory, normalized. The sums are over each thread's own features.
__device__ void bring(const Half* x, Half* to, int n, Norm norm, float* room) {
  float sum = 0, squares = 0;
  for (int at = threadIdx.x * 8; at < n; at += THREADS * 8) {
    uint4 eight = *(const uint4*)(x + at);
    *(uint4*)(to + at) = eight;
    if (norm.kind) {
      const Half* v = (const Half*)&eight;
      for (int i = 0; i < 8; i++) sum += wide(v[i]), squares += wide(v[i]) * wide(v[i]);
    }
  }
  if (!norm.kind) return;
  float mean = 0;
  if (norm.kind == 3) {
    mean = block_sum(sum, room) / n;
    squares = 0;
    for (int at = threadIdx.x * 8; at < n; at += THREADS * 8)
      for (int i = 0; i < 8; i++) { float d = wide(to[at + i]) - mean; squares += d * d; }
  }
  float factor = 1.0f / sqrtf(block_sum(squares, room) / n + norm.eps);
  for (int at = threadIdx.x * 8; at < n; at += THREADS * 8) {
    uint4 eight = *(const uint4*)(to + at), weights = *(const uint4*)(norm.weight + at);
    Half* v = (Half*)&eight;
    const Half* w = (const Half*)&weights;
    for (int i = 0; i < 8; i++) {
      float y = (wide(v[i]) - mean) * factor;
      v[i] = norm.kind == 1 ? narrow(wide(narrow(y)) * wide(w[i])) : narrow(y * (wide(w[i]) + norm.offset));
    }
    *(uint4*)(to + at) = eight;
  }
}

/// SiLU, 1, or GELU by a hyperbolic tangent, 2.
__device__ __forceinline__ float activated(float x, int kind) {
  if (kind == 2) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  return x / (1.0f + expf(-x));
}
