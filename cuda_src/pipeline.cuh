// The pipeline of weights of a persistent block: a producer warp fills stages in shared memory by
// bulk copies, in an order that depends on no activation, while consumer warps use the stages that
// are full (sm_90 and newer).
#pragma once

#include "mbarrier.cuh"

#ifndef K
#define K 768
#endif

#if __CUDA_ARCH__ >= 900

// ---------------------------------------------------------------------------------------------
// shared memory by its own addresses: through a pointer, the compiler computes again and again
// where the block's memory begins

__device__ inline uint4 get16(unsigned at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at));
  return x;
}
__device__ inline unsigned get4(unsigned at) {
  unsigned x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at));
  return x;
}
__device__ inline float get_float(unsigned at) { return __uint_as_float(get4(at)); }
__device__ inline void put2(unsigned at, elem_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(reinterpret_cast<unsigned short&>(x))
               : "memory");
}
__device__ inline void put8(unsigned at, uint2 x) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x.x), "r"(x.y) : "memory");
}
__device__ inline void put_float(unsigned at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}

// Prefetch `bytes` to L2, widened to multiples of 16; the caller's arrays are padded to such.
__device__ inline void prefetch_l2(const void* from, unsigned bytes) {
  size_t first = (size_t)from & ~(size_t)15, last = ((size_t)from + bytes + 15) & ~(size_t)15;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first),
               "r"((unsigned)(last - first))
               : "memory");
}

// ---------------------------------------------------------------------------------------------
// the stages

constexpr int C = K;
constexpr int TILE = 8;  // rows of weights of a stage: those of an mma

// A stage holds C elements of eight rows; neighbours start 64 bytes apart in the banks, so that
// eight lanes that load at a time have no conflict.
constexpr int ROW_BYTES = C * 2 + 64;
constexpr int STAGE_BYTES = TILE * ROW_BYTES;

// Stages in flight at a time: 48 KiB or little more, for what waits in the memory's queues delays
// the mailboxes. For the same reason rows are copied GAP cycles apart, a little faster than the
// memory of an H200 delivers them (132 blocks at 1.98 GHz: 4.7 TB/s). Not in small models: there
// blocks wait for each other and not for the memory, and pacing only costs.
constexpr int AHEAD = ((48 << 10) + TILE * C * 2 - 1) / (TILE * C * 2);
constexpr bool PACED = C > 768;
constexpr unsigned GAP = C * 2 / 18;

// STAGES stages in shared memory from `base` on, and two mbarriers for each.
template <int STAGES>
struct Pipeline {
  static_assert(STAGES > AHEAD, "the stages in flight");
  static constexpr int BYTES = STAGES * (STAGE_BYTES + 16);
  unsigned base;

  __device__ unsigned full(int stage) const { return base + STAGES * STAGE_BYTES + stage * 8; }
  __device__ unsigned empty(int stage) const { return full(STAGES + stage); }
  __device__ unsigned row(const PipelineState& at, int i) const {
    return base + at.stage * STAGE_BYTES + i * ROW_BYTES;
  }

  // All threads of the block, before a barrier; `consumers` warps release each stage.
  __device__ void init(int consumers) const {
    for (int i = threadIdx.x; i < STAGES; i += blockDim.x) {
      mbarrier_init(full(i), 1);
      mbarrier_init(empty(i), consumers);
    }
    mbarrier_init_fence();
  }
  __device__ void wait_full(const PipelineState& at) const {
    mbarrier_wait(full(at.stage), at.parity);
  }
  __device__ void wait_empty(const PipelineState& at) const {
    mbarrier_wait(empty(at.stage), at.parity ^ 1);
  }
  __device__ void release(const PipelineState& at) const { mbarrier_arrive(empty(at.stage)); }
};

// The rows of a matrix that a block multiplies.
struct Share {
  int first, count;
};
__device__ inline Share share_of(unsigned M) {
  unsigned first = M * blockIdx.x / gridDim.x;
  return {(int)first, (int)(M * (blockIdx.x + 1) / gridDim.x - first)};
}

// The producer: copies the rows of one matrix after those of the other, in the order in which they
// are used: of eight rows, the first C inputs before the next. One warp, all lanes.
template <int STAGES>
struct Producer {
  const Pipeline<STAGES>& pipeline;
  // `paced` trails `at` by AHEAD stages: the newest that must be full before `at` is filled. The
  // round before the first counts as full.
  PipelineState at = {}, paced = {STAGES - AHEAD, 1};
  unsigned due = 0;  // of the next row, in cycles

  __device__ void rows(const elem_t* weight, Share rows, int parts) {
    size_t stride = (size_t)parts * C;
    for (int from = 0; from < rows.count; from += TILE)
      for (int part = 0; part < parts; part++)
        fill(weight + (rows.first + from) * stride + part * C, stride,
             min(TILE, rows.count - from));
  }

  __device__ static void copy_row(unsigned to, const elem_t* from, unsigned full) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(to),
        "l"(from), "r"(C * 2), "r"(full)
        : "memory");
  }

  __device__ void fill(const elem_t* from, size_t stride, int rows) {
    int lane = threadIdx.x % WARP;
    pipeline.wait_empty(at);
    pipeline.wait_full(paced);
    unsigned full = pipeline.full(at.stage), to = pipeline.row(at, 0);
    if (lane == 0) mbarrier_arrive_expect_tx(full, rows * C * 2);
    if (PACED && lane == 0) {  // one lane: with all, the compiler serialises them
      unsigned now = clock64();
      int late = now - due;
      // No delay beyond a stage is made up; a block that moved to another clock starts again.
      if (late > int(TILE * GAP) || late < -int(GAP)) due = now - TILE * GAP;
#pragma unroll 1
      for (int i = 0; i < rows; i++, from += stride, to += ROW_BYTES, due += GAP) {
        while (due - (unsigned)clock64() - 1 < GAP) {  // until it is due, or the clock has changed
        }
        copy_row(to, from, full);
      }
    }
    if (!PACED && lane < rows) copy_row(to + lane * ROW_BYTES, from + lane * stride, full);
    __syncwarp();
    at.next(STAGES);
    paced.next(STAGES);
  }
};

#endif
