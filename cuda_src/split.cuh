// fp32 on tensor cores to fp32 accuracy: a value as the sum of three in bf16, of 8 bits each, and a
// product as six of theirs (sm_80 and newer). The three smallest products, below 2^-24 of the
// whole, are left out.
//
// Source    Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For
//           Higher-Precision Computations", 2019
#pragma once

#include "mma.cuh"

#if __CUDA_ARCH__ >= 800

constexpr int PARTS = 3;     // of a value in fp32
constexpr int PRODUCTS = 6;  // of two

// The parts that product i multiplies, the smallest products first: all but the last together are
// below 2^-7 of the whole.
__device__ constexpr int LEFT_PART[PRODUCTS] = {0, 1, 2, 0, 1, 0};
__device__ constexpr int RIGHT_PART[PRODUCTS] = {2, 1, 0, 1, 0, 0};

// The parts of two neighbouring values of a fragment.
__device__ inline void split_pair(float low, float high, unsigned (&parts)[PARTS]) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    parts[i] = packed<__nv_bfloat16>(low, high);
    low -= __uint_as_float(parts[i] << 16);
    high -= __uint_as_float(parts[i] & 0xffff0000u);
  }
}

// The parts of eight values side by side.
__device__ inline void split_eight(const float (&values)[8], uint4 (&parts)[PARTS]) {
  unsigned pairs[4][PARTS];
#pragma unroll
  for (int i = 0; i < 4; i++) split_pair(values[i * 2], values[i * 2 + 1], pairs[i]);
#pragma unroll
  for (int i = 0; i < PARTS; i++)
    parts[i] = make_uint4(pairs[0][i], pairs[1][i], pairs[2][i], pairs[3][i]);
}

#endif
