// The product of 2 to 64 rows with a matrix in int8, on tensor cores, with its epilogue.
//
//   y[n] = activation(W x[n] + bias) + residual[n]
//
// Shapes    x [N, K]; values [M, K] and scales [G, M] of W as in int8.cuh, M a multiple of
//           8, K of 16; bias [M]; residual and y [N, M]
// Dtypes    x is ELEM (fp16 or bf16); bias, residual and y are ELEM or float (entries ..._f32)
// Bytes     M K (1 + 2 / GROUP), once for every 16 rows of x; x is read from L2 by every block
// FLOPs     2 N M K
// Work      as in skinny.cu: a block makes 16 rows of TILE outputs and its warps share K. A lane
//           loads 16 weights of a row, four lanes those of a group, which are the k of four mma.
//           Weights are converted to ELEM without their scale, which is exact; the sum of a group
//           is multiplied by it in float. Sums have one order, whatever N is.
//
// Needs sm_80 (mma.m16n8k16); on older chips the matrix is dequantised for the library's product.
#include "epilogue.cuh"
#include "int8.cuh"
#include "mma.cuh"

#ifndef K
#define K 768
#endif

#if __CUDA_ARCH__ >= 800

constexpr int WARPS = 8;                 // of a block
constexpr int TILE = K > 4096 ? 8 : 16;  // outputs of a block at a time
constexpr int ROWS = 16;

constexpr int EIGHTS = TILE / 8;  // an mma takes eight outputs
constexpr int CHUNKS = (K + GROUP * WARPS - 1) / (GROUP * WARPS);
constexpr int GROUPS = (K + GROUP - 1) / GROUP;

// Pairs of ELEM a - b, both exact.
__device__ inline unsigned difference(unsigned a, unsigned b, __half) {
  __half2 d = __hsub2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
  return *reinterpret_cast<unsigned*>(&d);
}

__device__ inline unsigned difference(unsigned a, unsigned b, __nv_bfloat16) {
  __nv_bfloat162 d =
      __hsub2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<unsigned*>(&d);
}

// Bytes PAIR * 2 and PAIR * 2 + 1 of four weights as a pair of ELEM. A byte becomes the low half of
// a number whose high half makes it a whole one.
template <int PAIR>
__device__ inline unsigned widened(unsigned four, __half) {
  // 0x6400 + u is 1024 + u: with u = w + 128 that is 1152 too much.
  unsigned pair = __byte_perm(four ^ 0x80808080, 0x64646464, PAIR ? 0x4342 : 0x4140);
  return difference(pair, 0x64806480, __half());
}

template <int PAIR>
__device__ inline unsigned widened(unsigned four, __nv_bfloat16) {
  // 0x4300 + u is 128 + u below 128; 0x4380, the same number with the sign's bit alone, is 256.
  unsigned pair = __byte_perm(four, 0x43434343, PAIR ? 0x4342 : 0x4140);
  return difference(pair & 0xff7fff7f, pair & 0xff80ff80, __nv_bfloat16());
}

struct Tile {
  Words weights[CHUNKS][EIGHTS];
  Vec<scale_t, 2> scales[CHUNKS][EIGHTS];  // of the two outputs whose sums the lane has
};

// Chunk c of the warp is a group of weights, if there are so many.
__device__ inline int group_of(int c) { return threadIdx.x / WARP * CHUNKS + c; }
__device__ inline bool there(int c) { return GROUPS % WARPS == 0 || group_of(c) < GROUPS; }

// Where the lane's sixteen weights of it begin; the last group of a row may be short.
__device__ inline int place_of(int c) { return group_of(c) * GROUP + threadIdx.x % 4 * PIECE; }
__device__ inline bool inside(int c) { return K % GROUP == 0 || place_of(c) < K; }

__device__ inline void load_tile(
    const signed char* values, const scale_t* scales, int tile, int M, Tile& w) {
  int along = threadIdx.x % 4, across = threadIdx.x % WARP / 4;
#pragma unroll
  for (int e = 0; e < EIGHTS; e++) {
    int first = min(tile * TILE + e * 8, M - 8);  // the last eight may repeat others
    const signed char* row = values + (size_t)(first + across) * K;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (there(c)) {
        w.weights[c][e] = load_words(row + (K % GROUP ? min(place_of(c), K - PIECE) : place_of(c)));
        w.scales[c][e] = *reinterpret_cast<const Vec<scale_t, 2>*>(
            scales + (size_t)group_of(c) * M + first + along * 2);
      }
  }
}

template <typename out_t>
__device__ inline void gemm(const elem_t* x,
                            const signed char* values,
                            const scale_t* scales,
                            Epilogue<out_t> epilogue,
                            int N,
                            int M) {
  __shared__ float sums[2][WARPS][ROWS][TILE];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int along = lane % 4, across = lane / 4;  // place along K, row of an operand
  int tile = blockIdx.x;
  int above = blockIdx.y * ROWS;  // rows of other blocks
  N = min(N - above, ROWS);
  x += (size_t)above * K;
  epilogue.y += (size_t)above * M;
  if (epilogue.residual) epilogue.residual += (size_t)above * M;

  griddepcontrol_launch_dependents();
  Tile w;
  load_tile(values, scales, tile, M, w);
  // Thread i writes output i % TILE of row i / TILE: N TILE outputs, at most one each.
  int n = threadIdx.x / TILE, m = tile * TILE + threadIdx.x % TILE;
  float own_bias = epilogue.bias_at(m, m < M);
  griddepcontrol_wait();
  // With at most 16 rows an int holds the place.
  float own_residual = epilogue.residual_at(n * M + m, n < N && m < M);

  for (int buffer = 0;; buffer ^= 1) {
    float own[EIGHTS][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      if (!there(c)) break;
      // Rows `across` and `across + 8` of x, the same sixteen k as the weights.
      Words xs[2][2] = {};
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (across + half * 8 < N && inside(c)) {
          const elem_t* source = x + (size_t)(across + half * 8) * K + place_of(c);
          xs[half][0] = load_words(source);
          xs[half][1] = load_words(source + 8);
        }
#pragma unroll
      for (int e = 0; e < EIGHTS; e++) {
        float d[4] = {};
#pragma unroll
        for (int part = 0; part < 4; part++) {
          int at = part % 2 * 2;
          unsigned a[4] = {xs[0][part / 2].word[at], xs[1][part / 2].word[at],
                           xs[0][part / 2].word[at + 1], xs[1][part / 2].word[at + 1]};
          unsigned four = w.weights[c][e].word[part];
          mma<elem_t>(d, a, widened<0>(four, elem_t()), widened<1>(four, elem_t()));
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
          own[e][i] = fmaf(d[i], to_float(w.scales[c][e].value[i % 2]), own[e][i]);
      }
    }
    int next = tile + gridDim.x;
    bool last = next * TILE >= M;
    if (!last) load_tile(values, scales, next, M, w);

#pragma unroll
    for (int e = 0; e < EIGHTS; e++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[buffer][warp][across + i / 2 * 8][e * 8 + along * 2 + i % 2] = own[e][i];
    __syncthreads();
    if (n < N && m < M) {
      float sum = own_bias;
#pragma unroll
      for (int part = 0; part < WARPS; part++) sum += sums[buffer][part][n][threadIdx.x % TILE];
      epilogue.store((size_t)n * M + m, sum, own_residual);
    }
    if (last) break;
    tile = next;
    m = tile * TILE + threadIdx.x % TILE;
    own_bias = epilogue.bias_at(m, m < M);
    own_residual = epilogue.residual_at(n * M + m, n < N && m < M);
  }
}

#define SKINNY_ENTRY(name, out_t)                                                                \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                      \
      name(const elem_t* x, const signed char* values, const scale_t* scales, const out_t* bias, \
           const out_t* residual, out_t* y, int activation, int N, int M) {                      \
    gemm<out_t>(x, values, scales, {bias, residual, y, activation}, N, M);                       \
  }

SKINNY_ENTRY(skinny_int8, elem_t)
SKINNY_ENTRY(skinny_int8_f32, float)

#endif
