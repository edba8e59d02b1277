// The product of 1 to 16 rows with a matrix, on tensor cores, with its epilogue.
//
//   skinny_add_tT   y[n] = activation(W x[n] + bias) + residual[n]
//   skinny_one      the same for one row
//   skinny_norm     y = activation(W layer_norm(x) + bias) for one row
//
// Shapes    x [N, K], N <= 16; W [M, K] rows; norm weight and norm bias [K]; bias [M];
//           residual and y [N, M]
// Dtypes    W, the norm and x are ELEM (fp16 or bf16), x before a norm is float (the residual
//           stream); bias, residual and y are ELEM or float (entries ..._f32)
// Bytes     M K sizeof ELEM, read once for all rows of x; x is read from L2 by every block
// FLOPs     2 N M K
// Work      a block makes all N rows of T (skinny_norm: 2) times 8 outputs; its warps share K. In
//           mma.m16n8k16 the rows of x are the 16 and the rows of W the 8. A lane loads 16 bytes,
//           eight inputs of one row, and gives them to two mma in the order in which they lie:
//           which inputs a fragment calls k = 0 .. 15 does not matter as long as both operands
//           agree. So weights do not pass through shared memory. The first are loaded before
//           griddepcontrol.wait. The sums of the warps are added through shared memory.
//
// A single row goes to shared memory: each warp writes the part of K that it multiplies, normalised
// if need be. With more rows the norm is a kernel of its own: here, every block would have to
// normalise all rows, which takes longer than a node of the graph.
//
// Both entries for one row are for large models, and are there for their K alone: with K at most
// 1024, and from 2049 to 4096, norm_gemv.cu has less to do behind griddepcontrol.wait.
//
// Needs sm_80 (mma.m16n8k16). Older chips take norm_gemv.cu for one row and the library's product
// for more.
//
// Source    layer norm: Ba, Kiros, Hinton, 2016; the warps' means and variances are merged as in
//           Chan, Golub, LeVeque, 1979
#include "epilogue.cuh"
#include "mma.cuh"

#ifndef K
#define K 768
#endif

// One row has a larger K than the first, up to LONGEST_NORM, or than the second.
#define ONE_ROW_ABOVE 1024
#define ONE_ROW_AGAIN_ABOVE 4096

#if __CUDA_ARCH__ >= 800

constexpr int TILE = 8;   // outputs of an mma
constexpr int ROWS = 16;  // of x, at most

constexpr int VEC = 8;    // inputs of a lane's load
constexpr int SPAN = 32;  // inputs of a warp's load: 4 lanes along K, 8 along the rows

// Of a block with so many tiles: its warps, the loads of each along K, the inputs of each.
template <int TILES>
constexpr int WARPS = K <= 1024       ? 4
                      : K <= 1280     ? 6 - TILES
                      : K % 1600 == 0 ? 10
                                      : 8;
template <int TILES>
constexpr int CHUNKS = (K + SPAN * WARPS<TILES> - 1) / (SPAN * WARPS<TILES>);
template <int TILES>
constexpr int PART = CHUNKS<TILES> * SPAN;

// Early loads of a lane that are in flight at a time, see common.cuh; all of them in large models,
// where a step waits for the memory.
constexpr int PACE = OVERLAPS && (K <= 1024 || (K > 2048 && K <= 4096)) ? 3 : UNPACED;

using Piece = Vec<elem_t, VEC>;

template <int TILES>
using Weights = Piece[TILES][CHUNKS<TILES>];

__device__ inline unsigned word(const Piece& packed, int i) {
  return reinterpret_cast<const unsigned*>(&packed)[i];
}

// Whether chunk c of the lane lies inside the row.
template <int TILES>
__device__ inline bool inside(int k0, int c) {
  return K % (SPAN * WARPS<TILES>) == 0 || k0 + c * SPAN < K;
}

template <bool EARLY, int TILES>
__device__ inline void load_weights(
    const elem_t* weight, int first, int k0, int M, Weights<TILES>& w) {
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    const elem_t* row = weight + (size_t)min(first + t * TILE, M - 1) * K + k0;
#pragma unroll
    for (int c = 0; c < CHUNKS<TILES>; c++) {
      w[t][c] = {};
      if (!inside<TILES>(k0, c)) continue;
      int before = t * CHUNKS<TILES> + c - PACE;
      unsigned zero = 0;
      if (EARLY && before >= 0)
        zero = zero_after_load(w[before / CHUNKS<TILES>][before % CHUNKS<TILES>], M);
      w[t][c] = *reinterpret_cast<const Piece*>(row + c * SPAN + zero);
    }
  }
}

// How a warp copies its part of a single row: LOADS times eight inputs a lane.
template <int TILES>
struct RowPart {
  static constexpr int LOADS = (PART<TILES> / VEC + WARP - 1) / WARP;
  Piece pieces[LOADS];

  __device__ static int place(int i) { return (i * WARP + threadIdx.x % WARP) * VEC; }
  __device__ static int first() { return threadIdx.x / WARP * PART<TILES>; }
  __device__ static bool there(int i) {
    bool inside = PART<TILES> % (WARP * VEC) == 0 || place(i) < PART<TILES>;
    return inside && (K == PART<TILES> * WARPS<TILES> || first() + place(i) < K);
  }

  // Past the end it is zero.
  __device__ void load(const elem_t* row) {
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      pieces[i] = there(i) ? reinterpret_cast<const Piece&>(row[first() + place(i)]) : Piece{};
  }

  // To shared memory, for the lanes of the warp.
  __device__ void store(elem_t* part) const {
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      if (place(i) < PART<TILES>) reinterpret_cast<Piece&>(part[place(i)]) = pieces[i];
    __syncwarp();
  }
};

// The warp's part of the normalised row, rounded to ELEM as by a norm of its own. All parts have
// the same size.
template <int TILES>
__device__ inline RowPart<TILES> normalised(const float* x,
                                            const RowPart<TILES>& norm_weight,
                                            const RowPart<TILES>& norm_bias,
                                            float eps) {
  using Row = RowPart<TILES>;
  static_assert(K == PART<TILES> * WARPS<TILES>, "K");
  __shared__ float means[WARPS<TILES>], squares[WARPS<TILES>];
  float values[Row::LOADS][VEC] = {}, sum = 0.0f, square = 0.0f;
#pragma unroll
  for (int i = 0; i < Row::LOADS; i++)
    if (Row::there(i)) load_floats(x + Row::first() + Row::place(i), values[i]);
#pragma unroll
  for (int i = 0; i < Row::LOADS; i++) sum += sum_of(values[i]);
  float own_mean = warp_sum(sum) * (1.0f / PART<TILES>);
#pragma unroll
  for (int i = 0; i < Row::LOADS; i++) {
    float d[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) d[j] = (values[i][j] - own_mean) * (values[i][j] - own_mean);
    square += Row::there(i) ? sum_of(d) : 0.0f;
  }
  square = warp_sum(square);
  if (threadIdx.x % WARP == 0) {
    means[threadIdx.x / WARP] = own_mean;
    squares[threadIdx.x / WARP] = square;
  }
  __syncthreads();
  float mean = sum_of(means) * (1.0f / WARPS<TILES>), variance = sum_of(squares);
#pragma unroll
  for (int w = 0; w < WARPS<TILES>; w++) {
    float off = means[w] - mean;
    variance = fmaf(off * off, PART<TILES>, variance);
  }
  float inverse = rsqrtf(variance * (1.0f / K) + eps);
  Row normed;
#pragma unroll
  for (int i = 0; i < Row::LOADS; i++)
#pragma unroll
    for (int j = 0; j < VEC; j++)
      normed.pieces[i].value[j] = from_float<elem_t>(fmaf((values[i][j] - mean) * inverse,
                                                          to_float(norm_weight.pieces[i].value[j]),
                                                          to_float(norm_bias.pieces[i].value[j])));
  return normed;
}

template <bool NORM, int MOST, int TILES, typename in_t, typename out_t>
__device__ inline void gemm(const in_t* x,
                            const elem_t* norm_weight,
                            const elem_t* norm_bias,
                            const elem_t* weight,
                            const Epilogue<out_t>& epilogue,
                            float eps,
                            int N,
                            int M) {
  constexpr int OUTPUTS = TILES * TILE;  // of a block at a time
  constexpr int STRIDE = WARPS<TILES> * WARP / OUTPUTS;
  constexpr int EACH = (MOST + STRIDE - 1) / STRIDE;
  constexpr bool ONE = MOST == 1;
  __shared__ float sums[2][WARPS<TILES>][MOST][OUTPUTS];
  alignas(16) __shared__ elem_t row_of_x[WARPS<TILES>][ONE ? PART<TILES> : 1];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int along = lane % 4, across = lane / 4;  // place along K, row of an operand
  int k0 = warp * PART<TILES> + along * VEC;
  int first = blockIdx.x * OUTPUTS;

  griddepcontrol_launch_dependents();
  Weights<TILES> w;
  load_weights<true, TILES>(weight, first + across, k0, M, w);
  // Thread i writes output i % OUTPUTS of row i / OUTPUTS, and of every STRIDE rows more.
  int m = first + threadIdx.x % OUTPUTS, row = threadIdx.x / OUTPUTS;
  auto writes = [&](int e) { return row + e * STRIDE < N && m < M; };
  auto place = [&](int e) { return (row + e * STRIDE) * M + m; };  // of at most 16 rows
  float own_bias = epilogue.bias_at(m, m < M), own_residual[EACH];
  RowPart<TILES> x_part, scale, offset;
  if constexpr (NORM) {
    scale.load(norm_weight);
    offset.load(norm_bias);
  }
  griddepcontrol_wait();
#pragma unroll
  for (int e = 0; e < EACH; e++) own_residual[e] = epilogue.residual_at(place(e), writes(e));
  if constexpr (NORM)
    x_part = normalised(x, scale, offset, eps);
  else if constexpr (ONE)
    x_part.load(x);
  if constexpr (ONE) x_part.store(row_of_x[warp]);

  for (int buffer = 0; first < M; buffer ^= 1) {
    float d[TILES][2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS<TILES>; c++) {
      // Rows `across` and `across + 8` of x, as the tensor cores take them; a single row counts
      // as each of the first eight.
      Piece xs[2] = {};
      if constexpr (ONE) {
        xs[0] = *reinterpret_cast<const Piece*>(&row_of_x[warp][c * SPAN + along * VEC]);
      } else {
#pragma unroll
        for (int half = 0; half < 2; half++)
          if (across + half * 8 < N && inside<TILES>(k0, c))
            xs[half] = *reinterpret_cast<const Piece*>(x + (across + half * 8) * K + k0 + c * SPAN);
      }
#pragma unroll
      for (int part = 0; part < 2; part++) {
        unsigned a[4] = {word(xs[0], part * 2), word(xs[1], part * 2), word(xs[0], part * 2 + 1),
                         word(xs[1], part * 2 + 1)};
#pragma unroll
        for (int t = 0; t < TILES; t++)
          mma<elem_t>(d[t][part], a, word(w[t][c], part * 2), word(w[t][c], part * 2 + 1));
      }
    }
    first += gridDim.x * OUTPUTS;
    if (!ONE && first < M) load_weights<false, TILES>(weight, first + across, k0, M, w);

#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < (ONE ? 2 : 4); i++)
        if (!ONE || across == 0)
          sums[buffer][warp][across + i / 2 * 8][t * TILE + along * 2 + i % 2] =
              d[t][0][i] + d[t][1][i];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < EACH; e++)
      if (writes(e)) {
        float sum = own_bias;
#pragma unroll
        for (int p = 0; p < WARPS<TILES>; p++)
          sum += sums[buffer][p][row + e * STRIDE][threadIdx.x % OUTPUTS];
        epilogue.store(place(e), sum, own_residual[e]);
      }
    if (ONE) break;  // the grid has a block for all outputs
    m = first + threadIdx.x % OUTPUTS;
    own_bias = epilogue.bias_at(m, m < M);
#pragma unroll
    for (int e = 0; e < EACH; e++) own_residual[e] = epilogue.residual_at(place(e), writes(e));
  }
}

#define SKINNY_ADD_ENTRY(name, most, tiles, out_t)                                          \
  extern "C" __global__ void __launch_bounds__(WARPS<tiles>* WARP)                          \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual, \
           out_t* y, int activation, int N, int M) {                                        \
    gemm<false, most, tiles, elem_t, out_t>(x, nullptr, nullptr, weight,                    \
                                            {bias, residual, y, activation}, 0.0f, N, M);   \
  }

#define SKINNY_NORM_ENTRY(name, out_t)                                                            \
  extern "C" __global__ void __launch_bounds__(WARPS<2>* WARP)                                    \
      name(const float* x, const elem_t* norm_weight, const elem_t* norm_bias,                    \
           const elem_t* weight, const out_t* bias, out_t* y, float eps, int activation, int M) { \
    gemm<true, 1, 2, float, out_t>(x, norm_weight, norm_bias, weight,                             \
                                   {bias, nullptr, y, activation}, eps, 1, M);                    \
  }

SKINNY_ADD_ENTRY(skinny_add_t1, ROWS, 1, elem_t)
SKINNY_ADD_ENTRY(skinny_add_t1_f32, ROWS, 1, float)
#if K <= LONGEST_NORM  // what the registers hold
SKINNY_ADD_ENTRY(skinny_add_t2, ROWS, 2, elem_t)
SKINNY_ADD_ENTRY(skinny_add_t2_f32, ROWS, 2, float)
#endif
#if (K > ONE_ROW_ABOVE && K <= LONGEST_NORM) || K > ONE_ROW_AGAIN_ABOVE
SKINNY_ADD_ENTRY(skinny_one, 1, 1, elem_t)
SKINNY_ADD_ENTRY(skinny_one_f32, 1, 1, float)
#if K <= LONGEST_NORM && K % (K <= 1280 ? 128 : K % 1600 ? 256 : 320) == 0  // parts of one size
SKINNY_NORM_ENTRY(skinny_norm, elem_t)
SKINNY_NORM_ENTRY(skinny_norm_f32, float)
#endif
#endif

#endif
