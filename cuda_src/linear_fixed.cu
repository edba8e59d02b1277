// The product of any number of rows with a matrix, every sum in an order that K alone decides.
//
//   y[n] = activation(W x[n] + bias) + residual[n]
//
// Shapes    x [N, K]; W [M, K] rows; bias [M]; residual and y [N, M]; any sizes
// Dtypes    x and W are ELEM; bias, residual and y are ELEM or float (entries ..._f32)
// Bytes     M K sizeof ELEM for every ROWS rows of x, N K sizeof ELEM for every OUTPUTS outputs
// FLOPs     2 N M K
// Work      a block makes ROWS x OUTPUTS values. Its threads share K, VEC inputs each at a
//           time, so that loads are coalesced and a single row still fills the chip. The sums of a
//           warp are added by shuffles that halve their number at every step, those of the warps
//           through shared memory.
//
// The result of a row depends neither on the other rows nor on its place among them: every output
// is summed along the same tree, and one thread writes it by the same instructions. Rows past the
// last repeat it; their outputs are not stored. batch_invariant=True takes it where linear_rows.cu
// cannot: float, K not a multiple of 8, and chips older than sm_80. By default it takes 2 to 16
// rows of float.
#include "epilogue.cuh"
#include "float_elem.cuh"

constexpr int ROWS = 8;     // of x, of a block
constexpr int OUTPUTS = 8;  // of a block
constexpr int WARPS = 4;

constexpr int VALUES = ROWS * OUTPUTS;
constexpr int KEPT = VALUES / WARP;  // of a lane when the lanes have met
static_assert(VALUES <= WARPS * WARP && KEPT * WARP == VALUES, "a thread writes one value");

// Sum every value over the warp: lane i is left with values KEPT i .. KEPT i + KEPT - 1, in the
// first places. Addition commutes, so the tree is the same for all values.
__device__ inline void scatter_sums(float (&values)[VALUES]) {
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
__device__ inline void gemm(
    const elem_t* x, const elem_t* weight, const Epilogue<out_t>& epilogue, int N, int M, int K) {
  int n0 = blockIdx.y * ROWS, m0 = blockIdx.x * OUTPUTS;
  float w[OUTPUTS][VEC];
  auto load_weights = [&](int k) {
#pragma unroll
    for (int m = 0; m < OUTPUTS; m++)
      load_floats(weight + (size_t)min(m0 + m, M - 1) * K + k, w[m]);
  };

  griddepcontrol_launch_dependents();
  int k = threadIdx.x * VEC;
  if (k < K) load_weights(k);
  griddepcontrol_wait();

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
  scatter_sums(sums);
#pragma unroll
  for (int i = 0; i < KEPT; i++)
    partial[threadIdx.x / WARP][threadIdx.x % WARP * KEPT + i] = sums[i];
  __syncthreads();
  int n = n0 + threadIdx.x / OUTPUTS, m = m0 + threadIdx.x % OUTPUTS;
  if (threadIdx.x >= VALUES || n >= N || m >= M) return;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) sum += partial[warp][threadIdx.x];
  epilogue.apply((size_t)n * M + m, m, sum);
}

#define LINEAR_FIXED_ENTRY(name, out_t)                                                     \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                 \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual, \
           out_t* y, int activation, int N, int M, int K) {                                 \
    if (K % 4)                                                                              \
      gemm<1, out_t>(x, weight, {bias, residual, y, activation}, N, M, K);                  \
    else                                                                                    \
      gemm<4, out_t>(x, weight, {bias, residual, y, activation}, N, M, K);                  \
  }

#if !ELEM_IS_FLOAT
LINEAR_FIXED_ENTRY(linear_fixed, elem_t)
#endif
LINEAR_FIXED_ENTRY(linear_fixed_f32, float)
