// A softmax in pieces: each with its own maximum, brought to a common one when they meet. Scores
// are in units of ln 2, so that a weight is a power of two.
#pragma once

#include "common.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// 2^x; results below the smallest normal number are zero, which a softmax does not feel.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
