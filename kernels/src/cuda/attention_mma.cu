// Causal attention, FlashAttention-2's loop on mma.sync (sm_80 and later).
//
// One block takes ROWS = 16 * TILES * WARPS query rows of one head of one window; each warp
// 16 * TILES of them. Keys and values come in tiles of KEYS through two shared-memory stages
// (cp.async); scores, running maximum, running sum and output stay in registers. Rows in
// shared memory are padded by 16 bytes, so that ldmatrix meets no bank twice.
//
// Defined by the host: HEAD_DIM (a multiple of 16), WARPS, TILES, KEYS, BF16 (elements are bf16 if it
// is 1, f16 if it is 0), WINDOW (a row sees only the last `sees` keys; tiles that no row sees are passed over),
// SOFTCAP (scores are cap tanh(score / cap), where scale_log2 is cap log2(e), and cap_log2 is 2 log2(e) scale / cap).

#if BF16
#include <cuda_bf16.h>
typedef __nv_bfloat16 Half;
typedef __nv_bfloat162 Half2;
#define MMA_TYPES "bf16.bf16"
#define ROUND2 __floats2bfloat162_rn
#else
#include <cuda_fp16.h>
typedef __half Half;
typedef __half2 Half2;
#define MMA_TYPES "f16.f16"
#define ROUND2 __floats2half2_rn
#endif

constexpr int STRIDE = HEAD_DIM + 8;
constexpr int ROWS = 16 * TILES * WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int DEPTH = HEAD_DIM / 16;  // 16-wide steps over the head
constexpr int KEY_STEPS = KEYS / 16;

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy16(Half* to, const Half* from, bool valid) {
    int bytes = valid ? 16 : 0;  // the rest is filled with zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes));
}

__device__ __forceinline__ void load4(unsigned (&r)[4], const Half* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

__device__ __forceinline__ void load4_transposed(unsigned (&r)[4], const Half* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned pack(float low, float high) {
    Half2 h = ROUND2(low, high);
    return *reinterpret_cast<unsigned*>(&h);
}

// Copies rows first .. first + COUNT of one head into shared memory, zeros past the window.
template <int COUNT>
__device__ __forceinline__ void fetch(Half* to, const Half* from, int first, int seq,
                                      size_t pitch) {
    constexpr int PIECES = HEAD_DIM / 8;
    for (int at = threadIdx.x; at < COUNT * PIECES; at += THREADS) {
        int row = at / PIECES, piece = at % PIECES;
        bool valid = first + row < seq;
        const Half* source = from + (valid ? first + row : 0) * pitch + piece * 8;
        copy16(to + row * STRIDE + piece * 8, source, valid);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    causal_attention(const Half* __restrict__ q, const Half* __restrict__ k,
                     const Half* __restrict__ v, Half* __restrict__ out, int seq, int heads,
                     int kv_heads, float scale_log2
#if WINDOW
                     ,
                     int sees
#endif
#if SOFTCAP
                     ,
                     float cap_log2
#endif
    ) {
    extern __shared__ __align__(16) Half shared[];
    Half* sq = shared;
    Half* sk = sq + ROWS * STRIDE;
    Half* sv = sk + 2 * KEYS * STRIDE;

    const int head = blockIdx.y, window = blockIdx.z;
    const int kv_head = head / (heads / kv_heads);
    // The last rows see the most keys: they start first.
    const int first_row = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const size_t q_pitch = size_t(heads) * HEAD_DIM, kv_pitch = size_t(kv_heads) * HEAD_DIM;
    q += size_t(window) * seq * q_pitch + size_t(head) * HEAD_DIM;
    out += size_t(window) * seq * q_pitch + size_t(head) * HEAD_DIM;
    k += size_t(window) * seq * kv_pitch + size_t(kv_head) * HEAD_DIM;
    v += size_t(window) * seq * kv_pitch + size_t(kv_head) * HEAD_DIM;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp * 16 * TILES;
    const int key_end = min(seq, first_row + ROWS);
    const int tiles = (key_end + KEYS - 1) / KEYS;

#if WINDOW
    const int first_tile = max(0, first_row + 1 - sees) / KEYS;
#else
    constexpr int first_tile = 0;
#endif

    fetch<ROWS>(sq, q, first_row, seq, q_pitch);
    fetch<KEYS>(sk, k, first_tile * KEYS, seq, kv_pitch);
    fetch<KEYS>(sv, v, first_tile * KEYS, seq, kv_pitch);
    asm volatile("cp.async.commit_group;");

    float o[TILES][2 * DEPTH][4] = {};
    float largest[TILES][2], sum[TILES][2] = {};
#pragma unroll
    for (int m = 0; m < TILES; m++) largest[m][0] = largest[m][1] = -1e30f;

    for (int tile = first_tile; tile < tiles; tile++) {
        const int first_key = tile * KEYS;
        const int stage = (tile - first_tile) % 2;
        if (tile + 1 < tiles) {
            const int next = (stage ^ 1) * KEYS * STRIDE;
            fetch<KEYS>(sk + next, k, first_key + KEYS, seq, kv_pitch);
            fetch<KEYS>(sv + next, v, first_key + KEYS, seq, kv_pitch);
        }
        asm volatile("cp.async.commit_group;");
        asm volatile("cp.async.wait_group 1;");
        __syncthreads();
        const Half* tk = sk + stage * KEYS * STRIDE;
        const Half* tv = sv + stage * KEYS * STRIDE;

        float s[TILES][2 * KEY_STEPS][4] = {};
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            unsigned a[TILES][4];
#pragma unroll
            for (int m = 0; m < TILES; m++)
                load4(a[m], sq + (warp_row + m * 16 + lane % 16) * STRIDE + d * 16 + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < KEY_STEPS; n++) {
                unsigned b[4];
                const int row = n * 16 + lane % 8 + lane / 16 * 8;
                load4(b, tk + row * STRIDE + d * 16 + lane / 8 % 2 * 8);
#pragma unroll
                for (int m = 0; m < TILES; m++) {
                    multiply(s[m][2 * n], a[m], b[0], b[1]);
                    multiply(s[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }

#pragma unroll
        for (int m = 0; m < TILES; m++) {
            const int row = first_row + warp_row + m * 16 + lane / 4;
#if SOFTCAP
#pragma unroll
            for (int n = 0; n < 2 * KEY_STEPS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    s[m][n][e] = 1.0f - __fdividef(2.0f, 1.0f + power2(s[m][n][e] * cap_log2));
#endif
            if (first_key + KEYS > first_row + warp_row + m * 16 || first_key + KEYS > seq) {
#pragma unroll
                for (int n = 0; n < 2 * KEY_STEPS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = first_key + n * 8 + lane % 4 * 2 + e % 2;
                        if (key > row + e / 2 * 8 || key >= seq) s[m][n][e] = -1e30f;
                    }
            }
#if WINDOW
            if (first_key <= first_row + warp_row + m * 16 + 15 - sees) {
#pragma unroll
                for (int n = 0; n < 2 * KEY_STEPS; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int key = first_key + n * 8 + lane % 4 * 2 + e % 2;
                        if (key <= row + e / 2 * 8 - sees) s[m][n][e] = -1e30f;
                    }
            }
#endif
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float high = largest[m][h];
#pragma unroll
                for (int n = 0; n < 2 * KEY_STEPS; n++)
                    high = fmaxf(high, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
                const float shrink = power2((largest[m][h] - high) * scale_log2);
                largest[m][h] = high;
#if WINDOW
                // Of a row that has seen nothing yet, hidden keys stay far below.
                const float base = high > -1e29f ? high * scale_log2 : 0.0f;
#else
                const float base = high * scale_log2;
#endif
                float part = 0.0f;
#pragma unroll
                for (int n = 0; n < 2 * KEY_STEPS; n++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        s[m][n][e] = power2(s[m][n][e] * scale_log2 - base);
                        part += s[m][n][e];
                    }
                sum[m][h] = sum[m][h] * shrink + part;
#pragma unroll
                for (int n = 0; n < 2 * DEPTH; n++) {
                    o[m][n][2 * h] *= shrink;
                    o[m][n][2 * h + 1] *= shrink;
                }
            }
        }

#pragma unroll
        for (int n = 0; n < KEY_STEPS; n++) {
            unsigned a[TILES][4];
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                a[m][0] = pack(s[m][2 * n][0], s[m][2 * n][1]);
                a[m][1] = pack(s[m][2 * n][2], s[m][2 * n][3]);
                a[m][2] = pack(s[m][2 * n + 1][0], s[m][2 * n + 1][1]);
                a[m][3] = pack(s[m][2 * n + 1][2], s[m][2 * n + 1][3]);
            }
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                unsigned b[4];
                load4_transposed(b, tv + (n * 16 + lane % 16) * STRIDE + d * 16 + lane / 16 * 8);
#pragma unroll
                for (int m = 0; m < TILES; m++) {
                    multiply(o[m][2 * d], a[m], b[0], b[1]);
                    multiply(o[m][2 * d + 1], a[m], b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[m][h];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const float scale = 1.0f / total;
            const int row = first_row + warp_row + m * 16 + lane / 4 + h * 8;
            if (row < seq) {
                Half* to = out + row * q_pitch + lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < 2 * DEPTH; n++)
                    *reinterpret_cast<Half2*>(to + n * 8) =
                        ROUND2(o[m][n][2 * h] * scale, o[m][n][2 * h + 1] * scale);
            }
        }
}
