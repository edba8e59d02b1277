// Distributed shared memory (sm_90 and newer): stores and copies to another block of the cluster,
// which complete the bytes of an mbarrier there. So the receiver waits for its values alone; a
// barrier of the cluster would wait until all that a thread wrote is visible to the whole GPU.
//
// The receiver initialises the mbarrier with one arrival before cluster_arrive(), and announces the
// bytes by mbarrier_arrive_expect_tx(); a sender sends after cluster_wait(). Only for kernels
// launched as clusters: elsewhere the stores are illegal instructions. On older chips, where
// nothing launches those, the functions do nothing.
#pragma once

#include "mbarrier.cuh"

// Store a float at `target` of block `rank`, completing bytes of its mbarrier.
__device__ inline void dsmem_store(const float* target,
                                   const Mbarrier* mbarrier,
                                   int rank,
                                   float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 remote, barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [remote], %3, [barrier];\n"
      "}" ::"r"(shared_address(target)),
      "r"(shared_address(mbarrier)), "r"(rank), "f"(value)
      : "memory");
#endif
}

// Store a struct of floats and ints.
template <typename T>
__device__ inline void dsmem_store_struct(const T* target,
                                          const Mbarrier* mbarrier,
                                          int rank,
                                          const T& value) {
  const float* from = reinterpret_cast<const float*>(&value);
  const float* to = reinterpret_cast<const float*>(target);
#pragma unroll
  for (int i = 0; i < (int)(sizeof(T) / sizeof(float)); i++)
    dsmem_store(to + i, mbarrier, rank, from[i]);
}

// Copy bytes of this block to `target` of block `rank`, completing bytes of its mbarrier. Addresses
// and size are multiples of 16. What other threads stored is copied behind a fence of the async
// proxy and a barrier. The block must not end before the copy is complete.
__device__ inline void dsmem_copy(
    const void* target, const void* from, unsigned bytes, const Mbarrier* mbarrier, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 remote, barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %4;\n"
      "mapa.shared::cluster.u32 barrier, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [remote], [%1], %2, "
      "[barrier];\n"
      "}" ::"r"(shared_address(target)),
      "r"(shared_address(from)), "r"(bytes), "r"(shared_address(mbarrier)), "r"(rank)
      : "memory");
#endif
}
