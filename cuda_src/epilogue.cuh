// The epilogue of a product with W: y = activation(W x + bias) + residual.
#pragma once

#include "common.cuh"

// The activations that a GPT-2 checkpoint may name.
constexpr int IDENTITY = 0;
constexpr int GELU_TANH = 1;
constexpr int GELU_ERF = 2;
constexpr int RELU = 3;
constexpr int SILU = 4;
constexpr int TANH = 5;

// tanh of an intermediate whose result is rounded to ELEM. The hardware's approximation (relative
// error about 2^-11) is as fine as fp16; float gets the exact function.
__device__ inline float tanh_for_elem(float x) {
  if constexpr (sizeof(elem_t) == sizeof(float)) {
    return tanhf(x);
  } else {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
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

// The epilogue that an entry fills from its arguments; out_t is ELEM or float. A kernel loads bias
// and residual ahead, the bias before griddepcontrol.wait, and calls store(); or it calls apply().
template <typename out_t>
struct Epilogue {
  const out_t* bias;      // [M], or null
  const out_t* residual;  // [N, M], or null
  out_t* y;               // [N, M]
  int activation;

  // Zero where there is no bias or residual, or not `there`.
  __device__ float bias_at(int m, bool there) const {
    return bias && there ? to_float(bias[m]) : 0.0f;
  }
  __device__ float residual_at(int i, bool there) const {
    return residual && there ? to_float(residual[i]) : 0.0f;
  }
  // Write output i, given the sum with its bias.
  __device__ void store(size_t i, float sum, float own_residual) const {
    y[i] = from_float<out_t>(activate(sum, activation) + own_residual);
  }
  // Write output i = n M + m, given the sum alone.
  __device__ void apply(size_t i, int m, float sum) const {
    if (bias) sum += to_float(bias[m]);
    sum = activate(sum, activation);
    if (residual) sum += to_float(residual[i]);
    y[i] = from_float<out_t>(sum);
  }
};
