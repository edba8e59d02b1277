// The products of the decode step at 2 to 16 rows, on tensor cores: norm before, or residual after.
//
//   norm_skinny  y[n] = activation(W layer_norm(x[n]) + bias)
//   skinny_add   y[n] = activation(W x[n] + bias) + residual[n]
//
// Shapes    x [N, K], N <= 16; W [M, K] rows; norm weight and norm bias [K]; bias [M];
//           residual and y [N, M]
// Dtypes    W and the norm are ELEM (half or bfloat16); x is float before a norm (the residual
//           stream), else ELEM; bias, residual and y are ELEM or float (entries ..._f32)
// Bytes     M K sizeof ELEM, read once for all rows of x; x is read from L2 by every block
// FLOPs     2 N M K
// Work      a block makes all N rows of TILE = 8 outputs; its warps share K. In mma.m16n8k16 the
//           rows of x are the 16 and the rows of W the 8. A lane loads 16 bytes, eight inputs of
//           one row, and gives them to two mma in the order in which they lie: which inputs a
//           fragment calls k = 0 .. 15 does not matter as long as both operands agree. So neither
//           operand passes through shared memory. Weights are loaded before the kernel waits for
//           its predecessor. The sums of the warps meet in shared memory.
//
// Needs sm_80 (mma.m16n8k16); older chips take the library's product.
#include "activation.cuh"
#include "mma.cuh"

#ifndef K
#define K 768
#endif

#if __CUDA_ARCH__ >= 800

constexpr int WARPS = K > 2048 ? 8 : 4;  // of a block; also in gpt2cupy/ops/linear.py
constexpr int TILE = 8;                  // outputs of a block in one turn; likewise
constexpr int ROWS = 16;

constexpr int VEC = 8;    // inputs of a lane's load
constexpr int SPAN = 32;  // inputs of a warp's load: 4 lanes along K, 8 along the rows
constexpr int CHUNKS = (K + SPAN * WARPS - 1) / (SPAN * WARPS);

using Packed = Vec<elem_t, VEC>;

__device__ inline unsigned word(const Packed& packed, int i) {
  return reinterpret_cast<const unsigned*>(&packed)[i];
}

// Whether chunk c of the lane lies inside the row.
__device__ inline bool inside(int k0, int c) {
  return K % (SPAN * WARPS) == 0 || k0 + c * SPAN < K;
}

__device__ inline void load_weights(const elem_t* weight, int m, int k0, Packed (&w)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (inside(k0, c))
      w[c] = *reinterpret_cast<const Packed*>(weight + (size_t)m * K + k0 + c * SPAN);
    else
      w[c] = {};
}

// Mean and 1 / sqrt(var + eps) of every row, by a warp each, into shared memory.
__device__ inline void row_statistics(const float* x, int N, float eps, float (*statistics)[2]) {
  constexpr int STEPS = (K + WARP * 4 - 1) / (WARP * 4);
  int lane = threadIdx.x % WARP;
  for (int n = threadIdx.x / WARP; n < N; n += WARPS) {
    float values[STEPS][4];
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      int k = (s * WARP + lane) * 4;
      if (k < K) {
        load_floats(x + (size_t)n * K + k, values[s]);
        sum += (values[s][0] + values[s][1]) + (values[s][2] + values[s][3]);
      }
    }
    float mean = warp_sum(sum) / K, squares = 0.0f;
#pragma unroll
    for (int s = 0; s < STEPS; s++)
      if ((s * WARP + lane) * 4 < K)
#pragma unroll
        for (int i = 0; i < 4; i++)
          squares = fmaf(values[s][i] - mean, values[s][i] - mean, squares);
    float scale = rsqrtf(warp_sum(squares) / K + eps);
    if (lane == 0) {
      statistics[n][0] = mean;
      statistics[n][1] = scale;
    }
  }
}

template <bool NORM, typename in_t, typename out_t>
__device__ inline void product(const in_t* x,
                               const elem_t* norm_weight,
                               const elem_t* norm_bias,
                               const elem_t* weight,
                               const out_t* bias,
                               const out_t* residual,
                               out_t* y,
                               float eps,
                               int activation,
                               int N,
                               int M) {
  __shared__ float statistics[ROWS][2];
  __shared__ float sums[2][WARPS][ROWS][TILE];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int along = lane % 4, across = lane / 4;  // place along K, row of an operand
  int k0 = warp * CHUNKS * SPAN + along * VEC;
  int tile = blockIdx.x;

  release_dependents();
  Packed w[CHUNKS];
  load_weights(weight, min(tile * TILE + across, M - 1), k0, w);
  int first = tile * TILE + threadIdx.x % TILE;
  float own_bias = addend(bias, first, first < M);
  Packed scale[CHUNKS], shift[CHUNKS];
  if constexpr (NORM) {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (inside(k0, c)) {
        scale[c] = *reinterpret_cast<const Packed*>(norm_weight + k0 + c * SPAN);
        shift[c] = *reinterpret_cast<const Packed*>(norm_bias + k0 + c * SPAN);
      }
  }
  wait_for_inputs();

  // Rows `across` and `across + 8` of x, as the tensor cores take them. Normed ones are kept for
  // all turns; others are read as they are needed, for K may be long and there is one turn.
  Packed xs[CHUNKS][2];
  if constexpr (NORM) {
    row_statistics(x, N, eps, statistics);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int n = across + half * 8;
        xs[c][half] = {};
        if (n >= N || !inside(k0, c)) continue;
        float values[VEC];
        load_floats(x + (size_t)n * K + k0 + c * SPAN, values);
#pragma unroll
        for (int i = 0; i < VEC; i++)
          xs[c][half].value[i] =
              from_float<elem_t>(fmaf((values[i] - statistics[n][0]) * statistics[n][1],
                                      to_float(scale[c].value[i]), to_float(shift[c].value[i])));
      }
  }
  // Thread i writes output i % TILE of row i / TILE: N TILE outputs, at most one each.
  int n = threadIdx.x / TILE;
  // With at most 16 rows an int holds the place.
  float own_residual = addend(residual, n * M + first, n < N && first < M);

  for (int turn = 0; tile * TILE < M; turn ^= 1) {
    float d[2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      if constexpr (!NORM) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          bool there = across + half * 8 < N && inside(k0, c);
          const in_t* source = x + (size_t)(across + half * 8) * K + k0 + c * SPAN;
          xs[c][half] = there ? *reinterpret_cast<const Packed*>(source) : Packed{};
        }
      }
#pragma unroll
      for (int part = 0; part < 2; part++) {
        unsigned a[4] = {word(xs[c][0], part * 2), word(xs[c][1], part * 2),
                         word(xs[c][0], part * 2 + 1), word(xs[c][1], part * 2 + 1)};
        mma<elem_t>(d[part], a, word(w[c], part * 2), word(w[c], part * 2 + 1));
      }
    }
    int m = tile * TILE + threadIdx.x % TILE;
    tile += gridDim.x;
    if (tile * TILE < M) load_weights(weight, min(tile * TILE + across, M - 1), k0, w);

#pragma unroll
    for (int i = 0; i < 4; i++)
      sums[turn][warp][across + i / 2 * 8][along * 2 + i % 2] = d[0][i] + d[1][i];
    __syncthreads();
    if (n < N && m < M) {
      float sum = own_bias;
#pragma unroll
      for (int part = 0; part < WARPS; part++) sum += sums[turn][part][n][threadIdx.x % TILE];
      y[(size_t)n * M + m] = from_float<out_t>(activate(sum, activation) + own_residual);
    }
    m = tile * TILE + threadIdx.x % TILE;
    own_bias = addend(bias, m, m < M);
    own_residual = addend(residual, n * M + m, n < N && m < M);
  }
}

#define NORM_SKINNY_ENTRY(name, out_t)                                                          \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP) name(                               \
      const float* x, const elem_t* norm_weight, const elem_t* norm_bias, const elem_t* weight, \
      const out_t* bias, out_t* y, float eps, int activation, int N, int M) {                   \
    product<true>(x, norm_weight, norm_bias, weight, bias, (const out_t*)nullptr, y, eps,       \
                  activation, N, M);                                                            \
  }

#define SKINNY_ADD_ENTRY(name, out_t)                                                            \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                      \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual,      \
           out_t* y, int activation, int N, int M) {                                             \
    product<false>(x, (const elem_t*)nullptr, (const elem_t*)nullptr, weight, bias, residual, y, \
                   0.0f, activation, N, M);                                                      \
  }

SKINNY_ADD_ENTRY(skinny_add, elem_t)
SKINNY_ADD_ENTRY(skinny_add_f32, float)
#if K <= 2048  // longer normed rows do not fit the registers
NORM_SKINNY_ENTRY(norm_skinny, elem_t)
NORM_SKINNY_ENTRY(norm_skinny_f32, float)
#endif

#endif
