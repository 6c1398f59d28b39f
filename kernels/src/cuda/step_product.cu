// The products of a step.
//
// y = W x of one to three linears of one input. Macros: BITS of a code, COLUMNS of the input, PER_GROUP loads of 16 bytes that
// share a scale (a whole row: 0), DEPTH of a warp's queue, PAIRED if a gate and what it is for are multiplied together: 1 for
// SiLU, 2 for GELU by a hyperbolic tangent.
//
// A code becomes the f16 1024 + code 2^k without a conversion; the tensor cores multiply codes by inputs exactly and add in f32.
// Column 2 t of a product has the inputs of load t alone, so that each load's sum meets its own scale and zero point.
struct Part {
  const uint4* codes;  // [rows, LOADS]
  const uint32* grid;  // [rows, groups]: f16 scale, and the zero point above it
  const Half* bias;
  void* out;
  int rows;
};

struct Product {
  Part parts[3];
  const int* order;  // [columns]; null if it is 0, 1, 2, ..
  const Half* x;
  Half* residual;  // if not null, y times `scale` is added to it
  Norm norm;
  float scale, cap;  // of logits, too; 0 is no cap
  int tiles, logits;
};

#define LOAD_CODES (128 / BITS)
#define WORD_CODES (32 / BITS)
#define LOADS (COLUMNS / LOAD_CODES)
#if BITS < 16 && PER_GROUP
#define CELLS (LOADS / PER_GROUP)
#else
#define CELLS 1
#endif
// A warp takes 16 rows and, in a step, eight loads of each: 128 bytes.
#define STEPS ((LOADS + 7) / 8)
// Warps that share a row; the others take other rows.
#define SHARERS (STEPS >= 16 && WARPS >= 16 ? 16 : STEPS >= 8 && WARPS >= 8 ? 8 : STEPS >= 4 ? 4 : STEPS >= 2 ? 2 : 1)
// Cells of a row that are brought for a step.
#if BITS < 16 && PER_GROUP && 8 % PER_GROUP && PER_GROUP % 8
#define STEP_CELLS 8
#elif BITS < 16 && PER_GROUP && PER_GROUP < 8
#define STEP_CELLS (8 / PER_GROUP)
#else
#define STEP_CELLS 1
#endif
// Halves of a load's inputs in shared memory: with padding, four neighbours meet in no bank.
#if BITS == 16
#define PITCH 8
#else
#define PITCH (LOAD_CODES + 8)
#endif

/// Copies to shared memory, at an address there, while the thread goes on.
template <int bytes>
__device__ __forceinline__ void copy(uint32 to, const void* from) {
  if constexpr (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(bytes));
}

__device__ __forceinline__ uint4 copied16(uint32 from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from));
  return x;
}

__device__ __forceinline__ uint32 copied4(uint32 from) {
  uint32 x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from));
  return x;
}

// What a warp has asked for: 128 bytes of 16 rows, of odd rows the halves changed about, so that lanes which read two rows
// meet in no bank; then the cells.
#define CELLS_AT (16 * 128)
#if BITS < 16
#define HELD_BYTES (CELLS_AT + 16 * STEP_CELLS * 4)
#else
#define HELD_BYTES CELLS_AT
#endif

__device__ __forceinline__ void multiply(float* c, uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
#if BITS == 16 && BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#if BITS < 16
/// Codes i and i + WORD_CODES / 2 of a word as two f16.
template <int i>
__device__ __forceinline__ uint32 pair(uint32 word) {
  constexpr int low = i * BITS % 8, shift = i * BITS / 8 * 8;
  constexpr uint32 one = ((1u << BITS) - 1) << low, mask = one | one << 16;
  uint32 bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(word >> shift), "n"(mask), "r"(0x64006400u));
  __half2 found = *(__half2*)&bits;
  if constexpr (low == 0) {
    found = __hsub2(found, __float2half2_rn(1024.0f));
  } else {
    constexpr float step = 1.0f / (1 << low);
    found = __hfma2(found, __float2half2_rn(step), __float2half2_rn(-1024.0f * step));
  }
  return *(uint32*)&found;
}

template <int i>
__device__ __forceinline__ void word(float* c, uint32 a, uint32 b, const uint32* x) {
  if constexpr (i < WORD_CODES / 2) {
    multiply(c, pair<i>(a), pair<i>(b), pair<i + 1>(a), pair<i + 1>(b), x[i], x[i + 1]);
    word<i + 2>(c, a, b, x);
  }
}

__device__ __forceinline__ float scaled(uint32 cell, float dot, float sum) {
  return __half2float(__ushort_as_half((unsigned short)cell)) * (dot - sum * float(cell >> 16));
}
#endif

// PAIRED: parts 0 and 1 are a gate and what it is for, and 8 rows of each make a tile; what is stored is act(gate) * up.
#if PAIRED
#define TILE 8
#else
#define TILE 16
#endif

/// The part of a tile, and its number there.
__device__ __forceinline__ const Part* part_of(const Product& p, int& tile) {
  const Part* part = p.parts;
#if !PAIRED
  for (int i = 0; i < 2; i++) {
    int tiles = (part->rows + 15) / 16;
    if (tile < tiles) break;
    tile -= tiles;
    part++;
  }
#endif
  return part;
}

extern "C" __global__ void __launch_bounds__(THREADS) product(const __grid_constant__ Product p) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float room[WARPS];
  const int first = int((long long)p.tiles * blockIdx.x / gridDim.x), end = int((long long)p.tiles * (blockIdx.x + 1) / gridDim.x);
  Half* plain = (Half*)(shared + WARPS * DEPTH * HELD_BYTES);
  unsigned short* inputs = BITS == 16 ? (unsigned short*)plain : (unsigned short*)(plain + COLUMNS);
  float* sums = (float*)(inputs + (BITS == 16 ? COLUMNS : LOADS * PITCH));
  float* found = sums + (BITS == 16 ? 0 : LOADS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const uint32 own = (uint32)__cvta_generic_to_shared(shared) + warp * DEPTH * HELD_BYTES;
  const int sharer = warp % SHARERS, from = STEPS * sharer / SHARERS, to = STEPS * (sharer + 1) / SHARERS;
  const int start = first + warp / SHARERS, stride = WARPS / SHARERS;

  let_next_begin();

  int tile = start, step = from, asked = 0, left = 0;
  // Rows 0 and 8 of the tile.
  const uint4* codes[2] = {nullptr, nullptr};
  const uint32* cells[2] = {nullptr, nullptr};
  auto enter = [&]() {
    left -= stride;
    if (left > 0) {
      for (int half = 0; half < 2; half++) {
        codes[half] += stride * TILE * LOADS;
        cells[half] += stride * TILE * CELLS;
      }
      return;
    }
    int at = tile;
    const Part* part = part_of(p, at);
    left = (part->rows + TILE - 1) / TILE - at;
    // A last tile that is not whole takes rows of the one before again.
    int row = min(at * TILE, part->rows - TILE);
    if (row < at * TILE) left = 0;
    else if (part->rows % TILE) left--;
    for (int half = 0; half < 2; half++) {
      const Part* of = PAIRED ? p.parts + half : part;
      int begin = PAIRED ? row : row + 8 * half;
      codes[half] = of->codes + (long long)begin * LOADS;
      cells[half] = of->grid + (long long)begin * CELLS;
    }
  };
  auto ask = [&]() {
    if (tile < end) {
      // Four rows at once, eight lanes each. Past a row's end something is read that is multiplied by nothing.
      int load = step * 8 + lane % 8;
      if (LOADS % 8 && load >= LOADS) load = 0;
      const uint32 to_row = own + asked + lane / 8 * 128 + (lane % 8 ^ lane / 8 % 2 * 4) * 16;
#pragma unroll
      for (int i = 0; i < 4; i++) copy<16>(to_row + i * 512, codes[i / 2] + (i % 2 * 4 + lane / 8) * LOADS + load);
#if BITS < 16
#pragma unroll
      for (int i = 0; i < (STEP_CELLS + 1) / 2; i++) {
        int at = i * 32 + lane, row = at / STEP_CELLS;
        if (STEP_CELLS == 1 && lane >= 16) break;
        int cell = PER_GROUP ? min(step * 8 + at % STEP_CELLS * (8 / STEP_CELLS), LOADS - 1) / max(PER_GROUP, 1) : 0;
        copy<4>(own + asked + CELLS_AT + at * 4, (row < 8 ? cells[0] : cells[1]) + row % 8 * CELLS + cell);
      }
#endif
      asked = asked == (DEPTH - 1) * HELD_BYTES ? 0 : asked + HELD_BYTES;
      if (++step == to) {
        step = from;
        tile += stride;
        if (tile < end) enter();
      }
    }
    asm volatile("cp.async.commit_group;");
  };
  const bool works = start < end;
  if (works) {
    enter();
    for (int i = 0; i < DEPTH - 1; i++) ask();
  }
#if BITS < 16
  // A thread brings the inputs of these words.
  constexpr int TURNS = (LOADS * 4 + THREADS - 1) / THREADS;
  uint4 columns[TURNS][WORD_CODES / 4];
  if (p.order)
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      int at = min(turn * THREADS + (int)threadIdx.x, LOADS * 4 - 1);
#pragma unroll
      for (int j = 0; j < WORD_CODES / 4; j++) columns[turn][j] = ((const uint4*)p.order)[at * (WORD_CODES / 4) + j];
    }
#endif

  wait_for_last();
  bring(p.x, plain, COLUMNS, p.norm, room);
  __syncthreads();
  float back = 1;
#if BITS < 16
#if BF16
  // Inputs are multiplied as f16: scaled so that none is beyond it.
  float most = 0;
  for (int at = threadIdx.x; at < COLUMNS; at += THREADS) most = fmaxf(most, fabsf(wide(plain[at])));
  most = block_max(most, room);
  int exponent = 0;
  frexpf(most, &exponent);
  float forth = ldexpf(1.0f, 8 - exponent);
  back = ldexpf(1.0f, exponent - 8);
#endif
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int at = turn * THREADS + threadIdx.x;
    float sum = 0;
    if (at < LOADS * 4) {
      uint4 packed[(WORD_CODES + 7) / 8];
      __half* x = (__half*)packed;
#pragma unroll
      for (int j = 0; j < WORD_CODES; j++) {
        uint4 four = columns[turn][j / 4];
        int column = p.order ? (j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w) : at * WORD_CODES + j;
#if BF16
        __half v = __float2half(wide(plain[column]) * forth);
#else
        __half v = plain[column];
#endif
        x[j % (WORD_CODES / 2) * 2 + j / (WORD_CODES / 2)] = v;
        sum += __half2float(v);
      }
      unsigned short* to_x = inputs + at / 4 * PITCH + at % 4 * WORD_CODES;
#if WORD_CODES == 4
      *(uint2*)to_x = *(uint2*)packed;
#else
#pragma unroll
      for (int j = 0; j < WORD_CODES / 8; j++) *(uint4*)(to_x + 8 * j) = packed[j];
#endif
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (at % 4 == 0 && at < LOADS * 4) sums[at / 4] = sum;
  }
  __syncthreads();
#endif

  if (works) {
    float total_a = 0, total_b = 0;
#if BITS == 16
    float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
#endif
    // Column 2 t of a product has load t alone.
    const bool mine = g == 2 * t;
    const uint32 own_row = own + g * 128 + (t ^ g % 2 * 4) * 16;
    const int next = g % 2 ? -64 : 64;
    int at = from, turn = 0;
    for (int done = start; done < end;) {
      asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
      // What every lane has copied is there, and what it read before may be written over.
      __syncwarp();
      const uint32 row = own_row + turn;
#if BITS < 16
      const uint32 cell = own + turn + CELLS_AT + g * STEP_CELLS * 4;
#endif
      turn = turn == (DEPTH - 1) * HELD_BYTES ? 0 : turn + HELD_BYTES;
      ask();
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const int load = at * 8 + s * 4 + t;
        const bool there = LOADS % 8 == 0 || load < LOADS;
        const unsigned short* x = inputs + load * PITCH;
        const uint4 ha = copied16(row + s * next), hb = copied16(row + s * next + 1024);
#if BITS == 16
        uint4 v = make_uint4(0, 0, 0, 0);
        if (mine && there) v = *(const uint4*)x;
        multiply(even, ha.x, hb.x, ha.y, hb.y, v.x, v.y);
        multiply(odd, ha.z, hb.z, ha.w, hb.w, v.z, v.w);
#else
        float even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        const uint32 a[4] = {ha.x, ha.y, ha.z, ha.w}, b[4] = {hb.x, hb.y, hb.z, hb.w};
        uint32 v[LOAD_CODES / 2];
#pragma unroll
        for (int j = 0; j < LOAD_CODES / 8; j++) {
          uint4 four = make_uint4(0, 0, 0, 0);
          if (mine && there) four = *(const uint4*)(x + 8 * j);
          *(uint4*)(v + 4 * j) = four;
        }
#pragma unroll
        for (int w = 0; w < 4; w++) word<0>(w % 2 ? odd : even, a[w], b[w], v + w * WORD_CODES / 2);
        const float sum = there ? sums[load] : 0;
        total_a += scaled(copied4(cell + (s * 4 + t) * STEP_CELLS / 8 * 4), even[0] + odd[0], sum);
        total_b += scaled(copied4(cell + (8 * STEP_CELLS + (s * 4 + t) * STEP_CELLS / 8) * 4), even[2] + odd[2], sum);
#endif
      }
      if (++at == to) {
#if BITS == 16
        total_a = even[0] + odd[0], total_b = even[2] + odd[2];
        even[0] = even[2] = odd[0] = odd[2] = 0;
#endif
        for (int d = 1; d < 4; d <<= 1) {
          total_a += __shfl_xor_sync(0xffffffffu, total_a, d);
          total_b += __shfl_xor_sync(0xffffffffu, total_b, d);
        }
        if (t == 0) {
          float* to_row = found + ((done - first) * 16 + g) * (SHARERS + 1) + sharer;
          to_row[0] = total_a;
          to_row[8 * (SHARERS + 1)] = total_b;
        }
        total_a = total_b = 0;
        at = from;
        done += stride;
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (end - first) * TILE; i += THREADS) {
    const int row = i % TILE;
    int at = first + i / TILE;
    auto sum = [&](int row) {
      const float* of = found + (i / TILE * 16 + row) * (SHARERS + 1);
      float y = 0;
      for (int w = 0; w < SHARERS; w++) y += of[w];
      return wide(narrow(y * back));
    };
    auto biased = [&](const Part& part, int r, float y) { return part.bias ? wide(narrow(y + wide(part.bias[r]))) : y; };
#if PAIRED
    int r = at * 8 + row;
    float gate = biased(p.parts[0], r, sum(row)), up = biased(p.parts[1], r, sum(row + 8));
    ((Half*)p.parts[0].out)[r] = narrow(activated(gate, PAIRED) * up);
#else
    const Part& part = *part_of(p, at);
    const int r = min(at * 16, part.rows - 16) + row;
    float y = biased(part, r, sum(row));
    if (p.logits) {
      y *= p.scale;
      ((float*)part.out)[r] = p.cap > 0 ? tanhf(y / p.cap) * p.cap : y;
    } else if (p.residual) {
      if (p.scale != 1) y = wide(narrow(y * p.scale));
      p.residual[r] = narrow(wide(p.residual[r]) + y);
    } else {
      ((Half*)part.out)[r] = narrow(y);
    }
#endif
  }
}
