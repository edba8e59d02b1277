// The product of any number of rows with a matrix, every sum in an order that K alone decides.
//
//   y[n] = activation(W x[n] + bias) + residual[n]
//
// Shapes    x [N, K]; W [M, K] rows; bias [M]; residual and y [N, M]; any sizes
// Dtypes    x and W are ELEM; bias, residual and y are ELEM or float (entries ..._f32)
// Bytes     M K sizeof ELEM for every ROWS rows of x, N K sizeof ELEM for every OUTPUTS outputs
// FLOPs     2 N M K
// Work      a block makes ROWS x OUTPUTS values. Its threads deal K out among them, VEC inputs at a
//           time, so that loads are coalesced and a single row still fills the chip. The sums of a
//           warp meet in shuffles that halve their number at every step, those of the warps in
//           shared memory.
//
// What a row comes to depends neither on the other rows nor on its place among them: every output
// is summed along the same tree, and one thread finishes it by the same instructions. Rows past
// the last repeat it; they end in outputs that nobody stores. batch_invariant=True takes it where
// linear_rows.cu cannot: float, K not a multiple of 8, and chips older than sm_80.
#include "activation.cuh"

// The constants up to the block's warps are also in gpt2cupy/ops/linear_kernels.py.
constexpr int ROWS = 8;
constexpr int OUTPUTS = 8;
constexpr int WARPS = 4;

constexpr int VALUES = ROWS * OUTPUTS;
constexpr int HELD = VALUES / WARP;  // of a lane when the lanes have met
static_assert(VALUES <= WARPS * WARP && HELD * WARP == VALUES, "a thread finishes one value");

// Sum every value over the warp: lane i is left with values HELD i .. HELD i + HELD - 1, in the
// first places. Addition commutes, so the tree is the same for all values.
__device__ inline void meet(float (&values)[VALUES]) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    constexpr int MOST = VALUES / 2;
    int left = MOST / step, offset = WARP / 2 / step;
    bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < MOST; i++)
      if (i < left) {
        float kept = upper ? values[i + left] : values[i];
        float sent = upper ? values[i] : values[i + left];
        values[i] = kept + __shfl_xor_sync(FULL_MASK, sent, offset);
      }
  }
}

template <int VEC, typename out_t>
__device__ inline void product(const elem_t* x,
                               const elem_t* weight,
                               const out_t* bias,
                               const out_t* residual,
                               out_t* y,
                               int activation,
                               int N,
                               int M,
                               int K) {
  int n0 = blockIdx.y * ROWS, m0 = blockIdx.x * OUTPUTS;
  float w[OUTPUTS][VEC];
  auto load_weights = [&](int k) {
#pragma unroll
    for (int m = 0; m < OUTPUTS; m++)
      load_floats(weight + (size_t)min(m0 + m, M - 1) * K + k, w[m]);
  };

  release_dependents();
  int k = threadIdx.x * VEC;
  if (k < K) load_weights(k);
  wait_for_inputs();

  float sums[VALUES] = {};
#pragma unroll 1
  while (k < K) {
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      float xs[VEC];
      load_floats(x + (size_t)min(n0 + n, N - 1) * K + k, xs);
#pragma unroll
      for (int m = 0; m < OUTPUTS; m++)
#pragma unroll
        for (int i = 0; i < VEC; i++)
          sums[n * OUTPUTS + m] = fmaf(xs[i], w[m][i], sums[n * OUTPUTS + m]);
    }
    k += WARPS * WARP * VEC;
    if (k < K) load_weights(k);
  }

  __shared__ float partial[WARPS][VALUES];
  meet(sums);
#pragma unroll
  for (int i = 0; i < HELD; i++)
    partial[threadIdx.x / WARP][threadIdx.x % WARP * HELD + i] = sums[i];
  __syncthreads();
  int n = n0 + threadIdx.x / OUTPUTS, m = m0 + threadIdx.x % OUTPUTS;
  if (threadIdx.x >= VALUES || n >= N || m >= M) return;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) sum += partial[warp][threadIdx.x];
  size_t place = (size_t)n * M + m;
  if (bias) sum += to_float(bias[m]);
  sum = activate(sum, activation);
  if (residual) sum += to_float(residual[place]);
  y[place] = from_float<out_t>(sum);
}

#define LINEAR_FIXED_ENTRY(name, out_t)                                                     \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                 \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual, \
           out_t* y, int activation, int N, int M, int K) {                                 \
    if (K % 4)                                                                              \
      product<1>(x, weight, bias, residual, y, activation, N, M, K);                        \
    else                                                                                    \
      product<4>(x, weight, bias, residual, y, activation, N, M, K);                        \
  }

LINEAR_FIXED_ENTRY(linear_fixed, elem_t)
LINEAR_FIXED_ENTRY(linear_fixed_f32, float)
