// Values on their way to another block of a cluster (sm_90 and newer): stores that count themselves
// in there. A barrier of the cluster would first wait until they are seen by the whole GPU.
// Only for kernels launched as clusters: elsewhere the stores are illegal instructions. On an older
// chip, where nothing launches them, all of this does nothing.
#pragma once

#include "common.cuh"

using Counter = unsigned long long;  // in shared memory, of the block that receives

// Set up a counter. One thread, before cluster_begin(): who has waited for the cluster may send.
__device__ inline void open_counter(Counter* counter) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(counter)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Say after how many bytes the counter is complete; the thread that opened it. Some of them may
// have come already. Other threads wait for them behind a barrier, of the block or the cluster.
__device__ inline void expect_bytes(Counter* counter, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(counter)),
      "r"(bytes)
      : "memory");
#endif
}

// Store one or two floats where block `rank` has `target`, and count them in its counter.
__device__ inline void send(const float* target, const Counter* counter, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, count;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 count, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [count];\n"
      "}" ::"r"(shared_address(target)),
      "r"(shared_address(counter)), "r"(rank), "f"(value)
      : "memory");
#endif
}

__device__ inline void send(
    const float* target, const Counter* counter, int rank, float first, float second) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, count;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 count, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, "
      "[count];\n"
      "}" ::"r"(shared_address(target)),
      "r"(shared_address(counter)), "r"(rank), "f"(first), "f"(second)
      : "memory");
#endif
}

// Likewise a struct of words.
template <typename T>
__device__ inline void send_words(T* target, const Counter* counter, int rank, const T& value) {
#if __CUDA_ARCH__ >= 900
  const float* from = reinterpret_cast<const float*>(&value);
  const float* to = reinterpret_cast<const float*>(target);
#pragma unroll
  for (int i = 0; i < (int)(sizeof(T) / sizeof(float)); i++) send(to + i, counter, rank, from[i]);
#endif
}

// Copy bytes of this block to where block `rank` has `target`, and count them in its counter; sm_90
// and newer. Both addresses and the number of bytes are multiples of 16. What other threads stored
// is sent behind a fence of the async proxy and a barrier. The block must not end before it is
// there.
__device__ inline void send_block(
    const void* target, const void* from, unsigned bytes, const Counter* counter, int rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, count;\n"
      "mapa.shared::cluster.u32 there, %0, %4;\n"
      "mapa.shared::cluster.u32 count, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, "
      "[count];\n"
      "}" ::"r"(shared_address(target)),
      "r"(shared_address(from)), "r"(bytes), "r"(shared_address(counter)), "r"(rank)
      : "memory");
#endif
}

// Returns when all bytes are there and can be read.
__device__ inline void wait_for_bytes(Counter* counter) {
#if __CUDA_ARCH__ >= 900
  unsigned done = 0;
  while (!done)
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(counter))
        : "memory");
#endif
}
