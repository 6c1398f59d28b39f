// Comparisons of two rows of logits, one row per block, all in f32.
//
// Sums are taken in an order that depends on the number of threads alone, so that bytes repeat.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int MOST_WARPS = 32;

struct Sum {
    __device__ static float of(float a, float b) { return a + b; }
};

struct Largest {
    __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

// One number of the parts that all threads of the block hold, which are whole warps.
template <typename Pair>
__device__ float reduced(float part) {
    __shared__ float parts[MOST_WARPS];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2)
        part = Pair::of(part, __shfl_xor_sync(~0u, part, apart));
    __syncthreads();  // the last call's parts have been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
    __syncthreads();
    float all = parts[0];
    for (int warp = 1; warp < blockDim.x / 32; warp++) all = Pair::of(all, parts[warp]);
    return all;
}

// The least place of the row's largest value.
__device__ int place_of(const float* row, int count, float largest) {
    __shared__ int place;
    if (threadIdx.x == 0) place = count;
    __syncthreads();
    for (int at = threadIdx.x; at < count; at += blockDim.x)
        if (row[at] == largest) {
            atomicMin(&place, at);
            break;
        }
    __syncthreads();
    const int found = place;
    __syncthreads();  // all have read it before it is written again
    return found;
}

// A row's largest value, and the logarithm of the sum of its exponentials.
struct Row {
    float largest, log_sum;
};

__device__ Row row_of(const float* row, int count) {
    float part = __int_as_float(0xff800000);
    for (int at = threadIdx.x; at < count; at += blockDim.x) part = fmaxf(part, row[at]);
    const float largest = reduced<Largest>(part);
    float sum = 0.0f;
    for (int at = threadIdx.x; at < count; at += blockDim.x) sum += expf(row[at] - largest);
    return {largest, largest + logf(reduced<Sum>(sum))};
}

// For p = softmax(reference), q = softmax(logits): -ln q and -ln p of the target, Σ p (ln p - ln q), and 1 if the
// likeliest is the same, else 0.
extern "C" __global__ void compare_logits(const float* __restrict__ logits,
                                          const float* __restrict__ reference,
                                          const int* __restrict__ targets, float* __restrict__ out,
                                          int count) {
    logits += size_t(blockIdx.x) * count;
    reference += size_t(blockIdx.x) * count;
    const Row own = row_of(logits, count), right = row_of(reference, count);
    float part = 0.0f;
    for (int at = threadIdx.x; at < count; at += blockDim.x) {
        const float log_p = reference[at] - right.log_sum;
        part += expf(log_p) * (log_p - (logits[at] - own.log_sum));
    }
    const float divergence = reduced<Sum>(part);
    const int likeliest = place_of(logits, count, own.largest);
    const int expected = place_of(reference, count, right.largest);
    if (threadIdx.x == 0) {
        const int target = targets[blockIdx.x];
        float* row = out + size_t(blockIdx.x) * 4;
        row[0] = own.log_sum - logits[target];
        row[1] = right.log_sum - reference[target];
        row[2] = divergence;
        row[3] = likeliest == expected ? 1.0f : 0.0f;
    }
}

__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) {
    *to = __float2bfloat16_rn(value);
}

// Σ p (ln p - ln q), and scale (q - p).
template <typename Float>
__device__ __forceinline__ void gradient_of(const float* logits, const float* reference,
                                            float* divergence, Float* gradient, int count,
                                            float scale) {
    logits += size_t(blockIdx.x) * count;
    reference += size_t(blockIdx.x) * count;
    gradient += size_t(blockIdx.x) * count;
    const Row own = row_of(logits, count), right = row_of(reference, count);
    float part = 0.0f;
    for (int at = threadIdx.x; at < count; at += blockDim.x) {
        const float log_p = reference[at] - right.log_sum, log_q = logits[at] - own.log_sum;
        const float p = expf(log_p);
        part += p * (log_p - log_q);
        store(gradient + at, scale * (expf(log_q) - p));
    }
    const float all = reduced<Sum>(part);
    if (threadIdx.x == 0) divergence[blockIdx.x] = all;
}

#define GRADIENT(NAME, FLOAT)                                                                   \
    extern "C" __global__ void NAME(const float* __restrict__ logits,                           \
                                    const float* __restrict__ reference,                        \
                                    float* __restrict__ divergence, FLOAT* __restrict__ gradient, \
                                    int count, float scale) {                                   \
        gradient_of(logits, reference, divergence, gradient, count, scale);                     \
    }

GRADIENT(divergence_gradient_f32, float)
GRADIENT(divergence_gradient_f16, __half)
GRADIENT(divergence_gradient_bf16, __nv_bfloat16)
