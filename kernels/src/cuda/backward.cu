// Reverse passes of attention's softmax, of norms and of gates: all but the matrix products.
//
// Elements are read and written as f16 or bf16 and computed on in f32. Sums are taken in an order that depends on
// the number of threads alone, so that bytes repeat.
//
// Defined by the host: BF16 (elements are bf16 if it is 1, f16 if it is 0).

#if BF16
#include <cuda_bf16.h>
typedef __nv_bfloat16 Half;
#define WIDE __bfloat162float
#define ROUND __float2bfloat16_rn
#else
#include <cuda_fp16.h>
typedef __half Half;
#define WIDE __half2float
#define ROUND __float2half_rn
#endif

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

// One row of scores s = cap tanh(scale x / cap), or scale x where cap is 0, from its products x of a query with
// keys, and the gradient dp of its weights p = softmax(s): p and d(scale x) = p (dp - Σ p dp) (1 - (s / cap)²).
//
// Block (row, key head) of a grid; query start + row / shared, columns are keys from `first`, rows `stride` apart.
// Keys that the query does not see, later ones and, unless `sees` is 0, all but the last `sees`, get zeros.
extern "C" __global__ void score_gradients(const float* __restrict__ products,
                                           const float* __restrict__ d_weights,
                                           Half* __restrict__ weights,
                                           Half* __restrict__ d_scores, int start, int first,
                                           int keys, int stride, int shared, int sees, float scale,
                                           float cap) {
    const int row = blockIdx.x;
    const size_t at = (size_t(blockIdx.y) * gridDim.x + row) * stride;
    products += at;
    d_weights += at;
    weights += at;
    d_scores += at;
    const int query = start + row / shared;
    const int end = query + 1 - first;  // at most `keys`
    const int begin = sees > 0 ? max(0, end - sees) : 0;

    const auto score = [&](int key) {
        const float x = products[key] * scale;
        return cap > 0.0f ? cap * tanhf(x / cap) : x;
    };
    float part = -3.4e38f;
    for (int key = begin + threadIdx.x; key < end; key += blockDim.x) part = fmaxf(part, score(key));
    const float high = reduced<Largest>(part);
    float sum = 0.0f, dot = 0.0f;
    for (int key = begin + threadIdx.x; key < end; key += blockDim.x) {
        const float weight = expf(score(key) - high);
        sum += weight;
        dot += weight * d_weights[key];
    }
    const float total = 1.0f / reduced<Sum>(sum);
    const float mean = reduced<Sum>(dot) * total;
    for (int key = threadIdx.x; key < keys; key += blockDim.x) {
        float weight = 0.0f, gradient = 0.0f;
        if (key >= begin && key < end) {
            const float s = score(key);
            const float slope = cap > 0.0f ? 1.0f - (s / cap) * (s / cap) : 1.0f;
            weight = expf(s - high) * total;
            gradient = weight * (d_weights[key] - mean) * slope;
        }
        weights[key] = ROUND(weight);
        d_scores[key] = ROUND(gradient);
    }
}

// The gradient of a norm y = (w + offset) n, n = c r, c = x - mean(x) or x, r = 1 / sqrt(mean(c²) + eps), with
// g = (w + offset) dy: dx = r (g - n mean(g n)), less its mean where x is centred. One row per block.
extern "C" __global__ void norm_backward(const Half* __restrict__ x,
                                         const Half* __restrict__ weight,
                                         const Half* __restrict__ dy, Half* __restrict__ dx,
                                         int len, float eps, float offset, int centred) {
    x += size_t(blockIdx.x) * len;
    dy += size_t(blockIdx.x) * len;
    dx += size_t(blockIdx.x) * len;
    const auto gradient = [&](int at) { return WIDE(dy[at]) * (WIDE(weight[at]) + offset); };
    float mean = 0.0f, shift = 0.0f;
    if (centred) {
        float sum = 0.0f, sum_g = 0.0f;
        for (int at = threadIdx.x; at < len; at += blockDim.x) {
            sum += WIDE(x[at]);
            sum_g += gradient(at);
        }
        mean = reduced<Sum>(sum) / len;
        shift = reduced<Sum>(sum_g) / len;
    }
    float square = 0.0f, dot = 0.0f;
    for (int at = threadIdx.x; at < len; at += blockDim.x) {
        const float c = WIDE(x[at]) - mean;
        square += c * c;
        dot += c * gradient(at);
    }
    const float factor = 1.0f / sqrtf(reduced<Sum>(square) / len + eps);
    const float along = reduced<Sum>(dot) / len * factor * factor;
    for (int at = threadIdx.x; at < len; at += blockDim.x) {
        const float c = WIDE(x[at]) - mean;
        dx[at] = ROUND(factor * (gradient(at) - shift - c * along));
    }
}

// The value of a gate's activation, and its slope.
struct Activated {
    float value, slope;
};

// x sigmoid(x).
__device__ __forceinline__ Activated silu(float x) {
    const float sigmoid = 1.0f / (1.0f + expf(-x));
    return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
}

// x sigmoid(u), u = sqrt(8 / π) (x + 0.044715 x³).
__device__ __forceinline__ Activated gelu(float x) {
    const float square = x * x;
    const float sigmoid = 1.0f / (1.0f + expf(-1.5957691216f * x * (1.0f + 0.044715f * square)));
    const float inner = 1.5957691216f * (1.0f + 3.0f * 0.044715f * square);
    return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid) * inner)};
}

// Elements that a thread of a gate takes: 16 bytes.
constexpr int LANES = 8;

struct alignas(16) Vector {
    Half at[LANES];
};

// y = act(gate) up: d_gate = dy up act'(gate), d_up = dy act(gate). `aligned`: all five are to 16 bytes.
template <Activated ACT(float)>
__device__ __forceinline__ void gate_backward(const Half* gate, const Half* up, const Half* dy,
                                              Half* d_gate, Half* d_up, unsigned count,
                                              int aligned) {
    const size_t first = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * LANES;
    if (first >= count) return;
    const int own = static_cast<int>(min(size_t(LANES), count - first));
    const auto one = [](Half g, Half u, Half d, Half& dg, Half& du) {
        const Activated act = ACT(WIDE(g));
        dg = ROUND(WIDE(d) * WIDE(u) * act.slope);
        du = ROUND(WIDE(d) * act.value);
    };
    if (aligned && own == LANES) {
        const auto load = [&](const Half* from) { return *reinterpret_cast<const Vector*>(from + first); };
        const Vector g = load(gate), u = load(up), d = load(dy);
        Vector dg, du;
#pragma unroll
        for (int i = 0; i < LANES; i++) one(g.at[i], u.at[i], d.at[i], dg.at[i], du.at[i]);
        *reinterpret_cast<Vector*>(d_gate + first) = dg;
        *reinterpret_cast<Vector*>(d_up + first) = du;
    } else {
        for (size_t i = first; i < first + own; i++) one(gate[i], up[i], dy[i], d_gate[i], d_up[i]);
    }
}

extern "C" __global__ void swiglu_backward(const Half* gate, const Half* up, const Half* dy,
                                           Half* d_gate, Half* d_up, unsigned count, int aligned) {
    gate_backward<silu>(gate, up, dy, d_gate, d_up, count, aligned);
}

extern "C" __global__ void geglu_backward(const Half* gate, const Half* up, const Half* dy,
                                          Half* d_gate, Half* d_up, unsigned count, int aligned) {
    gate_backward<gelu>(gate, up, dy, d_gate, d_up, count, aligned);
}
