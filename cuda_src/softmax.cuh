// A softmax in pieces: each with its own maximum, brought to a common one when they meet. Scores
// are in units of ln 2, so that a weight is a power of two.
#pragma once

#include "common.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LOWEST = -3.4028235e38f;  // of all numbers

// 2^x; results below the smallest normal number are zero, which a softmax does not feel.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Take some more scores, of keys that the lanes of a quad have between them: they become weights.
// Returns by what the values so far have to be multiplied.
template <int COUNT>
__device__ inline float take_scores(float (&scores)[COUNT], float& top, float& sum) {
  float common = top;
#pragma unroll
  for (int i = 0; i < COUNT; i++) common = fmaxf(common, scores[i]);
  common = warp_max<4>(common);
  float old = power_of_two(top - common);
  top = common;
  sum *= old;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    scores[i] = power_of_two(scores[i] - common);
    sum += scores[i];
  }
  return old;
}
