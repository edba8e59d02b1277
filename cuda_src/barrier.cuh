// Barriers in shared memory (mbarrier, sm_80 and newer), by their addresses there.
#pragma once

#include "common.cuh"

#if __CUDA_ARCH__ >= 800

using Barrier = unsigned long long;

__device__ inline void open_barrier(unsigned b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}

__device__ inline void arrive(unsigned b) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(b)
               : "memory");
}

// This thread arrives when all its copies so far (copy_async and the like) have come.
__device__ inline void arrive_after_copies(unsigned b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(b) : "memory");
}

// Returns when the phase of this parity is over. On sm_90 the thread sleeps meanwhile.
#if __CUDA_ARCH__ >= 900
#define WAIT "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define WAIT "mbarrier.test_wait.parity.shared::cta.b64"
#endif
__device__ inline void wait_barrier(unsigned b, unsigned parity) {
  unsigned done = 0;
  while (!done)
    asm volatile("{\n.reg .pred p;\n" WAIT " p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(b), "r"(parity)
                 : "memory");
}
#undef WAIT

#endif
