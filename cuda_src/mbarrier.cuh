// Barriers in shared memory (mbarrier), addressed as shared memory is. A phase ends when as many
// threads have arrived as mbarrier_init() said, and all bytes that mbarrier_arrive_expect_tx()
// announced. sm_80 and newer; the functions about transactions and clusters need sm_90. On older
// chips they do nothing, and nothing launches the entries that call them.
#pragma once

#include "common.cuh"

using Mbarrier = unsigned long long;

__device__ inline void mbarrier_init(unsigned b, unsigned arrivals) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
#endif
}

// Initialised barriers become visible to the other blocks of the cluster and to bulk copies.
__device__ inline void mbarrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ inline void mbarrier_arrive(unsigned b) {
#if __CUDA_ARCH__ >= 800
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(b)
               : "memory");
#endif
}

// The thread arrives when all its copies by cp.async so far are complete.
__device__ inline void mbarrier_arrive_after_cp_async(unsigned b) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(b) : "memory");
#endif
}

// The thread arrives, and the phase also waits for so many bytes of st.async or bulk copies. Some
// of them may be there already.
__device__ inline void mbarrier_arrive_expect_tx(unsigned b, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes)
               : "memory");
#endif
}

// Returns when the phase of this parity has ended. On sm_90 the thread sleeps meanwhile.
#if __CUDA_ARCH__ >= 900
#define TRY_WAIT "mbarrier.try_wait.parity"
#else
#define TRY_WAIT "mbarrier.test_wait.parity"
#endif
#define WAIT(scope)                                \
  unsigned done = 0;                               \
  while (!done)                                    \
  asm volatile("{\n.reg .pred p;\n" TRY_WAIT scope \
               ".shared::cta.b64 p, [%1], %2;\n"   \
               "selp.u32 %0, 1, 0, p;\n}"          \
               : "=r"(done)                        \
               : "r"(b), "r"(parity)               \
               : "memory")

__device__ inline void mbarrier_wait(unsigned b, unsigned parity) {
#if __CUDA_ARCH__ >= 800
  WAIT("");
#endif
}

// Likewise, and what other blocks of the cluster stored can be read.
__device__ inline void mbarrier_wait_cluster(unsigned b, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  WAIT(".acquire.cluster");
#endif
}
#undef WAIT
#undef TRY_WAIT

// ---------------------------------------------------------------------------------------------
// the state of a pipeline: stages in shared memory, each with an mbarrier that says it is full and
// one that says it is empty

// The stage that is next, and the parity of its phase: of how often all stages have been used.
struct PipelineState {
  int stage;
  unsigned parity;
  // On by one stage of `stages`.
  __device__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // On by several, at most a round.
  __device__ void advance(int by, int stages) {
    stage += by;
    if (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};
