// What the blocks of a persistent step (decode_step.cu) tell each other, and who they are.
#pragma once

#include "ring.cuh"
#include "words.cuh"

#ifndef HS
#define HS 64
#endif

#if __CUDA_ARCH__ >= 900

constexpr int WIDE = 4;        // inner size over C
constexpr int CONSUMERS = 8;   // warps that use what one more brings; also in ops/gpt2/step.py,
constexpr int MOST_PARTS = 8;  // like the most blocks that share a head
constexpr int THREADS = (CONSUMERS + 1) * WARP;

template <int N>
struct Words {
  unsigned epoch;  // layers since the first step
  unsigned unused[3];
  FloatWord after_attention[N][C], after_mlp[N][C];  // the residual stream
  ElemWord qkv[N][3 * C], attended[N][C], inner[N][WIDE * C];
  FloatWord found[N * C / HS][MOST_PARTS][HS + 4];  // values, maximum, sum
};

// A number that the compiler must take as new: what follows from it is worked out again where it is
// used, and not kept in registers.
__device__ inline int anew(int x) {
  int y;
  asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// A barrier of the consumers.
__device__ inline void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * WARP) : "memory");
}

#endif
