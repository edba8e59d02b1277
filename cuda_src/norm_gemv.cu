// The products of the decode step at one row: with the layer norm before, or the residual after.
//
//   norm_gemv        y = activation(W layer_norm(x) + bias)
//   norm_gemv_once   the same, where the grid is large enough for every warp to take one turn;
//                    given shift = W norm_bias + bias instead of the two
//   gemv_add         y = activation(W x + bias) + residual
//   gemv_add_once    the same, likewise
//
// Shapes    W [M, K] rows; x, norm weight and norm bias [K]; bias, shift, residual and y [M]
// Dtypes    W and the norm are ELEM; x is float before a norm (the residual stream), else ELEM;
//           bias, residual and y are ELEM or float (entries ..._f32); shift is float
// Bytes     M K sizeof ELEM; everything else is small and read from L2
// FLOPs     2 M K
// Work      K is a compile-time macro, so a warp holds its part of x in registers, where it also
//           normalises it: every warp by itself, which costs less than one barrier. A warp has ROWS
//           outputs in hand and moves on by the whole grid. The first rows of weights are loaded
//           before the kernel waits for its predecessor, so they travel while that one still runs.
//           The sums over a warp are dealt out to its lanes, which takes fewer shuffles than
//           bringing each to all of them.
//           A long K is split over SPLIT warps, whose sums meet in shared memory.
//           Every instruction between the wait and the store is on the step's critical path, and
//           fetching it counts as much as running it: the entries ..._once do before the wait
//           all that does not need x.
// Source    layer norm: Ba, Kiros, Hinton, 2016, in two passes as in norm.cu
//
// It is the last rung of the ladder in linear.cu.
#include "activation.cuh"

#ifndef K
#define K 768
#endif

constexpr int WARPS = 4;  // of a block; also in gpt2cupy/ops/linear_kernels.py, like the next three
constexpr int SPLIT = K > 2048 ? 4 : 1;
constexpr int ROWS = K > 2048 && K <= 4096 ? 3 : 2;
constexpr int ROWS_ONCE = 3;           // of norm_gemv_once
constexpr int GROUPS = WARPS / SPLIT;  // groups of warps that share outputs

constexpr int VEC = WIDEST<elem_t>;
constexpr int SPAN = WARP * VEC;  // inputs that a warp takes in one access
constexpr int CHUNKS = (K + SPAN * SPLIT - 1) / (SPAN * SPLIT);
// Early loads of a lane that are under way at a time, see common.cuh: those of one output.
constexpr int PACE = OVERLAPS ? CHUNKS : UNPACED;

// Inputs k0 + c SPAN + i of the lane. Past the end they count as zero.
__device__ inline bool inside(int k0, int c) {
  return K % (SPAN * SPLIT) == 0 || k0 + c * SPAN < K;
}

template <typename T>
__device__ inline void load_inputs(const T* source, int k0, float (&values)[CHUNKS][VEC]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
    for (int i = 0; i < VEC; i++) values[c][i] = 0.0f;
    if (inside(k0, c)) load_floats(source + k0 + c * SPAN, values[c]);
  }
}

template <bool EARLY, int COUNT>
__device__ inline void load_rows(
    const elem_t* weight, int first, int k0, int M, Vec<elem_t, VEC> (&rows)[COUNT][CHUNKS]) {
#pragma unroll
  for (int r = 0; r < COUNT; r++) {
    const elem_t* row = weight + (size_t)min(first + r, M - 1) * K + k0;  // the last may repeat one
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      if (!inside(k0, c)) continue;
      int before = r * CHUNKS + c - PACE;
      unsigned zero = 0;
      if (EARLY && before >= 0) zero = zero_after_load(rows[before / CHUNKS][before % CHUNKS], M);
      rows[r][c] = *reinterpret_cast<const Vec<elem_t, VEC>*>(row + c * SPAN + zero);
    }
  }
}

// Whether the norm's parameters fit the registers beside the weights, before there is an x.
constexpr bool NORM_EARLY = K * sizeof(elem_t) <= 5120;

// Norm weight or norm bias.
__device__ inline void load_norm(const elem_t* source, int k0, Vec<elem_t, VEC> (&values)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (inside(k0, c))
      values[c] = *reinterpret_cast<const Vec<elem_t, VEC>*>(source + k0 + c * SPAN);
}

// x = x - mean, over the registers of one warp. VEC sums side by side: one after the other, each
// addition would wait for the one before.
__device__ inline void centre(float (&x)[CHUNKS][VEC], int k0) {
  float sums[VEC] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) sums[i] += x[c][i];
#pragma unroll
  for (int half = VEC / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  float mean = warp_sum(sums[0]) * (1.0f / K);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) x[c][i] = inside(k0, c) ? x[c][i] - mean : 0.0f;
}

// x = (x - mean) / sqrt(var + eps), likewise.
__device__ inline void normalise(float (&x)[CHUNKS][VEC], int k0, float eps) {
  centre(x, k0);
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) squares = fmaf(x[c][i], x[c][i], squares);
  float scale = rsqrtf(warp_sum(squares) * (1.0f / K) + eps);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) x[c][i] *= scale;
}

// Lanes that share a sum when N of them are dealt out.
template <int N>
constexpr int SHARING = WARP / (N < 3 ? N : 4);

// The sum over the warp of one of a few values: lane l gets that of value l / SHARING<N> (of
// three, the last lanes get the second again). At every
// step a lane keeps half of its values, so that three sums take six shuffles instead of fifteen.
// Each is added up along the tree of warp_sum.
template <int N, int OFFSET = WARP / 2>
__device__ inline float dealt_sum(const float (&values)[N]) {
  static_assert(N <= 4, "SHARING");
  if constexpr (N == 1) {
    return warp_sum<OFFSET * 2>(values[0]);
  } else {
    constexpr int HALF = (N + 1) / 2;
    bool upper = threadIdx.x & OFFSET;
    float kept[HALF];
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      int other = i + HALF < N ? i + HALF : i;  // the last of an odd number has no other
      float own = upper ? values[other] : values[i], sent = upper ? values[i] : values[other];
      kept[i] = own + __shfl_xor_sync(FULL_MASK, sent, OFFSET);
    }
    return dealt_sum<HALF, OFFSET / 2>(kept);
  }
}

// The weights as numbers, whose bits are put together in `known`.
__device__ inline void convert(const Vec<elem_t, VEC> (&rows)[ROWS][CHUNKS],
                               int k0,
                               float (&weights)[ROWS][CHUNKS][VEC],
                               unsigned& known) {
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (inside(k0, c))
#pragma unroll
        for (int i = 0; i < VEC; i++) {
          weights[r][c][i] = to_float(rows[r][c].value[i]);
          known |= __float_as_uint(weights[r][c][i]);
        }
}

// ONCE, which is gemv_add_once, says that every warp has one turn; then the weights are made
// numbers before there is an x. norm_gemv_once is norm_product below.
template <bool NORM, bool ONCE, typename in_t, typename out_t>
__device__ inline void product(const in_t* x,
                               const elem_t* norm_weight,
                               const elem_t* norm_bias,
                               const elem_t* weight,
                               const out_t* bias,
                               const out_t* residual,
                               out_t* y,
                               float eps,
                               int activation,
                               int M) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int group = warp / SPLIT, part = warp % SPLIT;
  int k0 = part * CHUNKS * SPAN + lane * VEC;
  int stride = gridDim.x * GROUPS * ROWS;
  int block_first = blockIdx.x * GROUPS * ROWS;
  int first = block_first + group * ROWS;
  // The sums are dealt out to the lanes; the first of those that share one finishes its output.
  int row = lane / SHARING<ROWS>;
  bool holder = lane % SHARING<ROWS> == 0 && row < ROWS;
  bool writer = part == 0 && holder;

  release_dependents();
  Vec<elem_t, VEC> rows[ROWS][CHUNKS];
  load_rows<true>(weight, first, k0, M, rows);
  float own_bias = addend(bias, first + row, writer && first + row < M);
  Vec<elem_t, VEC> scale[CHUNKS], offset[CHUNKS];
  if constexpr (NORM && NORM_EARLY) {
    load_norm(norm_weight, k0, scale);
    load_norm(norm_bias, k0, offset);
  }
  float weights[ROWS][CHUNKS][VEC];
  unsigned known = 0;
  if constexpr (ONCE) convert(rows, k0, weights, known);
  wait_for_inputs();

  float own_residual = addend(residual, first + row, writer && first + row < M);
  float xs[CHUNKS][VEC];
  load_inputs(ONCE ? x + zero_after(known, M) : x, k0, xs);
  if constexpr (NORM) {
    normalise(xs, k0, eps);
    if constexpr (!NORM_EARLY) {
      load_norm(norm_weight, k0, scale);
      load_norm(norm_bias, k0, offset);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (inside(k0, c))
#pragma unroll
        for (int i = 0; i < VEC; i++)
          xs[c][i] = fmaf(xs[c][i], to_float(scale[c].value[i]), to_float(offset[c].value[i]));
  }

  __shared__ float partial[2][WARPS][ROWS];
  // The bound is the same for the whole block: its warps may meet at a barrier.
  for (int turn = 0;; turn ^= 1) {
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      sums[r] = 0.0f;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
        if (inside(k0, c))
#pragma unroll
          for (int i = 0; i < VEC; i++) {
            float w = ONCE ? weights[r][c][i] : to_float(rows[r][c].value[i]);
            sums[r] = fmaf(xs[c][i], w, sums[r]);
          }
    }
    bool last = ONCE || block_first + stride >= M;
    if (!last) load_rows<false>(weight, first + stride, k0, M, rows);

    float own = dealt_sum(sums);
    if constexpr (SPLIT > 1) {
      if (holder) partial[turn][warp][row] = own;
      __syncthreads();
      if (writer) {
        own = 0.0f;
#pragma unroll
        for (int p = 0; p < SPLIT; p++) own += partial[turn][warp + p][row];
      }
    }
    if (writer && first + row < M)
      y[first + row] = from_float<out_t>(activate(own + own_bias, activation) + own_residual);
    if (last) break;
    block_first += stride;
    first += stride;
    bool writes = writer && first + row < M;
    own_bias = addend(bias, first + row, writes);
    own_residual = addend(residual, first + row, writes);
  }
}

// The product after a norm where every warp has its ROWS_ONCE outputs and no more. What does not
// need x is done before there is one: with d = x - mean,
//
//   W layer_norm(x) + bias = (W g) d / sqrt(var + eps) + shift     shift = W b + bias; g, b: norm
//
// so that after the wait only the mean stands before the product, and the squares of d are summed
// beside it. The shift is the same in every step and was made when the first was.
template <typename out_t>
__device__ inline void norm_product(const float* x,
                                    const elem_t* norm_weight,
                                    const elem_t* weight,
                                    const float* shift,
                                    out_t* y,
                                    float eps,
                                    int activation,
                                    int M) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int k0 = lane * VEC;
  int first = (blockIdx.x * WARPS + warp) * ROWS_ONCE;
  int row = lane / SHARING<ROWS_ONCE>;  // of the outputs, as the sums are dealt out
  bool writer = lane % SHARING<ROWS_ONCE> == 0 && row < ROWS_ONCE && first + row < M;

  release_dependents();
  Vec<elem_t, VEC> rows[ROWS_ONCE][CHUNKS], scale[CHUNKS];
  load_rows<true>(weight, first, k0, M, rows);
  load_norm(norm_weight, k0, scale);
  float own_shift = addend(shift, first + row, writer);
  float scaled[ROWS_ONCE][CHUNKS][VEC];
  unsigned known = 0;
#pragma unroll
  for (int r = 0; r < ROWS_ONCE; r++)
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (inside(k0, c))
#pragma unroll
        for (int i = 0; i < VEC; i++) {
          scaled[r][c][i] = to_float(rows[r][c].value[i]) * to_float(scale[c].value[i]);
          known |= __float_as_uint(scaled[r][c][i]);
        }
  wait_for_inputs();

  float d[CHUNKS][VEC];
  load_inputs(x + zero_after(known, M), k0, d);
  centre(d, k0);
  float sums[ROWS_ONCE] = {}, squares = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (inside(k0, c))
#pragma unroll
      for (int i = 0; i < VEC; i++) {
#pragma unroll
        for (int r = 0; r < ROWS_ONCE; r++) sums[r] = fmaf(scaled[r][c][i], d[c][i], sums[r]);
        squares = fmaf(d[c][i], d[c][i], squares);
      }
  float own = dealt_sum(sums);
  float result = fmaf(own, rsqrtf(warp_sum(squares) * (1.0f / K) + eps), own_shift);
  if (writer) y[first + row] = from_float<out_t>(activate(result, activation));
}

#define GEMV_ADD_ENTRY(name, out_t, once)                                                   \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                 \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual, \
           out_t* y, int activation, int M) {                                               \
    product<false, once>(x, (const elem_t*)nullptr, (const elem_t*)nullptr, weight, bias,   \
                         residual, y, 0.0f, activation, M);                                 \
  }

#define NORM_GEMV_ENTRY(name, out_t)                                                              \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                       \
      name(const float* x, const elem_t* norm_weight, const elem_t* norm_bias,                    \
           const elem_t* weight, const out_t* bias, out_t* y, float eps, int activation, int M) { \
    product<true, false>(x, norm_weight, norm_bias, weight, bias, (const out_t*)nullptr, y, eps,  \
                         activation, M);                                                          \
  }

#define NORM_GEMV_ONCE_ENTRY(name, out_t)                                                       \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                     \
      name(const float* x, const elem_t* norm_weight, const elem_t* weight, const float* shift, \
           out_t* y, float eps, int activation, int M) {                                        \
    norm_product(x, norm_weight, weight, shift, y, eps, activation, M);                         \
  }

GEMV_ADD_ENTRY(gemv_add, elem_t, false)
GEMV_ADD_ENTRY(gemv_add_f32, float, false)
GEMV_ADD_ENTRY(gemv_add_once, elem_t, true)
GEMV_ADD_ENTRY(gemv_add_once_f32, float, true)
#if K <= 2048  // a norm needs the whole row in one warp
NORM_GEMV_ENTRY(norm_gemv, elem_t)
NORM_GEMV_ENTRY(norm_gemv_f32, float)
#endif
#if K <= 1024  // the weights lie in registers as floats
NORM_GEMV_ONCE_ENTRY(norm_gemv_once, elem_t)
NORM_GEMV_ONCE_ENTRY(norm_gemv_once_f32, float)
#endif
