// Quantising weights to int8 and dequantising them, and the token embedding in int8.
//
//   quantize         scales[k / GROUP, m] = max |w[m, k ..]| / 127,  values = round(w / scale)
//   dequantize       w[m, k] = values[m, k] * scales[k / GROUP, m]
//   embedding_int8   x[n, c] = wte[ids[n], c] + wpe[positions[n], c]
//
// Shapes    values [M, K] signed char; scales [G, M] bfloat16, G = ceil(K / GROUP); w [M, K];
//           quantize takes N rows w [N, K] that begin at row `first` of the matrix
//           ids, positions [N] int; wte values [Vp, C], scales [G, Vp]; wpe [P, C]; x [N, C] float
// Dtypes    w is float for quantize, ELEM for dequantize; wpe is ELEM
// Bytes     quantize 5 N K, dequantize M K (1 + sizeof ELEM), embedding N C (5 + sizeof ELEM),
//           and the scales
// Work      quantize: a warp per group of a row. dequantize: a thread per 16 weights, one by one
//           where rows have no whole pieces of 16. embedding: a block per row.
//
// The quotient is rounded as IEEE and NumPy do, so that host and device make the same bytes. A
// product of value and scale is exact in float, and rounded once where ELEM is fp16 or bf16. An id
// or position outside its table gives zeros, as in embedding.cu.
#include "int8.cuh"

extern "C" __global__ void __launch_bounds__(256)
    quantize(const float* w, signed char* values, scale_t* scales, int first, int N, int M, int K) {
  int groups = (K + GROUP - 1) / GROUP;
  int lane = threadIdx.x % WARP;
  long long warps = (long long)gridDim.x * (blockDim.x / WARP);
  long long index = (long long)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
  for (; index < (long long)N * groups; index += warps) {
    int row = index / groups, group = index % groups;
    const float* source = w + (size_t)row * K;
    float own[GROUP / WARP], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < GROUP / WARP; i++) {
      int k = group * GROUP + i * WARP + lane;
      own[i] = k < K ? source[k] : 0.0f;
      largest = fmaxf(largest, fabsf(own[i]));
    }
    scale_t stored = __float2bfloat16_rn(__fdiv_rn(warp_max(largest), LARGEST));
    float scale = to_float(stored);
    if (lane == 0) scales[(size_t)group * M + first + row] = stored;
#pragma unroll
    for (int i = 0; i < GROUP / WARP; i++) {
      int k = group * GROUP + i * WARP + lane;
      int q = scale == 0.0f ? 0 : __float2int_rn(__fdiv_rn(own[i], scale));
      if (k < K) values[(size_t)row * K + k] = max(-LARGEST, min(LARGEST, q));
    }
  }
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize(const signed char* values, const scale_t* scales, elem_t* w, int M, int K) {
  long long stride = (long long)gridDim.x * blockDim.x;
  long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (K % PIECE) {
    for (; index < (long long)M * K; index += stride) {
      int m = index / K, k = index % K;
      w[index] = from_float<elem_t>(values[index] * to_float(scales[(size_t)(k / GROUP) * M + m]));
    }
    return;
  }
  int pieces = K / PIECE;
  for (; index < (long long)M * pieces; index += stride) {
    int m = index / pieces, k = index % pieces * PIECE;
    float scale = to_float(scales[(size_t)(k / GROUP) * M + m]);
    Words packed = load_words(values + index * PIECE);
    float wide[PIECE];
#pragma unroll
    for (int i = 0; i < PIECE; i++)
      wide[i] = scale * (signed char)(packed.word[i / 4] >> i % 4 * 8);
    store_floats(w + index * PIECE, wide);
  }
}

extern "C" __global__ void __launch_bounds__(256) embedding_int8(const int* ids,
                                                                 const int* positions,
                                                                 const signed char* values,
                                                                 const scale_t* scales,
                                                                 const elem_t* wpe,
                                                                 float* x,
                                                                 int Vp,
                                                                 int P,
                                                                 int C) {
  griddepcontrol_launch_dependents();  // as in embedding.cu
  int row = blockIdx.x;
  int id = ids[row], position = positions[row];
  bool inside = id >= 0 && id < Vp && position >= 0 && position < P;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    float sum = 0.0f;
    if (inside) {
      float scale = to_float(scales[(size_t)(c / GROUP) * Vp + id]);
      sum = values[(size_t)id * C + c] * scale + to_float(wpe[(size_t)position * C + c]);
    }
    x[(size_t)row * C + c] = sum;
  }
}
