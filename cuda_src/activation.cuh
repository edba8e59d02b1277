// What follows a product: the activations a GPT-2 checkpoint may ask for, and what is added.
#pragma once

#include "common.cuh"

// Codes as gpt2cupy/ops/linear.py passes them.
enum Activation { IDENTITY = 0, GELU_TANH = 1, GELU_ERF = 2, RELU = 3, SILU = 4, TANH = 5 };

// tanh of an intermediate whose result is rounded to ELEM. The hardware's approximation (relative
// error about 2^-11) is as fine as half precision; float gets the exact function.
__device__ inline float tanh_for_elem(float x) {
  if constexpr (sizeof(elem_t) == sizeof(float)) {
    return tanhf(x);
  } else {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
}

// source[i], a bias or a residual: zero where there is none, or not `there`.
template <typename T>
__device__ inline float addend(const T* source, int i, bool there) {
  return source && there ? to_float(source[i]) : 0.0f;
}

__device__ inline float activate(float x, int activation) {
  switch (activation) {
    case GELU_TANH:
      return 0.5f * x * (1.0f + tanh_for_elem(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case GELU_ERF: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case RELU: return x < 0.0f ? 0.0f : x;  // written so that NaN stays NaN
    case SILU: return x / (1.0f + expf(-x));
    case TANH: return tanh_for_elem(x);
    default: return x;
  }
}
