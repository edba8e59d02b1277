// Activations: GELU, also of a sum with a bias, and SiLU times a gate's other side.
//
//   gelu       y = x' Phi(x')  with x' = x + bias; Phi by erf, or by its tanh approximation
//   silu_mul   y = gate / (1 + exp(-gate)) * up
//
// Shapes    x, gate, up, y [N, C], each with a stride of its own between rows; bias [C] or null
// Dtypes    all ELEM; computed in float
// Bytes     gelu N C 2 sizeof ELEM, silu_mul N C 3 sizeof ELEM
// Work      a thread per two pieces of 16 bytes, or per two elements where C or a stride is no
//           multiple of a piece
// Source    Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve
//           Transformer", 2020
#include "common.cuh"

constexpr int PIECES = 2;  // of a thread; PIECES in gpt2cupy/ops/activation.py

// tanh of an intermediate whose result is rounded to ELEM. The hardware's approximation has a
// relative error of about 2^-11, as large as that of rounding to fp16; float gets the exact
// function.
__device__ inline float tanh_for_elem(float x) {
  if constexpr (sizeof(elem_t) == sizeof(float)) {
    return tanhf(x);
  } else {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
}

template <bool TANH>
__device__ inline float gelu_of(float x) {
  if constexpr (TANH)
    return 0.5f * x * (1.0f + tanh_for_elem(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  else
    return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
}

__device__ inline float silu_of(float x) { return x / (1.0f + expf(-x)); }

// Calls use(p, row, channel) for each piece p of this thread.
template <int VEC, typename Use>
__device__ inline void each_piece(int N, int C, Use use) {
  unsigned per_row = C / VEC;
  size_t pieces = (size_t)N * per_row;
  size_t first = (size_t)blockIdx.x * blockDim.x * PIECES + threadIdx.x;
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    size_t piece = first + (size_t)p * blockDim.x;
    if (piece >= pieces) continue;
    // A division of 64 bits takes several times as long.
    size_t row = piece >> 32 ? piece / per_row : (unsigned)piece / per_row;
    use(p, row, (int)(piece - row * per_row) * VEC);
  }
}

template <int VEC, bool TANH>
__device__ inline void gelu_pieces(
    const elem_t* x, const elem_t* bias, elem_t* y, int N, int C, int x_stride, int y_stride) {
  float values[PIECES][VEC];
  each_piece<VEC>(
      N, C, [&](int p, size_t row, int c) { load_floats(x + row * x_stride + c, values[p]); });
  each_piece<VEC>(N, C, [&](int p, size_t row, int c) {
    float addend[VEC] = {};
    if (bias) load_floats(bias + c, addend);
#pragma unroll
    for (int i = 0; i < VEC; i++) values[p][i] = gelu_of<TANH>(values[p][i] + addend[i]);
    store_floats(y + row * y_stride + c, values[p]);
  });
}

template <bool TANH>
__device__ inline void gelu_rows(
    const elem_t* x, const elem_t* bias, elem_t* y, int N, int C, int x_stride, int y_stride) {
  if ((C | x_stride | y_stride) % WIDEST<elem_t> == 0)
    gelu_pieces<WIDEST<elem_t>, TANH>(x, bias, y, N, C, x_stride, y_stride);
  else
    gelu_pieces<1, TANH>(x, bias, y, N, C, x_stride, y_stride);
}

extern "C" __global__ void __launch_bounds__(256) gelu_erf(
    const elem_t* x, const elem_t* bias, elem_t* y, int N, int C, int x_stride, int y_stride) {
  gelu_rows<false>(x, bias, y, N, C, x_stride, y_stride);
}

extern "C" __global__ void __launch_bounds__(256) gelu_tanh(
    const elem_t* x, const elem_t* bias, elem_t* y, int N, int C, int x_stride, int y_stride) {
  gelu_rows<true>(x, bias, y, N, C, x_stride, y_stride);
}

template <int VEC>
__device__ inline void silu_mul_pieces(const elem_t* gate,
                                       const elem_t* up,
                                       elem_t* y,
                                       int N,
                                       int C,
                                       int gate_stride,
                                       int up_stride,
                                       int y_stride) {
  float gates[PIECES][VEC], ups[PIECES][VEC];
  each_piece<VEC>(N, C, [&](int p, size_t row, int c) {
    load_floats(gate + row * gate_stride + c, gates[p]);
    load_floats(up + row * up_stride + c, ups[p]);
  });
  each_piece<VEC>(N, C, [&](int p, size_t row, int c) {
#pragma unroll
    for (int i = 0; i < VEC; i++) gates[p][i] = silu_of(gates[p][i]) * ups[p][i];
    store_floats(y + row * y_stride + c, gates[p]);
  });
}

extern "C" __global__ void __launch_bounds__(256) silu_mul(const elem_t* gate,
                                                           const elem_t* up,
                                                           elem_t* y,
                                                           int N,
                                                           int C,
                                                           int gate_stride,
                                                           int up_stride,
                                                           int y_stride) {
  if ((C | gate_stride | up_stride | y_stride) % WIDEST<elem_t> == 0)
    silu_mul_pieces<WIDEST<elem_t>>(gate, up, y, N, C, gate_stride, up_stride, y_stride);
  else
    silu_mul_pieces<1>(gate, up, y, N, C, gate_stride, up_stride, y_stride);
}
