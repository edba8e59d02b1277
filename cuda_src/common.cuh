// Shared pieces of every kernel: the element type, 16-byte vectors, reductions.
//
// Compile-time macros, set by gpt2cupy/ops/compiler.py:
//   ELEM   element type of weights, activations and cache: float, __half or __nv_bfloat16
//   HS     head size (attention only)
//
// Letters: B rows, T tokens, C channels, NH heads, HS head size, V vocabulary, L layers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef ELEM
#define ELEM float
#endif

using elem_t = ELEM;

constexpr int WARP = 32;
constexpr unsigned FULL_MASK = 0xffffffffu;
#define MINUS_INFINITY __int_as_float(0xff800000)  // NVRTC has no <math.h>

// ---------------------------------------------------------------------------------------------
// conversions: sums are always kept in float

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---------------------------------------------------------------------------------------------
// vectors: N consecutive elements moved by one load or store

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T value[N];
};

// Elements in the widest access the hardware has.
template <typename T>
constexpr int WIDEST = 16 / sizeof(T);

template <int N, typename T>
__device__ inline void load_floats(const T* source, float (&values)[N]) {
  Vec<T, N> packed = *reinterpret_cast<const Vec<T, N>*>(source);
#pragma unroll
  for (int i = 0; i < N; i++) values[i] = to_float(packed.value[i]);
}

template <int N, typename T>
__device__ inline void store_floats(T* target, const float (&values)[N]) {
  Vec<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; i++) packed.value[i] = from_float<T>(values[i]);
  *reinterpret_cast<Vec<T, N>*>(target) = packed;
}

// ---------------------------------------------------------------------------------------------
// reductions: a fixed tree, so the order of additions never varies

template <int WIDTH = WARP>
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_MASK, x, offset);
  return x;
}

template <int WIDTH = WARP>
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, offset));
  return x;
}
