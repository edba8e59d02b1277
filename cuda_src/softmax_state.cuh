// The state of an online softmax: the maximum m of the scores so far, the sum l of their weights
// 2^(score - m), and the output o, values weighted alike and not yet divided by l. States of
// different keys are merged by bringing them to a common maximum. Scores are in units of ln 2, so
// that a weight is a power of two.
//
// Source    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018
#pragma once

#include "common.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
// The maximum of an empty state. Not minus infinity, whose difference to itself is no number: so
// nothing has to be tested before a factor is computed.
constexpr float LOWEST = -3.4028235e38f;

// 2^x; results below the smallest normal number are zero, which does not change a softmax.
__device__ inline float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Add scores of keys that the four lanes of a quad share out; they become weights. Returns the
// factor for the output so far.
template <int COUNT>
__device__ inline float add_scores(float (&scores)[COUNT], float& m, float& l) {
  float common = m;
#pragma unroll
  for (int i = 0; i < COUNT; i++) common = fmaxf(common, scores[i]);
  common = warp_max<4>(common);
  float factor = power_of_two(m - common);
  m = common;
  l *= factor;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    scores[i] = power_of_two(scores[i] - common);
    l += scores[i];
  }
  return factor;
}

// Merge the states of COUNT partial softmaxes, one channel of the output.
template <int COUNT>
__device__ inline void merge(const float (&ms)[COUNT],
                             const float (&ls)[COUNT],
                             const float (&os)[COUNT],
                             float& m,
                             float& l,
                             float& o) {
  m = ms[0];
#pragma unroll
  for (int i = 1; i < COUNT; i++) m = fmaxf(m, ms[i]);
  l = o = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    float factor = power_of_two(ms[i] - m);
    l = fmaf(ls[i], factor, l);
    o = fmaf(os[i], factor, o);
  }
}
