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
