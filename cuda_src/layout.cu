// Bring a tensor as a checkpoint stores it into the resident layout: transpose and convert.
//
//   out[m, k] = in[k, m]        (transpose)      out[i] = in[i]      (convert)
//
// Shapes    in [K, M] (Hugging Face Conv1D) -> out [M, K]; convert: N elements
// Dtypes    from any stored dtype to float or ELEM, one entry per source
// Bytes     K M (sizeof in + sizeof out)
// Work      32 x 32 tiles through shared memory, so that reads and writes are both coalesced; the
//           tile has one spare column, so that its columns fall into different banks
#include "common.cuh"

constexpr int TILE = 32;
constexpr int TILE_ROWS = 8;  // blockDim = (TILE, TILE_ROWS)

template <typename in_t>
__device__ inline void transpose_body(const in_t* in, elem_t* out, int K, int M) {
  __shared__ float tile[TILE][TILE + 1];
  int k0 = blockIdx.y * TILE, m0 = blockIdx.x * TILE;
  for (int i = threadIdx.y; i < TILE; i += TILE_ROWS) {
    int k = k0 + i, m = m0 + threadIdx.x;
    if (k < K && m < M) tile[i][threadIdx.x] = to_float(in[(size_t)k * M + m]);
  }
  __syncthreads();
  for (int i = threadIdx.y; i < TILE; i += TILE_ROWS) {
    int m = m0 + i, k = k0 + threadIdx.x;
    if (k < K && m < M) out[(size_t)m * K + k] = from_float<elem_t>(tile[threadIdx.x][i]);
  }
}

template <typename in_t>
__device__ inline void convert_body(const in_t* in, elem_t* out, long long N) {
  long long stride = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < N; i += stride)
    out[i] = from_float<elem_t>(to_float(in[i]));
}

#define LAYOUT_ENTRIES(suffix, in_t)                                  \
  extern "C" __global__ void __launch_bounds__(256)                   \
      transpose_##suffix(const in_t* in, elem_t* out, int K, int M) { \
    transpose_body(in, out, K, M);                                    \
  }                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                   \
      convert_##suffix(const in_t* in, elem_t* out, long long N) {    \
    convert_body(in, out, N);                                         \
  }

LAYOUT_ENTRIES(float32, float)
LAYOUT_ENTRIES(float16, __half)
LAYOUT_ENTRIES(bfloat16, __nv_bfloat16)
