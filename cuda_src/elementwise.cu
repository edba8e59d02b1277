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
// relative error of about 2^-11, as much as rounding to fp16; in float it is the exact function.
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

// Exact to float's precision takes more instructions than a result in fp16 leaves time for: the
// hardware's exponential and division are off by a few units of float's last place.
__device__ inline float silu_of(float x) {
  if constexpr (sizeof(elem_t) == sizeof(float))
    return x / (1.0f + expf(-x));
  else
    return __fdividef(x, 1.0f + __expf(-x));
}

// Calls use(p, row, channel) for each piece p of this thread. Rows without gaps are FLAT: one row,
// and no division.
template <int VEC, bool FLAT, typename Use>
__device__ inline void each_piece(int N, int C, Use use) {
  unsigned per_row = C / VEC;
  size_t pieces = (size_t)N * per_row;
  size_t first = (size_t)blockIdx.x * blockDim.x * PIECES + threadIdx.x;
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    size_t piece = first + (size_t)p * blockDim.x;
    if (piece >= pieces) continue;
    if constexpr (FLAT) {
      use(p, (size_t)0, piece * VEC);
    } else {
      // A division of 64 bits takes several times as long.
      size_t row = piece >> 32 ? piece / per_row : (unsigned)piece / per_row;
      use(p, row, (piece - row * per_row) * VEC);
    }
  }
}

template <int VEC>
__device__ inline Vec<elem_t, VEC> piece_at(const elem_t* source) {
  return *reinterpret_cast<const Vec<elem_t, VEC>*>(source);
}

template <int VEC, bool FLAT, bool TANH>
__device__ inline void gelu_pieces(
    const elem_t* x, const elem_t* bias, elem_t* y, int N, int C, int x_stride, int y_stride) {
  Vec<elem_t, VEC> values[PIECES];
  each_piece<VEC, FLAT>(N, C, [&](int p, size_t row, size_t c) {
    values[p] = piece_at<VEC>(x + row * x_stride + c);
  });
  each_piece<VEC, FLAT>(N, C, [&](int p, size_t row, size_t c) {
    float addend[VEC] = {}, result[VEC];
    if (!FLAT && bias) load_floats(bias + c, addend);
#pragma unroll
    for (int i = 0; i < VEC; i++)
      result[i] = gelu_of<TANH>(to_float(values[p].value[i]) + addend[i]);
    store_floats(y + row * y_stride + c, result);
  });
}

template <bool TANH>
__device__ inline void gelu_rows(
    const elem_t* x, const elem_t* bias, elem_t* y, int N, int C, int x_stride, int y_stride) {
  if ((C | x_stride | y_stride) % WIDEST<elem_t> != 0)
    gelu_pieces<1, false, TANH>(x, bias, y, N, C, x_stride, y_stride);
  else if (!bias && x_stride == C && y_stride == C)
    gelu_pieces<WIDEST<elem_t>, true, TANH>(x, bias, y, N, C, x_stride, y_stride);
  else
    gelu_pieces<WIDEST<elem_t>, false, TANH>(x, bias, y, N, C, x_stride, y_stride);
}

extern "C" __global__ void __launch_bounds__(256) gelu_erf(
    const elem_t* x, const elem_t* bias, elem_t* y, int N, int C, int x_stride, int y_stride) {
  gelu_rows<false>(x, bias, y, N, C, x_stride, y_stride);
}

extern "C" __global__ void __launch_bounds__(256) gelu_tanh(
    const elem_t* x, const elem_t* bias, elem_t* y, int N, int C, int x_stride, int y_stride) {
  gelu_rows<true>(x, bias, y, N, C, x_stride, y_stride);
}

template <int VEC, bool FLAT>
__device__ inline void silu_mul_pieces(const elem_t* gate,
                                       const elem_t* up,
                                       elem_t* y,
                                       int N,
                                       int C,
                                       int gate_stride,
                                       int up_stride,
                                       int y_stride) {
  Vec<elem_t, VEC> gates[PIECES], ups[PIECES];
  each_piece<VEC, FLAT>(N, C, [&](int p, size_t row, size_t c) {
    gates[p] = piece_at<VEC>(gate + row * gate_stride + c);
    ups[p] = piece_at<VEC>(up + row * up_stride + c);
  });
  each_piece<VEC, FLAT>(N, C, [&](int p, size_t row, size_t c) {
    float result[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++)
      result[i] = silu_of(to_float(gates[p].value[i])) * to_float(ups[p].value[i]);
    store_floats(y + row * y_stride + c, result);
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
  constexpr int VEC = WIDEST<elem_t>;
  if ((C | gate_stride | up_stride | y_stride) % VEC != 0)
    silu_mul_pieces<1, false>(gate, up, y, N, C, gate_stride, up_stride, y_stride);
  else if (gate_stride == C && up_stride == C && y_stride == C)
    silu_mul_pieces<VEC, true>(gate, up, y, N, C, gate_stride, up_stride, y_stride);
  else
    silu_mul_pieces<VEC, false>(gate, up, y, N, C, gate_stride, up_stride, y_stride);
}
