// Tensor core instructions for fp16 and bf16, and the loads of their fragments (sm_80 and newer).
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

// d [16, 8] += a [16, 8] b [8, 8] in TF32: of a float in a register the first 11 bits of mantissa
// count. ldmatrix() loads its fragments too, where a row of 16 bytes is one of four floats.
__device__ inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What TF32 leaves out of a float; of an infinity it is no number.
__device__ inline float tf32_low(float x) {
  return x - __uint_as_float(__float_as_uint(x) & 0xffffe000u);
}
// Round a float to TF32 and return the rest, which has either sign and half the size of tf32_low().
__device__ inline unsigned tf32_split(unsigned& x) {
  unsigned high = (x + 0x1000u) & 0xffffe000u;
  unsigned low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
  x = high;
  return low;
}

// Two neighbouring elements of a fragment, the first in the low half.
template <typename T>
__device__ inline unsigned packed(float low, float high) {
  Vec<T, 2> pair = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<unsigned*>(&pair);
}

// The layout of rows of UNITS times 16 bytes in shared memory: the same unit of eight neighbouring
// rows lies in different banks, so that ldmatrix has no conflicts. Rows of a power of two are
// swizzled, others padded: a copy of a row across lines of 128 bytes takes twice as long.
template <int UNITS>
constexpr bool SWIZZLED = (UNITS & (UNITS - 1)) == 0;

template <int UNITS>
constexpr int PADDED = SWIZZLED<UNITS> ? UNITS : UNITS + 1;

template <int UNITS>
constexpr int PITCH = PADDED<UNITS> * 8;  // elements of a row

// The element at which a unit begins; the first row's address is a multiple of 128 bytes.
template <int UNITS>
__device__ inline int swizzled(int row, int unit) {
  constexpr int PER_LINE = UNITS < 8 ? 8 / UNITS : 1;  // rows of a line of 128 bytes
  constexpr int UNITS_OF_LINE = UNITS < 8 ? UNITS : 8;
  if constexpr (SWIZZLED<UNITS>) unit ^= row / PER_LINE % UNITS_OF_LINE;
  return row * PITCH<UNITS> + unit * 8;
}

// Load four 8 x 8 matrices; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void ldmatrix(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_trans(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

#endif

// ---------------------------------------------------------------------------------------------
// wgmma: a warpgroup, four neighbouring warps, multiplies straight from shared memory. sm_90 alone,
// for which compiler.py compiles as sm_90a

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The descriptor of rows of 128 bytes in the layout of swizzled<8>, beginning at a multiple of 1024
// bytes. The descriptor of the next 16 elements of each row is larger by 2.
__device__ inline unsigned long long wgmma_descriptor(unsigned address) {
  constexpr unsigned long long SWIZZLED = 1ull << 62, EIGHT_ROWS = 1024 / 16;
  return SWIZZLED | EIGHT_ROWS << 32 | 1ull << 16 | (address & 0x3ffff) / 16;
}

// Call before wgmma(), which may then read what other instructions stored in shared memory, and add
// to what they left in registers.
__device__ inline void wgmma_fence() {
  asm volatile("fence.proxy.async.shared::cta;\nwgmma.fence.sync.aligned;" ::: "memory");
}

// Call after wgmma(), which goes on asynchronously.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#define SUM(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define SUMS SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)

// Returns when all are complete: d has the sums, and the operands can be overwritten.
__device__ inline void wgmma_wait(float (&d)[8][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : SUMS : : "memory");
}

// d [64, 64] += a [64, 16] b [64, 16]^T. Warp w of the group has the rows 16 w to 16 w + 15, in
// eight fragments as those of mma().
#define PRODUCT(type)                                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                        \
               " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
               "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"               \
               : SUMS                                                                             \
               : "l"(a), "l"(b))  // 1: add to d; 1, 1: no negation; 0, 0: both are K-major

template <typename T>
__device__ inline void wgmma(float (&d)[8][4], unsigned long long a, unsigned long long b);

template <>
__device__ inline void wgmma<__half>(float (&d)[8][4], unsigned long long a, unsigned long long b) {
  PRODUCT("f16");
}

template <>
__device__ inline void wgmma<__nv_bfloat16>(float (&d)[8][4],
                                            unsigned long long a,
                                            unsigned long long b) {
  PRODUCT("bf16");
}

#undef PRODUCT

// ---------------------------------------------------------------------------------------------
// tiles of 64 x 128, whose rows are fragments in registers

#define SUMS_16 SUMS, SUM(8), SUM(9), SUM(10), SUM(11), SUM(12), SUM(13), SUM(14), SUM(15)

__device__ inline void wgmma_wait(float (&d)[16][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" : SUMS_16 : : "memory");
}

// d [64, 128] += a [64, 8] b [128, 8]^T in TF32, or without what d was. Each warp of the group
// gives the fragment of its 16 rows, as for mma_tf32(); the descriptor is that of b.
__device__ inline void wgmma_tf32(float (&d)[16][4],
                                  const unsigned (&a)[4],
                                  unsigned long long b,
                                  bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"
      "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "{%64,%65,%66,%67}, %68, p, 1, 1;\n}"
      : SUMS_16
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

#undef SUMS_16
#undef SUMS
#undef SUM

#endif
