// The product of 2 to 16 rows with a matrix, on tensor cores, with its epilogue.
//
//   y[n] = activation(W x[n] + bias) + residual[n]
//
// Shapes    x [N, K], N <= 16; W [M, K] rows; bias [M]; residual and y [N, M]
// Dtypes    x and W are ELEM (half or bfloat16); bias, residual and y are ELEM or float (entries
//           ..._f32)
// Bytes     M K sizeof ELEM, read once for all rows of x; x is read from L2 by every block
// FLOPs     2 N M K
// Work      a block makes all N rows of TILE = 8 outputs; its warps share K. In mma.m16n8k16 the
//           rows of x are the 16 and the rows of W the 8. A lane loads 16 bytes, eight inputs of
//           one row, and gives them to two mma in the order in which they lie: which inputs a
//           fragment calls k = 0 .. 15 does not matter as long as both operands agree. So neither
//           operand passes through shared memory. Weights are loaded before the kernel waits for
//           its predecessor. The sums of the warps meet in shared memory.
//
// The norm before a product is a kernel of its own here: inside, every block has to take it of all
// rows, which is longer than a node of the graph.
//
// Needs sm_80 (mma.m16n8k16); older chips take the library's product.
#include "activation.cuh"
#include "mma.cuh"

#ifndef K
#define K 768
#endif

#if __CUDA_ARCH__ >= 800

constexpr int WARPS = 8;  // of a block; also in gpt2cupy/ops/product.py
constexpr int TILE = 8;   // outputs of a block in one turn; likewise
constexpr int ROWS = 16;

constexpr int VEC = 8;    // inputs of a lane's load
constexpr int SPAN = 32;  // inputs of a warp's load: 4 lanes along K, 8 along the rows
constexpr int CHUNKS = (K + SPAN * WARPS - 1) / (SPAN * WARPS);

using Piece = Vec<elem_t, VEC>;

__device__ inline unsigned word(const Piece& packed, int i) {
  return reinterpret_cast<const unsigned*>(&packed)[i];
}

// Whether chunk c of the lane lies inside the row.
__device__ inline bool inside(int k0, int c) {
  return K % (SPAN * WARPS) == 0 || k0 + c * SPAN < K;
}

__device__ inline void load_weights(const elem_t* weight, int m, int k0, Piece (&w)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    if (inside(k0, c))
      w[c] = *reinterpret_cast<const Piece*>(weight + (size_t)m * K + k0 + c * SPAN);
    else
      w[c] = {};
}

template <typename out_t>
__device__ inline void product(const elem_t* x,
                               const elem_t* weight,
                               const out_t* bias,
                               const out_t* residual,
                               out_t* y,
                               int activation,
                               int N,
                               int M) {
  __shared__ float sums[2][WARPS][ROWS][TILE];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int along = lane % 4, across = lane / 4;  // place along K, row of an operand
  int k0 = warp * CHUNKS * SPAN + along * VEC;
  int tile = blockIdx.x;

  release_dependents();
  Piece w[CHUNKS];
  load_weights(weight, min(tile * TILE + across, M - 1), k0, w);
  int first = tile * TILE + threadIdx.x % TILE;
  float own_bias = addend(bias, first, first < M);
  wait_for_inputs();

  // Thread i writes output i % TILE of row i / TILE: N TILE outputs, at most one each.
  int n = threadIdx.x / TILE;
  // With at most 16 rows an int holds the place.
  float own_residual = addend(residual, n * M + first, n < N && first < M);

  for (int turn = 0; tile * TILE < M; turn ^= 1) {
    float d[2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      // Rows `across` and `across + 8` of x, as the tensor cores take them.
      Piece xs[2];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        bool there = across + half * 8 < N && inside(k0, c);
        const elem_t* source = x + (size_t)(across + half * 8) * K + k0 + c * SPAN;
        xs[half] = there ? *reinterpret_cast<const Piece*>(source) : Piece{};
      }
#pragma unroll
      for (int part = 0; part < 2; part++) {
        unsigned a[4] = {word(xs[0], part * 2), word(xs[1], part * 2), word(xs[0], part * 2 + 1),
                         word(xs[1], part * 2 + 1)};
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

#define SKINNY_ENTRY(name, out_t)                                                           \
  extern "C" __global__ void __launch_bounds__(WARPS* WARP)                                 \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual, \
           out_t* y, int activation, int N, int M) {                                        \
    product(x, weight, bias, residual, y, activation, N, M);                                \
  }

SKINNY_ENTRY(skinny_add, elem_t)
SKINNY_ENTRY(skinny_add_f32, float)

#endif
