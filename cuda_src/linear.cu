// GEMV, the product of one row with a matrix, with its epilogue; and the epilogue alone.
//
//   y = activation(W x + bias) + residual
//
// Shapes    x [K]; W [M, K] rows; bias, y, residual [M]
// Dtypes    x and W are ELEM; y, bias and residual are ELEM or float (entries ..._f32: the residual
//           stream and the logits)
// Bytes     M K sizeof ELEM for the matrix; everything else is K + M elements
// FLOPs     2 M K
// Work      a GEMV reads each weight once, so it is bound by memory: what counts is 16-byte loads,
//           several in flight per thread, and no barrier between them.
//
// The ladder
//   gemv_naive    one thread per output: neighbouring threads read K elements apart
//   gemv_scalar   one warp per output: coalesced, one element per load; takes any K
//   gemv          one warp per ROWS outputs, 16 bytes per load: ROWS loads in flight per lane and
//                 each x value used ROWS times; K must be a multiple of 16 / sizeof ELEM
#include "epilogue.cuh"

constexpr int ROWS = 2;  // outputs of one warp of `gemv`

// ---------------------------------------------------------------------------------------------
// the ladder

template <typename out_t>
__device__ inline void gemv_naive_body(
    const elem_t* x, const elem_t* weight, const Epilogue<out_t>& epilogue, int M, int K) {
  int m = blockIdx.x * blockDim.x + threadIdx.x;
  if (m >= M) return;
  float sum = 0.0f;
  for (int k = 0; k < K; k++) sum += to_float(x[k]) * to_float(weight[(size_t)m * K + k]);
  epilogue.apply(m, m, sum);
}

template <typename out_t>
__device__ inline void gemv_scalar_body(
    const elem_t* x, const elem_t* weight, const Epilogue<out_t>& epilogue, int M, int K) {
  int lane = threadIdx.x % WARP;
  int m = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (m >= M) return;
  const elem_t* row = weight + (size_t)m * K;
  float sum = 0.0f;
  for (int k = lane; k < K; k += WARP) sum += to_float(x[k]) * to_float(row[k]);
  sum = warp_sum(sum);
  if (lane == 0) epilogue.apply(m, m, sum);
}

template <typename out_t>
__device__ inline void gemv_body(
    const elem_t* x, const elem_t* weight, const Epilogue<out_t>& epilogue, int M, int K) {
  constexpr int VEC = WIDEST<elem_t>;
  int lane = threadIdx.x % WARP;
  int first = (blockIdx.x * blockDim.x + threadIdx.x) / WARP * ROWS;
  if (first >= M) return;

  const elem_t* rows[ROWS];
  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    rows[r] = weight + (size_t)min(first + r, M - 1) * K;  // the last warp may repeat a row
    sums[r] = 0.0f;
  }
#pragma unroll 4
  for (int k = lane * VEC; k < K; k += WARP * VEC) {
    float xs[VEC], ws[VEC];
    load_floats(x + k, xs);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      load_floats(rows[r] + k, ws);
#pragma unroll
      for (int i = 0; i < VEC; i++) sums[r] = fmaf(xs[i], ws[i], sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float sum = warp_sum(sums[r]);
    if (lane == 0 && first + r < M) epilogue.apply(first + r, first + r, sum);
  }
}

#define GEMV_ENTRY(name, bounds, body, out_t)                                                      \
  extern "C" __global__ void bounds name(const elem_t* x, const elem_t* weight, const out_t* bias, \
                                         const out_t* residual, out_t* y, int activation, int M,   \
                                         int K) {                                                  \
    body<out_t>(x, weight, {bias, residual, y, activation}, M, K);                                 \
  }

GEMV_ENTRY(gemv_naive, , gemv_naive_body, elem_t)
GEMV_ENTRY(gemv_scalar, __launch_bounds__(128), gemv_scalar_body, elem_t)
GEMV_ENTRY(gemv, , gemv_body, elem_t)
GEMV_ENTRY(gemv_naive_f32, , gemv_naive_body, float)
GEMV_ENTRY(gemv_scalar_f32, __launch_bounds__(128), gemv_scalar_body, float)
GEMV_ENTRY(gemv_f32, , gemv_body, float)

// ---------------------------------------------------------------------------------------------
// y = activation(x + bias) + residual over [N, M], after a product that has no epilogue

template <typename out_t>
__device__ inline void bias_act_body(const out_t* x,
                                     const Epilogue<out_t>& epilogue,
                                     int N,
                                     int M) {
  size_t size = (size_t)N * M;
  size_t stride = (size_t)gridDim.x * blockDim.x;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride)
    epilogue.apply(i, i % M, to_float(x[i]));
}

extern "C" __global__ void __launch_bounds__(256) bias_act(const elem_t* x,
                                                           const elem_t* bias,
                                                           const elem_t* residual,
                                                           elem_t* y,
                                                           int activation,
                                                           int N,
                                                           int M) {
  bias_act_body(x, {bias, residual, y, activation}, N, M);
}

extern "C" __global__ void __launch_bounds__(256) bias_act_f32(const float* x,
                                                               const float* bias,
                                                               const float* residual,
                                                               float* y,
                                                               int activation,
                                                               int N,
                                                               int M) {
  bias_act_body(x, {bias, residual, y, activation}, N, M);
}
