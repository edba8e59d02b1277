// The GEMVs of the decode step at one row: with the layer norm before, or the residual after.
//
//   norm_gemv        y = activation(W layer_norm(x) + bias)
//   norm_gemv_once   the same, where a single pass of the grid makes all outputs; given
//                    shift = W norm_bias + bias instead of the two
//   gemv_add         y = activation(W x + bias) + residual
//   gemv_add_once    the same, likewise in a single pass
//
// Shapes    W [M, K] rows; x, norm weight and norm bias [K]; bias, shift, residual and y [M]
// Dtypes    W and the norm are ELEM; x is float before a norm (the residual stream), else ELEM;
//           bias, residual and y are ELEM or float (entries ..._f32); shift is float
// Bytes     M K sizeof ELEM; everything else is small and read from L2
// FLOPs     2 M K
// Work      K is a compile-time macro, so a warp keeps its part of x in registers, where it also
//           normalises it: every warp by itself, which costs less than one barrier. A warp computes
//           ROWS outputs at a time and strides by the whole grid. The first rows of weights are
//           loaded before griddepcontrol.wait, while the preceding kernel still runs. The sums over
//           a warp are reduced so that each lane ends with one of them, which takes fewer shuffles
//           than giving each to all lanes. A long K is split over SPLIT warps, whose sums are added
//           through shared memory.
//           Every instruction between griddepcontrol.wait and the store is on the step's critical
//           path, and fetching it counts as much as running it. So the entries ..._once do all that
//           does not need x before that wait.
// Source    layer norm: Ba, Kiros, Hinton, 2016, in two passes as in norm.cu
//
// It is the last version of the ladder in linear.cu.
#include "epilogue.cuh"
#include "float_elem.cuh"

#ifndef K
#define K 768
#endif

#define LONGEST_ONCE 1024  // K of norm_gemv_once at most: its weights lie in registers as floats

constexpr int WARPS = 4;                         // of a block
constexpr int SPLIT = K > LONGEST_NORM ? 4 : 1;  // warps that share a row of weights
constexpr int ROWS = K <= 4096 && K > LONGEST_NORM ? 3 : 2;
constexpr int ROWS_ONCE = 3;            // of norm_gemv_once
constexpr int GROUPS = WARPS / SPLIT;   // groups of warps that share outputs
constexpr int OUTPUTS = GROUPS * ROWS;  // of a block at a time

constexpr int VEC = WIDEST<elem_t>;
constexpr int SPAN = WARP * VEC;  // inputs that a warp takes in one access
constexpr int CHUNKS = (K + SPAN * SPLIT - 1) / (SPAN * SPLIT);
// Early loads of a lane that are in flight at a time, see common.cuh: those of one output.
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

// Lanes that end with the same one of N sums.
template <int N>
constexpr int SHARING = WARP / (N < 3 ? N : 4);

// The sum over the warp of one of a few values: lane l gets that of value l / SHARING<N> (of three,
// the last lanes get the second again). At every step a lane keeps half of its values, so that
// three sums take six shuffles instead of fifteen. Each is added along the tree of warp_sum.
template <int N, int OFFSET = WARP / 2>
__device__ inline float scattered_sum(const float (&values)[N]) {
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
    return scattered_sum<HALF, OFFSET / 2>(kept);
  }
}

// The weights as floats. `known` depends on all of them.
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

// ONCE, which is gemv_add_once: there is a single pass of the grid, and the weights are converted
// to float before x is known. norm_gemv_once is shifted_gemv below.
template <bool NORM, bool ONCE, typename in_t, typename out_t>
__device__ inline void gemv(const in_t* x,
                            const elem_t* norm_weight,
                            const elem_t* norm_bias,
                            const elem_t* weight,
                            const Epilogue<out_t>& epilogue,
                            float eps,
                            int M) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int group = warp / SPLIT, part = warp % SPLIT;
  int k0 = part * CHUNKS * SPAN + lane * VEC;
  int stride = gridDim.x * GROUPS * ROWS;
  int block_first = blockIdx.x * GROUPS * ROWS;
  int first = block_first + group * ROWS;
  // Of the lanes that end with the same sum, the first writes its output.
  int row = lane / SHARING<ROWS>;
  bool holder = lane % SHARING<ROWS> == 0 && row < ROWS;
  bool writer = part == 0 && holder;

  griddepcontrol_launch_dependents();
  Vec<elem_t, VEC> rows[ROWS][CHUNKS];
  load_rows<true>(weight, first, k0, M, rows);
  float own_bias = epilogue.bias_at(first + row, writer && first + row < M);
  Vec<elem_t, VEC> scale[CHUNKS], offset[CHUNKS];
  if constexpr (NORM && NORM_EARLY) {
    load_norm(norm_weight, k0, scale);
    load_norm(norm_bias, k0, offset);
  }
  float weights[ROWS][CHUNKS][VEC];
  unsigned known = 0;
  if constexpr (ONCE) convert(rows, k0, weights, known);
  griddepcontrol_wait();

  float own_residual = epilogue.residual_at(first + row, writer && first + row < M);
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
  for (int buffer = 0;; buffer ^= 1) {
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

    float own = scattered_sum(sums);
    if constexpr (SPLIT > 1) {
      if (holder) partial[buffer][warp][row] = own;
      __syncthreads();
      if (writer) {
        own = 0.0f;
#pragma unroll
        for (int p = 0; p < SPLIT; p++) own += partial[buffer][warp + p][row];
      }
    }
    if (writer && first + row < M) epilogue.store(first + row, own + own_bias, own_residual);
    if (last) break;
    block_first += stride;
    first += stride;
    bool writes = writer && first + row < M;
    own_bias = epilogue.bias_at(first + row, writes);
    own_residual = epilogue.residual_at(first + row, writes);
  }
}

// The GEMV after a norm where a single pass of the grid makes all outputs, ROWS_ONCE a warp. What
// does not need x is done before griddepcontrol.wait: with d = x - mean,
//
//   W layer_norm(x) + bias = (W g) d / sqrt(var + eps) + shift     shift = W b + bias; g, b: norm
//
// so that after it only the mean is computed before the products, and the squares of d are summed
// beside them. The shift is the same in every step, and was computed before the first.
template <typename out_t>
__device__ inline void shifted_gemv(const float* x,
                                    const elem_t* norm_weight,
                                    const elem_t* weight,
                                    const float* shift,
                                    const Epilogue<out_t>& epilogue,
                                    float eps,
                                    int M) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int k0 = lane * VEC;
  int first = (blockIdx.x * WARPS + warp) * ROWS_ONCE;
  int row = lane / SHARING<ROWS_ONCE>;  // of the outputs, as scattered_sum leaves them
  bool writer = lane % SHARING<ROWS_ONCE> == 0 && row < ROWS_ONCE && first + row < M;

  griddepcontrol_launch_dependents();
  Vec<elem_t, VEC> rows[ROWS_ONCE][CHUNKS], scale[CHUNKS];
  load_rows<true>(weight, first, k0, M, rows);
  load_norm(norm_weight, k0, scale);
  // It is never null: the test changes how NVRTC orders the loads, 117 registers instead of 121 in
  // float at K = 768.
  float own_shift = shift && writer ? shift[first + row] : 0.0f;
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
  griddepcontrol_wait();

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
  float own = scattered_sum(sums);
  float result = fmaf(own, rsqrtf(warp_sum(squares) * (1.0f / K) + eps), own_shift);
  if (writer) epilogue.y[first + row] = from_float<out_t>(activate(result, epilogue.activation));
}

#define GEMV_ADD_ENTRY(name, out_t, once)                                                          \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                        \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual,        \
           out_t* y, int activation, int M) {                                                      \
    gemv<false, once, elem_t, out_t>(x, nullptr, nullptr, weight, {bias, residual, y, activation}, \
                                     0.0f, M);                                                     \
  }

#define NORM_GEMV_ENTRY(name, out_t)                                                              \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                       \
      name(const float* x, const elem_t* norm_weight, const elem_t* norm_bias,                    \
           const elem_t* weight, const out_t* bias, out_t* y, float eps, int activation, int M) { \
    gemv<true, false, float, out_t>(x, norm_weight, norm_bias, weight,                            \
                                    {bias, nullptr, y, activation}, eps, M);                      \
  }

#define NORM_GEMV_ONCE_ENTRY(name, out_t)                                                          \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                        \
      name(const float* x, const elem_t* norm_weight, const elem_t* weight, const float* shift,    \
           out_t* y, float eps, int activation, int M) {                                           \
    shifted_gemv<out_t>(x, norm_weight, weight, shift, {nullptr, nullptr, y, activation}, eps, M); \
  }

// A norm needs the whole row in one warp.
#if !ELEM_IS_FLOAT
GEMV_ADD_ENTRY(gemv_add, elem_t, false)
GEMV_ADD_ENTRY(gemv_add_once, elem_t, true)
#if K <= LONGEST_NORM
NORM_GEMV_ENTRY(norm_gemv, elem_t)
#endif
#if K <= LONGEST_ONCE
NORM_GEMV_ONCE_ENTRY(norm_gemv_once, elem_t)
#endif
#endif
GEMV_ADD_ENTRY(gemv_add_f32, float, false)
GEMV_ADD_ENTRY(gemv_add_once_f32, float, true)
#if K <= LONGEST_NORM
NORM_GEMV_ENTRY(norm_gemv_f32, float)
#endif
#if K <= LONGEST_ONCE
NORM_GEMV_ONCE_ENTRY(norm_gemv_once_f32, float)
#endif
