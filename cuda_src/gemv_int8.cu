// The GEMVs of the decode step at one row with weights in int8: with the layer norm before, or the
// residual after.
//
//   norm_gemv_int8    y = activation(W layer_norm(x) + bias)
//   gemv_add_int8     y = activation(W x + bias) + residual
//
// Shapes    values [M, K] and scales [G, M] of W as in int8.cuh, M a multiple of 8, K of 16;
//           x, norm weight and norm bias [K]; bias, residual and y [M]
// Dtypes    the norm is ELEM; x is float before a norm (the residual stream), else ELEM; bias,
//           residual and y are ELEM or float (entries ..._f32)
// Bytes     M K (1 + 2 / GROUP); everything else is small and read from L2
// FLOPs     2 M K
// Work      the threads of a block share K, CHUNKS pieces of 16 a thread, and compute ROWS outputs
//           at a time; the block strides by the whole grid. Weights and scales of the first ROWS
//           are loaded before griddepcontrol.wait.
//
// A byte of weight leaves no time for a conversion to float and a multiplication of its own. So the
// 16 inputs of a piece are written as whole numbers: x = step (256 d1 + d0), digits of a byte
// each, with about 2^15 steps to the largest of them (2^23 and three digits where ELEM is float).
// That is finer than fp16 itself is at that input. Four weights then meet four digits in
// one instruction (dp4a), whose sums are exact; only a piece's sum becomes float, where it meets
// its step and scale.
//
// Source    layer norm: Ba, Kiros, Hinton, 2016; the warps' means and variances are combined
//           as in Chan, Golub, LeVeque, 1979
#include "epilogue.cuh"
#include "float_elem.cuh"
#include "int8.cuh"

#ifndef K
#define K 768
#endif

constexpr int ROWS = 8;                           // of a block: outputs at a time
constexpr int CHUNKS = K > LONGEST_NORM ? 2 : 1;  // pieces of a thread
constexpr int WARPS = (K + PIECE * WARP * CHUNKS - 1) / (PIECE * WARP * CHUNKS);

constexpr int THREADS = WARPS * WARP;
constexpr int PIECES = K / PIECE;
constexpr int DIGITS = sizeof(elem_t) == sizeof(float) ? 3 : 2;
// The largest whole number, a little less than the digits can hold, and what makes them positive.
constexpr int LIMIT = DIGITS == 3 ? 0x7f7f00 : 0x7f00;
constexpr int OFFSET = DIGITS == 3 ? 0x808080 : 0x8080;

__device__ inline int piece_of(int c) { return c * THREADS + threadIdx.x; }

__device__ inline bool inside(int c) {
  return PIECES % (THREADS * CHUNKS) == 0 || piece_of(c) < PIECES;
}

struct Tile {
  Words weights[ROWS][CHUNKS];
  Packed<scale_t, ROWS> scales[CHUNKS];
};

// A thread past the end reads the last piece once more: its inputs are zero.
__device__ inline void load_tile(
    const signed char* values, const scale_t* scales, int tile, int M, Tile& w) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int k = min(piece_of(c), PIECES - 1) * PIECE;
    const signed char* first = values + (size_t)tile * ROWS * K + k;
#pragma unroll
    for (int r = 0; r < ROWS; r++) w.weights[r][c] = load_words(first + r * K);
    w.scales[c] = *reinterpret_cast<const Packed<scale_t, ROWS>*>(scales + (size_t)(k / GROUP) * M +
                                                                  tile * ROWS);
  }
}

// A piece of the inputs as whole numbers; returns their step. NaN stays NaN.
__device__ inline float to_digits(const float (&x)[PIECE], int (&digits)[DIGITS][4]) {
  unsigned most = 0;  // magnitudes are in the order of their bits, NaN above all
#pragma unroll
  for (int i = 0; i < PIECE; i++) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
  most = max(most, __float_as_uint(1e-30f));  // smaller ones are nothing beside any output
  float inverse = __fdividef(LIMIT, __uint_as_float(most));
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = __float2int_rn(x[j * 4 + i] * inverse) + OFFSET;
    // The bytes of four numbers, sorted by their place; signed again without the offset.
    unsigned a = __byte_perm(v[0], v[1], 0x5140), b = __byte_perm(v[2], v[3], 0x5140);
    digits[0][j] = __byte_perm(a, b, 0x5410) ^ 0x80808080;
    digits[1][j] = __byte_perm(a, b, 0x7632) ^ 0x80808080;
    if constexpr (DIGITS == 3) {
      a = __byte_perm(v[0], v[1], 0x0062), b = __byte_perm(v[2], v[3], 0x0062);
      digits[2][j] = __byte_perm(a, b, 0x5410) ^ 0x80808080;
    }
  }
  return __uint_as_float(most) * (1.0f / LIMIT);
}

__device__ inline int dot(const int (&digits)[4], const Words& weights, int sum) {
#pragma unroll
  for (int j = 0; j < 4; j++) sum = __dp4a(digits[j], (int)weights.word[j], sum);
  return sum;
}

// The sum of digits times weights: of two digits it is below 2^26, a third would not fit an int.
__device__ inline float piece_sum(const int (&digits)[DIGITS][4], const Words& weights) {
  float low = dot(digits[0], weights, dot(digits[1], weights, 0) * 256);
  if constexpr (DIGITS == 3) return fmaf(dot(digits[2], weights, 0), 65536.0f, low);
  return low;
}

// Four sums side by side: one after the other, each addition would wait for the one before.
__device__ inline float sum_of(const float (&x)[PIECE]) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < PIECE; i++) sums[i % 4] += x[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__device__ inline float squares_of(const float (&x)[PIECE], float mean) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < PIECE; i++) sums[i % 4] = fmaf(x[i] - mean, x[i] - mean, sums[i % 4]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// x = (x - mean) / sqrt(var + eps) weight + bias over the block.
__device__ inline void normalise(float (&x)[CHUNKS][PIECE],
                                 const Packed<elem_t, PIECE>& weight,
                                 const Packed<elem_t, PIECE>& bias,
                                 float eps) {
  __shared__ float sums[WARPS], squares[WARPS];
  int warp = threadIdx.x / WARP;
  auto count = [](int w) { return (float)(min(WARP, PIECES - w * WARP) * PIECE); };
  float sum = warp_sum(sum_of(x[0]));
  float own_mean = __fdividef(sum, count(warp));
  float square = warp_sum(inside(0) ? squares_of(x[0], own_mean) : 0.0f);
  if (threadIdx.x % WARP == 0) {
    sums[warp] = sum;
    squares[warp] = square;
  }
  __syncthreads();
  float mean = 0.0f, variance = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) mean += sums[w];
  mean *= 1.0f / K;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    float off = __fdividef(sums[w], count(w)) - mean;
    variance += squares[w] + count(w) * off * off;
  }
  float scale = rsqrtf(variance * (1.0f / K) + eps);
#pragma unroll
  for (int i = 0; i < PIECE; i++) x[0][i] = fmaf((x[0][i] - mean) * scale, weight[i], bias[i]);
}

// Sums of ROWS = 8 values over the warp: lane i has that of value i / 4. Each exchange halves the
// values of a lane.
__device__ inline float sums_of_rows(float (&values)[ROWS]) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int half = ROWS / 2, offset = WARP / 2; half > 0; half /= 2, offset /= 2) {
    bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; i++) {
      float give = upper ? values[i] : values[i + half];
      float keep = upper ? values[i + half] : values[i];
      values[i] = keep + __shfl_xor_sync(FULL_MASK, give, offset);
    }
  }
  return warp_sum<WARP / ROWS>(values[0]);
}

template <bool NORM, typename in_t, typename out_t>
__device__ inline void gemv(const in_t* x,
                            const elem_t* norm_weight,
                            const elem_t* norm_bias,
                            const signed char* values,
                            const scale_t* scales,
                            const Epilogue<out_t>& epilogue,
                            float eps,
                            int M) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  bool writer = threadIdx.x < ROWS;  // of output tile * ROWS + threadIdx.x
  int tile = blockIdx.x;

  griddepcontrol_launch_dependents();
  Tile w;
  load_tile(values, scales, tile, M, w);
  float own_bias = epilogue.bias_at(tile * ROWS + threadIdx.x, writer);
  Packed<elem_t, PIECE> norm[2] = {};
  if (NORM && inside(0)) {
    norm[0] = *reinterpret_cast<const Packed<elem_t, PIECE>*>(norm_weight + piece_of(0) * PIECE);
    norm[1] = *reinterpret_cast<const Packed<elem_t, PIECE>*>(norm_bias + piece_of(0) * PIECE);
  }
  griddepcontrol_wait();

  float own_residual = epilogue.residual_at(tile * ROWS + threadIdx.x, writer);
  float xs[CHUNKS][PIECE] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (inside(c)) load_floats(x + piece_of(c) * PIECE, xs[c]);
  if constexpr (NORM) normalise(xs, norm[0], norm[1], eps);
  int digits[CHUNKS][DIGITS][4];
  float step[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) step[c] = to_digits(xs[c], digits[c]);

  __shared__ float partial[2][WARPS][ROWS];
  for (int buffer = 0;; buffer ^= 1) {
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      sums[r] = 0.0f;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
        sums[r] = fmaf(piece_sum(digits[c], w.weights[r][c]), step[c] * w.scales[c][r], sums[r]);
    }
    int next = tile + gridDim.x;
    bool last = next * ROWS >= M;
    if (!last) load_tile(values, scales, next, M, w);

    float own = sums_of_rows(sums);
    if (lane % (WARP / ROWS) == 0) partial[buffer][warp][lane / (WARP / ROWS)] = own;
    __syncthreads();
    if (writer) {
      own = own_bias;
#pragma unroll
      for (int p = 0; p < WARPS; p++) own += partial[buffer][p][threadIdx.x];
      epilogue.store(tile * ROWS + threadIdx.x, own, own_residual);
    }
    if (last) break;
    tile = next;
    own_bias = epilogue.bias_at(tile * ROWS + threadIdx.x, writer);
    own_residual = epilogue.residual_at(tile * ROWS + threadIdx.x, writer);
  }
}

#define NORM_GEMV_ENTRY(name, out_t)                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS)                                   \
      name(const float* x, const elem_t* norm_weight, const elem_t* norm_bias,            \
           const signed char* values, const scale_t* scales, const out_t* bias, out_t* y, \
           float eps, int activation, int M) {                                            \
    gemv<true, float, out_t>(x, norm_weight, norm_bias, values, scales,                   \
                             {bias, nullptr, y, activation}, eps, M);                     \
  }

#define GEMV_ADD_ENTRY(name, out_t)                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                          \
      name(const elem_t* x, const signed char* values, const scale_t* scales, const out_t* bias, \
           const out_t* residual, out_t* y, int activation, int M) {                             \
    gemv<false, elem_t, out_t>(x, nullptr, nullptr, values, scales,                              \
                               {bias, residual, y, activation}, 0.0f, M);                        \
  }

// A norm needs the whole row in one piece of each thread.
#if !ELEM_IS_FLOAT
GEMV_ADD_ENTRY(gemv_add_int8, elem_t)
#if K <= LONGEST_NORM
NORM_GEMV_ENTRY(norm_gemv_int8, elem_t)
#endif
#endif
GEMV_ADD_ENTRY(gemv_add_int8_f32, float)
#if K <= LONGEST_NORM
NORM_GEMV_ENTRY(norm_gemv_int8_f32, float)
#endif
