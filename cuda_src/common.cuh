// Shared pieces of every kernel: the element type, 16-byte vectors, reductions, overlap with the
// kernel before, asynchronous copies, clusters.
//
// Compile-time macros, set by gpt2cupy/ops/core/compiler.py:
//   ELEM   element type of weights, activations and cache: float, __half or __nv_bfloat16
//   HS     head size (attention only)
//   K      inner size of the product (norm_gemv, skinny and their int8 counterparts)
//   BATCH  rows of the batch (decode_step only)
//
// Letters: B rows, T tokens, C channels, NH heads, HS head size, V vocabulary, L layers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef ELEM
#define ELEM float
#endif

using elem_t = ELEM;

// Longest row that a GEMV with a layer norm takes: what a warp's registers hold.
#define LONGEST_NORM 2048

constexpr int WARP = 32;
constexpr unsigned FULL_MASK = 0xffffffffu;
#define MINUS_INFINITY __int_as_float(0xff800000)  // NVRTC has no <math.h>

// ---------------------------------------------------------------------------------------------
// conversions: sums are always kept in float

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---------------------------------------------------------------------------------------------
// vectors: N consecutive elements moved by one load or store, or by several of 16 bytes: launch()
// checks no more than that alignment, and newer chips have accesses of 32 bytes

template <int BYTES>
struct Word {
  using type = unsigned;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T value[N];
};

// The same as words, for values that are selected or copied before they are used: given elements,
// the compiler would take the words apart for that.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Packed {
  static constexpr int WORD = sizeof(T) * N < 4 ? sizeof(T) * N : 4;
  static constexpr int PER_WORD = WORD / sizeof(T);
  typename Word<WORD>::type words[sizeof(T) * N / WORD];

  __device__ float operator[](int i) const {
    unsigned word = words[i / PER_WORD];
    if constexpr (sizeof(T) == 4)
      return __uint_as_float(word);
    else {
      unsigned short bits = i % PER_WORD ? word >> 16 : word;
      return to_float(*reinterpret_cast<T*>(&bits));
    }
  }
};

// The elements of an access of 16 bytes.
template <typename T>
constexpr int WIDEST = 16 / sizeof(T);

template <int N, typename T>
__device__ inline void load_floats(const T* source, float (&values)[N]) {
  Vec<T, N> packed = *reinterpret_cast<const Vec<T, N>*>(source);
#pragma unroll
  for (int i = 0; i < N; i++) values[i] = to_float(packed.value[i]);
}

template <int N, typename T>
__device__ inline void store_floats(T* target, const float (&values)[N]) {
  Vec<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; i++) packed.value[i] = from_float<T>(values[i]);
  *reinterpret_cast<Vec<T, N>*>(target) = packed;
}

// ---------------------------------------------------------------------------------------------
// reductions: a fixed tree, so the order of additions never varies

template <int WIDTH = WARP>
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_MASK, x, offset);
  return x;
}

// The sum of a lane's own values: one after the other, each addition would wait for the one before.
template <int FROM, int TO, int N>
__device__ inline float sum_between(const float (&x)[N]) {
  if constexpr (TO - FROM == 1)
    return x[FROM];
  else
    return sum_between<FROM, (FROM + TO) / 2>(x) + sum_between<(FROM + TO) / 2, TO>(x);
}

template <int N>
__device__ inline float sum_of(const float (&x)[N]) {
  return sum_between<0, N>(x);
}

// Several sums at once: their shuffles overlap.
template <int WIDTH = WARP, int N>
__device__ inline void warp_sums(float (&x)[N]) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < N; i++) x[i] += __shfl_xor_sync(FULL_MASK, x[i], offset);
}

template <int WIDTH = WARP>
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, offset));
  return x;
}

// ---------------------------------------------------------------------------------------------
// overlap of neighbouring kernels (programmatic dependent launch, sm_90 and newer)
//
// A kernel of the decode step first loads what no kernel before it in the step writes (weights,
// keys and values of the past, positions), then waits for its predecessor by griddepcontrol.wait.
// Positions are written by the sampling kernel: it is the last of the step, and the first of the
// next is launched without overlap, so it starts only when that is complete. Launched without
// overlap, or on an older chip, both calls do nothing.

// From here on the next kernel of the stream may start, up to its own griddepcontrol.wait.
__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// 0, but not before `bits` are known: as an offset it makes a load follow a computation, which the
// compiler would otherwise put behind the load's arrival. `positive` is any positive number.
__device__ inline unsigned zero_after(unsigned bits, int positive) {
  unsigned zero;
  asm volatile("shr.u32 %0, %1, %2;" : "=r"(zero) : "r"(bits), "r"(positive + 32));
  return zero;
}

// Loads before griddepcontrol.wait are paced: a lane has only some in flight, and each one more
// follows the arrival of one of those. All at once they would delay what the kernels in between
// load after their waits. Where nothing overlaps they are UNPACED.
constexpr int UNPACED = 1 << 20;
#if __CUDA_ARCH__ >= 900
constexpr bool OVERLAPS = true;
#else
constexpr bool OVERLAPS = false;
#endif

// 0, but not before these 16 bytes have arrived.
template <typename P>
__device__ inline unsigned zero_after_load(const P& piece, int positive) {
  static_assert(sizeof(P) == 16, "a load");
  return zero_after(reinterpret_cast<const unsigned*>(&piece)[3], positive);
}

// Returns when the kernel before is complete and what it wrote can be read. At least one block of
// every grid that may overlap must call it: then a complete kernel means that all before it are
// complete, on which the early loads rest.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Bring what lies there to the L2 cache, which all that is written passes: so it may come before
// the wait, also for what the kernel before writes.
__device__ inline void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// ---------------------------------------------------------------------------------------------
// asynchronous copies of 16 bytes to shared memory (sm_80 and newer; older chips copy at once)

__device__ inline unsigned shared_address(const void* pointer) {
  return (unsigned)__cvta_generic_to_shared(pointer);
}

template <typename T>
__device__ inline void cp_async(T* to_shared, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)),
               "l"(from)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to_shared) = *reinterpret_cast<const uint4*>(from);
#endif
}

// Likewise to an address of shared memory; zeros are stored, and nothing is read, if not `there`.
// sm_80 and newer.
__device__ inline void cp_async_or_zero(unsigned to_shared, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
#endif
}

// The copies since the last call become one group.
__device__ inline void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when all groups of this thread but the newest LATEST are complete.
template <int LATEST>
__device__ inline void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
#endif
}

// ---------------------------------------------------------------------------------------------
// thread block clusters (sm_90 and newer); on an older chip, where no entry is launched as
// clusters, every block is a cluster of its own

__device__ inline int cluster_size() {
#if __CUDA_ARCH__ >= 900
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

// A barrier of all threads of the cluster in two parts. The first releases nothing but mbarriers
// initialised before (mbarrier_init_fence()): to release more it would wait until all that a thread
// wrote is visible to the whole GPU. A thread that has returned counts as arrived.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The index of the block's cluster in its row of the grid.
__device__ inline int cluster_index() {
#if __CUDA_ARCH__ >= 900
  int index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
#else
  return blockIdx.x;
#endif
}
