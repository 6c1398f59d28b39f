// The other operations of a step.

/// The embedding of the token.
extern "C" __global__ void __launch_bounds__(THREADS) embed(const Half* table, const int* token, Half* out, int hidden, float scale) {
  let_next_begin();
  wait_for_last();
  const Half* row = table + (long long)token[0] * hidden;
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < hidden; i += gridDim.x * THREADS)
    out[i] = scale == 1 ? row[i] : narrow(wide(row[i]) * scale);
}

/// Norms of runs of `n` features, one for each block: stored, or added to `residual` times `scale`.
extern "C" __global__ void __launch_bounds__(THREADS) normalize(const Half* x, Half* out, Half* residual, int n, float scale, Norm norm) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float room[WARPS];
  Half* own = (Half*)shared;
  let_next_begin();
  wait_for_last();
  bring(x + (long long)blockIdx.x * n, own, n, norm, room);
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += THREADS) {
    long long at = (long long)blockIdx.x * n + i;
    if (residual) residual[at] = narrow(wide(residual[at]) + (scale == 1 ? wide(own[i]) : wide(narrow(wide(own[i]) * scale))));
    else out[at] = own[i];
  }
}

/// A gated activation.
extern "C" __global__ void __launch_bounds__(THREADS) gate(const Half* gate, const Half* up, Half* out, int n, int kind) {
  let_next_begin();
  wait_for_last();
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS)
    out[i] = narrow(activated(wide(gate[i]), kind) * wide(up[i]));
}

/// Adds to the residual stream.
extern "C" __global__ void __launch_bounds__(THREADS) add(const Half* x, Half* residual, int n, float scale) {
  let_next_begin();
  wait_for_last();
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += gridDim.x * THREADS) {
    float y = scale == 1 ? wide(x[i]) : wide(narrow(wide(x[i]) * scale));
    residual[i] = narrow(wide(residual[i]) + y);
  }
}
