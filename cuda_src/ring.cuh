// Weights on their way to a persistent block: a ring in shared memory that one warp fills by bulk
// copies, in an order that depends on nothing, while the others use what has come (sm_90 and
// newer).
#pragma once

#include "barrier.cuh"

#ifndef K
#define K 768
#endif

#if __CUDA_ARCH__ >= 900

constexpr int C = K;

// Shared memory by its own addresses: through a pointer, the compiler works out time and again
// where the block's memory begins.
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

// Ask for `bytes` to come to L2, widened to multiples of 16; the caller's arrays are padded to
// such.
__device__ inline void prefetch_l2(const void* from, unsigned bytes) {
  size_t first = (size_t)from & ~(size_t)15, last = ((size_t)from + bytes + 15) & ~(size_t)15;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first),
               "r"((unsigned)(last - first))
               : "memory");
}

// ---------------------------------------------------------------------------------------------
// the ring

constexpr int TILE = 8;  // rows of weights of a product of the tensor cores

// A stage holds C elements of eight rows; neighbours start 64 bytes apart in the banks, so that the
// eight lanes that load at a time meet in none.
constexpr int SLOT = C * 2 + 64;
constexpr int STAGE = TILE * SLOT;

// Stages under way at a time: 48 KiB or little more, for what waits in the memory's queues stands
// before what blocks tell each other. For the same reason rows are asked for GAP cycles apart, a
// little faster than the memory of an H200 gives them (132 blocks at 1.98 GHz: 4.7 TB/s). Not in
// small models: there blocks wait for each other and not for the memory, and pacing only costs.
constexpr int AHEAD = ((48 << 10) + TILE * C * 2 - 1) / (TILE * C * 2);
constexpr bool PACED = C > 768;
constexpr unsigned GAP = C * 2 / 18;

// A place in a ring of COUNT stages, and in which of its rounds.
template <int COUNT>
struct Cursor {
  int stage;
  unsigned round;
  __device__ void next() {
    if (++stage == COUNT) {
      stage = 0;
      round++;
    }
  }
};

// In shared memory from `base` on: the stages, and two barriers for each.
template <int COUNT>
struct Ring {
  static_assert(COUNT > AHEAD, "the ring");
  static constexpr int BYTES = COUNT * (STAGE + 16);
  using At = Cursor<COUNT>;
  unsigned base;

  __device__ unsigned full(int stage) const { return base + COUNT * STAGE + stage * 8; }
  __device__ unsigned empty(int stage) const { return full(COUNT + stage); }
  __device__ unsigned slot(const At& at, int i) const { return base + at.stage * STAGE + i * SLOT; }

  // All threads of the block, before a barrier; `users` warps release each stage.
  __device__ void open(int users) const {
    for (int i = threadIdx.x; i < COUNT; i += blockDim.x) {
      open_barrier(full(i), 1);
      open_barrier(empty(i), users);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __device__ void wait_full(const At& at) const { wait_barrier(full(at.stage), at.round & 1); }
  __device__ void wait_empty(const At& at) const {
    wait_barrier(empty(at.stage), (at.round - 1) & 1);
  }
  __device__ void release(const At& at) const { arrive(empty(at.stage)); }
};

// The rows of a matrix that a block has.
struct Share {
  int first, count;
};
__device__ inline Share share_of(unsigned M) {
  unsigned first = M * blockIdx.x / gridDim.x;
  return {(int)first, (int)(M * (blockIdx.x + 1) / gridDim.x - first)};
}

// Brings one product's rows after the other's, in the order in which they are used: of eight rows,
// the first C inputs before the next. One warp, all lanes.
template <int COUNT>
struct Producer {
  const Ring<COUNT>& ring;
  // `paced` trails `at` by AHEAD stages: the newest that must have come before `at` is asked for.
  // The round before the first counts as come.
  Cursor<COUNT> at = {}, paced = {COUNT - AHEAD, ~0u};
  unsigned due = 0;  // of the next row, in cycles

  __device__ void rows(const elem_t* weight, Share rows, int parts) {
    size_t stride = (size_t)parts * C;
    for (int from = 0; from < rows.count; from += TILE)
      for (int part = 0; part < parts; part++)
        bring(weight + (rows.first + from) * stride + part * C, stride,
              min(TILE, rows.count - from));
  }

  __device__ static void copy_row(unsigned to, const elem_t* from, unsigned counter) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(to),
        "l"(from), "r"(C * 2), "r"(counter)
        : "memory");
  }

  __device__ void bring(const elem_t* from, size_t stride, int rows) {
    int lane = threadIdx.x % WARP;
    ring.wait_empty(at);
    ring.wait_full(paced);
    unsigned counter = ring.full(at.stage), to = ring.slot(at, 0);
    if (lane == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(counter),
                   "r"(rows * C * 2)
                   : "memory");
    if (PACED && lane == 0) {  // one lane: with all, the compiler makes them take turns
      unsigned now = clock64();
      int late = now - due;
      // Late by more than a stage is not made up; a block that went to another clock begins anew.
      if (late > int(TILE * GAP) || late < -int(GAP)) due = now - TILE * GAP;
#pragma unroll 1
      for (int i = 0; i < rows; i++, from += stride, to += SLOT, due += GAP) {
        while (due - (unsigned)clock64() - 1 < GAP) {  // until it is due, or the clock is another
        }
        copy_row(to, from, counter);
      }
    }
    if (!PACED && lane < rows) copy_row(to + lane * SLOT, from + lane * stride, counter);
    __syncwarp();
    at.next();
    paced.next();
  }
};

#endif
