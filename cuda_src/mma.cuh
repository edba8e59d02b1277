// Tensor core products of halves, and how fragments reach the registers (sm_80 and newer).
#pragma once

#include "common.cuh"

#if __CUDA_ARCH__ >= 800

// d [16, 8] += a [16, 16] b [16, 8], sums in float; a register holds two elements.
template <typename T>
__device__ inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void mma<__half>(float (&d)[4],
                                   const unsigned (&a)[4],
                                   unsigned b0,
                                   unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4],
                                          const unsigned (&a)[4],
                                          unsigned b0,
                                          unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two neighbouring elements of a fragment, the first in the low half.
template <typename T>
__device__ inline unsigned packed(float low, float high) {
  Vec<T, 2> pair = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<unsigned*>(&pair);
}

// Rows of UNITS times 16 bytes in shared memory, as ldmatrix likes them: of eight neighbours, the
// same unit lies in different banks. Rows of a power of two are not padded for that, their units
// change places: a row that crosses a line of 128 bytes takes twice as long to copy there.
template <int UNITS>
constexpr bool SWIZZLES = (UNITS & (UNITS - 1)) == 0;

template <int UNITS>
constexpr int PITCH = (SWIZZLES<UNITS> ? UNITS : UNITS + 1) * 8;  // elements of a row

// Where a unit begins, in elements; the first row's address is a multiple of 128 bytes.
template <int UNITS>
__device__ inline int place_of(int row, int unit) {
  constexpr int ROWS = UNITS < 8 ? 8 / UNITS : 1,
                CHANGES = UNITS < 8 ? UNITS : 8;  // ROWS of a line
  if constexpr (SWIZZLES<UNITS>) unit ^= row / ROWS % CHANGES;
  return row * PITCH<UNITS> + unit * 8;
}

// Four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

#endif

// ---------------------------------------------------------------------------------------------
// products of a warpgroup, four neighbouring warps, straight from shared memory: sm_90 alone, for
// which compiler.py asks by the name sm_90a

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Rows of 128 bytes that lie as place_of<8> has them, beginning at a multiple of 1024 bytes. The
// next 16 elements of each row are 2 on.
__device__ inline unsigned long long matrix_at(unsigned address) {
  constexpr unsigned long long SWIZZLED = 1ull << 62, EIGHT_ROWS = 1024 / 16;
  return SWIZZLED | EIGHT_ROWS << 32 | 1ull << 16 | (address & 0x3ffff) / 16;
}

// Before products: they may read what other instructions have put into shared memory, and add to
// what those have left in the registers.
__device__ inline void begin_products() {
  asm volatile("fence.proxy.async.shared::cta;\nwgmma.fence.sync.aligned;" ::: "memory");
}

// Behind products, which go on meanwhile.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#define SUM(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SUMS SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)

// Returns when all are done: d has the sums, and the operands' memory can be written again.
__device__ inline void wait_for_products(float (&d)[8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : SUMS : : "memory");
}

// d [64, 64] += a [64, 16] b [64, 16]^T. Warp w of the group has the rows 16 w to 16 w + 15, in
// eight fragments as mma() has them.
#define PRODUCT(type)                                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                        \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
               "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"               \
               : SUMS                                                                             \
               : "l"(a), "l"(b))  // 1: add to d; 1, 1: no sign changes; 0, 0: both lie along K

template <typename T>
__device__ inline void warpgroup_mma(float (&d)[8][4], unsigned long long a, unsigned long long b);

template <>
__device__ inline void warpgroup_mma<__half>(float (&d)[8][4],
                                             unsigned long long a,
                                             unsigned long long b) {
  PRODUCT("f16");
}

template <>
__device__ inline void warpgroup_mma<__nv_bfloat16>(float (&d)[8][4],
                                                    unsigned long long a,
                                                    unsigned long long b) {
  PRODUCT("bf16");
}

#undef PRODUCT
#undef SUMS
#undef SUM

#endif
