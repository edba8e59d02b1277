// The layout of weights in int8: w[m, k] = values[m, k] * scales[k / GROUP, m], as quantize.cu
// makes them.
#pragma once

#include "common.cuh"

using scale_t = __nv_bfloat16;

constexpr int GROUP = 64;  // weights of a row that share a scale; GROUP of gpt2cupy/quantize.py
constexpr int LARGEST = 127;
constexpr int PIECE = 16;  // weights of a 16-byte load; all of one group

// Sixteen bytes: as many weights of a row, the first in the low byte of the first word.
struct alignas(16) Words {
  unsigned word[4];
};

__device__ inline Words load_words(const void* source) {
  return *static_cast<const Words*>(source);
}
