// Causal attention on Hopper's warp-group matrix instructions (sm_90a), after FlashAttention-3 (Shah et al., 2024).
//
// A block stays on its multiprocessor and walks over tiles: ROWS = 128 query rows of one head of one window. One warp
// group has a thread that orders bulk copies (TMA) of queries, keys and values into shared memory, and takes the next tile
// from a counter; two warp groups take 64 rows each. Keys are walked from the diagonal down. While the scores of one tile of keys are turned into probabilities,
// the tensor cores have the product with the tile before and the scores of the next; the two warp groups take turns
// (named barriers), so that one computes exponentials while the other multiplies.
//
// In shared memory a tile lies in parts of 64 columns, [part][row][64], as the copy engine swizzles rows of 128 bytes. What
// lies past the window or the head's columns it fills with zeros.
//
// Defined by the host: HEAD_DIM (a multiple of 16), COLUMNS (64, 128 or 256, not less than HEAD_DIM), KEYS (128 or 64),
// QUERIES (1 or 2 tiles of queries in shared memory), STAGES (tiles of keys there, and of values), BF16, WINDOW, SOFTCAP as
// in attention_mma.cu.

#if BF16
#include <cuda_bf16.h>
typedef __nv_bfloat16 Half;
typedef __nv_bfloat162 Half2;
#define MMA_TYPES "f32.bf16.bf16"
#define ROUND2 __floats2bfloat162_rn
#else
#include <cuda_fp16.h>
typedef __half Half;
typedef __half2 Half2;
#define MMA_TYPES "f32.f16.f16"
#define ROUND2 __floats2half2_rn
#endif

typedef unsigned long long Word;

// A CUtensorMap, as the driver encodes it.
struct __align__(64) TensorMap {
    Word words[16];
};

constexpr int ROWS = 128;
constexpr int PARTS = COLUMNS / 64;
constexpr int THREADS = 384;
constexpr unsigned Q_BYTES = ROWS * COLUMNS * 2;
constexpr unsigned KV_BYTES = KEYS * COLUMNS * 2;

__device__ __forceinline__ void barrier_init(unsigned at, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count));
}

__device__ __forceinline__ void barrier_expect(unsigned at, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned at, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n}" ::"r"(at),
        "r"(parity)
        : "memory");
}

// Copies 64 columns from `column` on of the box of rows from `row` on of one head.
__device__ __forceinline__ void copy(unsigned to, const TensorMap* map, int column, int head,
                                     int row, int window, unsigned barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
        "l"(map), "r"(column), "r"(head), "r"(row), "r"(window), "r"(barrier)
        : "memory");
}

// Describes a swizzled matrix in shared memory: `leading` and `stride` in bytes.
__device__ __forceinline__ Word described(unsigned at, unsigned leading, unsigned stride) {
    return Word(at >> 4 & 0x3fff) | Word(leading >> 4) << 16 | Word(stride >> 4) << 32 |
           Word(1) << 62;
}

#define F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F32(d, i) F16(d, i), F16(d, i + 16)
#define F64(d, i) F32(d, i), F32(d, i + 32)
#define F128(d, i) F64(d, i), F64(d, i + 64)
#define N32                                                                                    \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"   \
    "%24,%25,%26,%27,%28,%29,%30,%31"
#define N64                                                                                    \
    N32                                                                                        \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53," \
    "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define N128                                                                                   \
    N64                                                                                        \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85," \
    "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,"   \
    "%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,"    \
    "%123,%124,%125,%126,%127"

// d = (more ? d : 0) + A Bᵀ, A and B in shared memory with rows along the sum.
#if KEYS == 128
#define SCORES_LIST "n128k16." MMA_TYPES " {" N64 "}, %64, %65, more"
#define SCORES_MORE "%66"
#define SCORES_OUT(d) F64(d, 0)
#else
#define SCORES_LIST "n64k16." MMA_TYPES " {" N32 "}, %32, %33, more"
#define SCORES_MORE "%34"
#define SCORES_OUT(d) F32(d, 0)
#endif
__device__ __forceinline__ void multiply_scores(float (&d)[KEYS / 2], Word a, Word b, int more) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " SCORES_MORE
                 ", 0;\nwgmma.mma_async.sync.aligned.m64" SCORES_LIST ", 1, 1, 0, 0;\n}"
                 : SCORES_OUT(d)
                 : "l"(a), "l"(b), "r"(more));
}

// d = (more ? d : 0) + A B, A in registers, B in shared memory with rows across the sum.
#if COLUMNS == 64
#define VALUES_LIST "n64k16." MMA_TYPES " {" N32 "}, {%32,%33,%34,%35}, %36, more"
#define VALUES_MORE "%37"
#define VALUES_OUT(d) F32(d, 0)
#elif COLUMNS == 128
#define VALUES_LIST "n128k16." MMA_TYPES " {" N64 "}, {%64,%65,%66,%67}, %68, more"
#define VALUES_MORE "%69"
#define VALUES_OUT(d) F64(d, 0)
#else
#define VALUES_LIST "n256k16." MMA_TYPES " {" N128 "}, {%128,%129,%130,%131}, %132, more"
#define VALUES_MORE "%133"
#define VALUES_OUT(d) F128(d, 0)
#endif
__device__ __forceinline__ void multiply_values(float (&d)[COLUMNS / 2], const unsigned* a, Word b,
                                                int more) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, " VALUES_MORE
                 ", 0;\nwgmma.mma_async.sync.aligned.m64" VALUES_LIST ", 1, 1, 1;\n}"
                 : VALUES_OUT(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_end() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most LEFT groups of products are under way.
template <int LEFT>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keeps the compiler from moving uses of registers across a wait.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
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

__device__ __forceinline__ void turn_wait(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory");
}

__device__ __forceinline__ void turn_pass(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"((group ^ 1) + 1) : "memory");
}

// A tile: its query rows, head, window and range of key tiles.
struct Tile {
    int row, head, window, first, last;
};

struct Sizes {
    int seq, heads, windows, group, sees;
};

__device__ __forceinline__ Tile tile_at(int at, Sizes sizes) {
    // Heads that lie together in the L2 cache are taken in groups, in each the longest tiles first.
    const int blocks = (sizes.seq + ROWS - 1) / ROWS;
    const int pairs = sizes.heads * sizes.windows;
    const int first = at / (sizes.group * blocks) * sizes.group;
    const int members = min(sizes.group, pairs - first);
    const int within = at - first * blocks;
    const int pair = first + within % members;
    Tile tile;
    tile.row = (blocks - 1 - within / members) * ROWS;
    tile.head = pair % sizes.heads;
    tile.window = pair / sizes.heads;
    tile.last = (min(sizes.seq, tile.row + ROWS) - 1) / KEYS;
#if WINDOW
    tile.first = max(0, tile.row + 1 - sizes.sees) / KEYS;
#else
    tile.first = 0;
#endif
    return tile;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    causal_attention(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                     const __grid_constant__ TensorMap v, Half* __restrict__ out,
                     int* __restrict__ taken, int seq, int heads, int kv_heads, int windows,
                     int group, float scale_log2
#if WINDOW
                     ,
                     int sees
#endif
#if SOFTCAP
                     ,
                     float cap_log2
#endif
    ) {
    extern __shared__ unsigned char bytes[];
    __shared__ Word barriers[2 * QUERIES + 4 * STAGES];
    __shared__ int numbers[QUERIES];
    const unsigned base = (static_cast<unsigned>(__cvta_generic_to_shared(bytes)) + 1023) & ~1023u;
    const unsigned sq = base, sk = sq + QUERIES * Q_BYTES, sv = sk + STAGES * KV_BYTES;
    const unsigned q_full = static_cast<unsigned>(__cvta_generic_to_shared(barriers));
    const unsigned q_free = q_full + 8 * QUERIES;
    const unsigned k_full = q_free + 8 * QUERIES, k_free = k_full + 8 * STAGES;
    const unsigned v_full = k_free + 8 * STAGES, v_free = v_full + 8 * STAGES;

    if (threadIdx.x == 0) {
        for (int i = 0; i < QUERIES; i++) {
            barrier_init(q_full + 8 * i, 1);
            barrier_init(q_free + 8 * i, 8);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(k_full + 8 * i, 1);
            barrier_init(v_full + 8 * i, 1);
            barrier_init(k_free + 8 * i, 8);
            barrier_init(v_free + 8 * i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

#if WINDOW
    const Sizes sizes{seq, heads, windows, group, sees};
#else
    const Sizes sizes{seq, heads, windows, group, 0};
#endif
    const int tiles = (seq + ROWS - 1) / ROWS * heads * windows;
    const int warp_group = threadIdx.x / 128;

    if (warp_group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x != 0) return;
        int query = 0, fetched = 0, used = 0;  // tiles of queries, keys and values so far
        for (int at = blockIdx.x;; at = gridDim.x + atomicAdd(taken, 1), query++) {
            const int own = query % QUERIES;
            barrier_wait(q_free + 8 * own, (query / QUERIES + 1) & 1);
            numbers[own] = at;
            if (at >= tiles) {
                barrier_arrive(q_full + 8 * own);
                return;
            }
            const Tile tile = tile_at(at, sizes);
            const int kv_head = tile.head / (heads / kv_heads);
            barrier_expect(q_full + 8 * own, Q_BYTES);
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                copy(sq + own * Q_BYTES + part * ROWS * 128, &q, part * 64, tile.head, tile.row,
                     tile.window, q_full + 8 * own);
            // Keys are one tile ahead of values, as they are used.
            for (int key = tile.last; key >= tile.first - 1; key--) {
                if (key >= tile.first) {
                    const int stage = fetched % STAGES;
                    barrier_wait(k_free + 8 * stage, (fetched / STAGES + 1) & 1);
                    barrier_expect(k_full + 8 * stage, KV_BYTES);
#pragma unroll
                    for (int part = 0; part < PARTS; part++)
                        copy(sk + stage * KV_BYTES + part * KEYS * 128, &k, part * 64, kv_head,
                             key * KEYS, tile.window, k_full + 8 * stage);
                    fetched++;
                }
                if (key < tile.last) {
                    const int stage = used % STAGES;
                    barrier_wait(v_free + 8 * stage, (used / STAGES + 1) & 1);
                    barrier_expect(v_full + 8 * stage, KV_BYTES);
#pragma unroll
                    for (int part = 0; part < PARTS; part++)
                        copy(sv + stage * KV_BYTES + part * KEYS * 128, &v, part * 64, kv_head,
                             (key + 1) * KEYS, tile.window, v_full + 8 * stage);
                    used++;
                }
            }
        }
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int own_group = warp_group - 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    if (own_group == 1) turn_pass(1);

    int query = 0, step = 0;  // tiles of queries, and of keys, so far; values are one behind
    for (;; query++) {
        const int own = query % QUERIES;
        barrier_wait(q_full + 8 * own, query / QUERIES & 1);
        const int at = numbers[own];
        if (at >= tiles) return;
        const Tile tile = tile_at(at, sizes);
        const int group_row = tile.row + own_group * 64;
        const int row = group_row + warp * 16 + lane / 4;
        const unsigned rows_at = sq + own * Q_BYTES + own_group * 64 * 128;

        float o[COLUMNS / 2];
        float s[KEYS / 2];
        unsigned p[KEYS / 4];
        float largest[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f}, shrink[2];

        // Starts s = Q Kᵀ for the next tile of keys.
        auto start_scores = [&](int stage) {
            products_begin();
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; d++) {
                const Word a = described(rows_at + d / 4 * ROWS * 128 + d % 4 * 32, 16, 1024);
                const Word b =
                    described(sk + stage * KV_BYTES + d / 4 * KEYS * 128 + d % 4 * 32, 16, 1024);
                multiply_scores(s, a, b, d > 0);
            }
            products_end();
        };
        // Starts o += P V.
        auto start_values = [&](int stage, bool more) {
            products_begin();
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                const Word b =
                    described(sv + stage * KV_BYTES + n * 16 * 128, KEYS * 128, 1024);
                multiply_values(o, p + 4 * n, b, more || n > 0);
            }
            products_end();
        };
        // Scores to probabilities times 2^-largest, in f32; `shrink` is the factor of what was summed before.
        auto soften = [&](int key) {
            const int first_key = key * KEYS;
#if SOFTCAP
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++)
                s[i] = 1.0f - __fdividef(2.0f, 1.0f + power2(s[i] * cap_log2));
#endif
            if (first_key + KEYS > group_row) {
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++) {
                    const int column = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    if (column > row + i / 2 % 2 * 8) s[i] = -1e30f;
                }
            }
#if WINDOW
            if (first_key <= group_row + 63 - sees) {
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++) {
                    const int column = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    if (column <= row + i / 2 % 2 * 8 - sees) s[i] = -1e30f;
                }
            }
#endif
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float high = largest[h];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
                    high = fmaxf(high, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
                high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
                shrink[h] = power2((largest[h] - high) * scale_log2);
                largest[h] = high;
                // Rows of the first group do not see the first tile of keys if it begins after them.
                const float bottom =
                    KEYS < ROWS && high < -1e29f ? 0.0f : high * scale_log2;
                float part = 0.0f;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        s[4 * n + e] = power2(s[4 * n + e] * scale_log2 - bottom);
                        part += s[4 * n + e];
                    }
                sum[h] = sum[h] * shrink[h] + part;
            }
        };
        auto round_scores = [&] {
#pragma unroll
            for (int i = 0; i < KEYS / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
        };
        auto free = [&](unsigned barrier) {
            if (lane == 0) barrier_arrive(barrier);
        };

        {
            const int stage = step % STAGES;
            barrier_wait(k_full + 8 * stage, step / STAGES & 1);
            start_scores(stage);
            products_wait<0>();
            pin(s);
            free(k_free + 8 * stage);
        }
        if (tile.first == tile.last) free(q_free + 8 * own);
        soften(tile.last);
        round_scores();
        step++;

        for (int key = tile.last - 1; key >= tile.first; key--, step++) {
            const int stage = step % STAGES, before = (step - 1) % STAGES;
            barrier_wait(k_full + 8 * stage, step / STAGES & 1);
            turn_wait(own_group);
            start_scores(stage);
            barrier_wait(v_full + 8 * before, (step - 1) / STAGES & 1);
            start_values(before, key < tile.last - 1);
            turn_pass(own_group);
            products_wait<1>();
            pin(s);
            free(k_free + 8 * stage);
            if (key == tile.first) free(q_free + 8 * own);
            soften(key);
            products_wait<0>();
            pin(o);
            free(v_free + 8 * before);
            round_scores();
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i++) o[i] *= shrink[i / 2 % 2];
        }
        {
            const int before = (step - 1) % STAGES;
            barrier_wait(v_full + 8 * before, (step - 1) / STAGES & 1);
            start_values(before, tile.last > tile.first);
            products_wait<0>();
            pin(o);
            free(v_free + 8 * before);
        }

        const size_t pitch = size_t(heads) * HEAD_DIM;
        Half* to = out + (size_t(tile.window) * seq * heads + tile.head) * HEAD_DIM;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float total = sum[h];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const float scale = 1.0f / total;
            const int at_row = row + 8 * h;
#pragma unroll
            for (int c = 0; c < COLUMNS / 32; c++) {
                // Four threads have two columns each of four runs of eight; each is to have a run.
                unsigned w[4];
#pragma unroll
                for (int b = 0; b < 4; b++) {
                    const int i = 4 * (4 * c + b) + 2 * h;
                    w[b] = pack(o[i] * scale, o[i + 1] * scale);
                }
#pragma unroll
                for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
                    for (int b = 0; b < 4; b++)
                        if ((b & bit) == 0) {
                            const bool upper = lane & bit;
                            const unsigned other =
                                __shfl_xor_sync(~0u, upper ? w[b] : w[b + bit], bit);
                            if (upper)
                                w[b] = other;
                            else
                                w[b + bit] = other;
                        }
                const int column = 32 * c + lane % 4 * 8;
                if (at_row < seq && column < HEAD_DIM)
                    *reinterpret_cast<uint4*>(to + at_row * pitch + column) =
                        make_uint4(w[0], w[1], w[2], w[3]);
            }
        }
    }
}
