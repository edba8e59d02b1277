// The mailboxes of a persistent step (decode_step.cu), and the warps that use them.
#pragma once

#include "mailbox.cuh"
#include "pipeline.cuh"

#ifndef HS
#define HS 64
#endif

#if __CUDA_ARCH__ >= 900

constexpr int WIDE = 4;        // inner size over C
constexpr int CONSUMERS = 8;   // warps that multiply; one more is the producer
constexpr int MOST_PARTS = 8;  // blocks that share a head, at most
constexpr int THREADS = (CONSUMERS + 1) * WARP;

template <int N>
struct Mailboxes {
  unsigned epoch;  // layers since the first step
  unsigned unused[3];
  FloatMailbox after_attention[N][C], after_mlp[N][C];  // the residual stream
  ElemMailbox qkv[N][3 * C], attended[N][C], inner[N][WIDE * C];
  FloatMailbox states[N * C / HS][MOST_PARTS][HS + 4];  // of the softmax: o, then m and l
};

// x, but unknown to the compiler: what follows from it is computed where it is used, and not kept
// in registers.
__device__ inline int opaque(int x) {
  int y;
  asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// A named barrier of the consumers.
__device__ inline void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * WARP) : "memory");
}

#endif
