// Warpgroups of sm_90: four neighbouring warps that multiply together. The sizes of wgmma that
// attention needs, registers that move from one warpgroup to another, named barriers.
#pragma once

#include "mma.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int WARPGROUP = 128;  // threads

// The warpgroup gives registers back, or takes some: COUNT for each of its threads.
template <int COUNT>
__device__ inline void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ inline void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Where the copy engine finds tiles of an array in global memory, in four dimensions: made by the
// driver (gpt2cupy/ops/core/tensor_map.py), and a parameter of the kernel.
struct alignas(64) TensorMap {
  unsigned long long words[16];
};

// Starts to copy a box, as large as the map says, to shared memory in the layout of swizzled<8>.
// The mbarrier counts its bytes, also of what lies outside the array and becomes zero.
__device__ inline void copy_box(
    unsigned to, const TensorMap* map, int channel, int token, int head, int batch, unsigned full) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(full), "r"(channel), "r"(token), "r"(head), "r"(batch)
      : "memory");
}

// A named barrier of COUNT threads, of which some only arrive.
template <int COUNT>
__device__ inline void barrier_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}
template <int COUNT>
__device__ inline void barrier_arrive(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

// What other instructions stored in shared memory becomes visible to wgmma.
__device__ inline void shared_to_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Call before products that add to registers which other instructions wrote.
__device__ inline void registers_to_wgmma() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Returns when all committed groups of products but the newest LATEST are complete.
template <int LATEST>
__device__ inline void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATEST) : "memory");
}

// These registers belong to products on one side of this line, and to others on the other: the
// compiler moves no access to them across it.
template <int COUNT>
__device__ inline void keep_order(float (&d)[COUNT][4]) {
#pragma unroll
  for (int j = 0; j < COUNT; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[j][i])::"memory");
}
template <int COUNT>
__device__ inline void keep_order(unsigned (&a)[COUNT][4]) {
#pragma unroll
  for (int j = 0; j < COUNT; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[j][i])::"memory");
}

// The descriptor of rows of 128 bytes in the layout of swizzled<8>, which are the inner dimension
// of the product: a key and 64 of its channels. The next 16 rows begin 2048 bytes on, the next 64
// channels `next` bytes.
__device__ inline unsigned long long wgmma_descriptor_rows(unsigned address, unsigned next) {
  constexpr unsigned long long SWIZZLED = 1ull << 62, EIGHT_ROWS = 1024 / 16;
  return SWIZZLED | EIGHT_ROWS << 32 | (unsigned long long)(next / 16) << 16 |
         (address & 0x3ffff) / 16;
}

// d [64, N] (+)= a b for operands T. Warp w has the rows 16 w to 16 w + 15, in N / 8 fragments as
// those of mma().
//   both_shared      a [64, 16] and b [N, 16] by wgmma_descriptor(), d += a b^T; d = a b^T if not
//                    `add`
//   left_registers   a in fragments as those of mma(), b [16, N] by wgmma_descriptor_rows()
template <typename T, int N>
struct Wgmma;

#define D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define D16(j) D4(j), D4(j + 1), D4(j + 2), D4(j + 3)
#define D_32 D16(0)
#define D_64 D_32, D16(4)
#define D_96 D_64, D16(8)
#define D_128 D_96, D16(12)
#define LIST_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST_64 LIST_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST_96 LIST_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST_128 LIST_96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// Numbers of the operands behind the sums.
#define WGMMA(T, type, n, p0, p1, p2, p3, p4, p5)                                                \
  template <>                                                                                    \
  struct Wgmma<T, n> {                                                                           \
    __device__ static void both_shared(float (&d)[n / 8][4],                                     \
                                       unsigned long long a,                                     \
                                       unsigned long long b,                                     \
                                       int add) {                                                \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p2                                  \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" LIST_##n \
                   "}, %" #p0 ", %" #p1 ", add, 1, 1, 0, 0;\n}"                                  \
                   : D_##n                                                                       \
                   : "l"(a), "l"(b), "r"(add));                                                  \
    }                                                                                            \
    __device__ static void left_registers(float (&d)[n / 8][4],                                  \
                                          const unsigned (&a)[4],                                \
                                          unsigned long long b,                                  \
                                          int add) {                                             \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #p5                                  \
                   ", 0;\n"                                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" LIST_##n \
                   "}, {%" #p0 ",%" #p1 ",%" #p2 ",%" #p3 "}, %" #p4 ", add, 1, 1, 1;\n}"        \
                   : D_##n                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));              \
    }                                                                                            \
  };

WGMMA(__half, "f16", 64, 32, 33, 34, 35, 36, 37)
WGMMA(__half, "f16", 96, 48, 49, 50, 51, 52, 53)
WGMMA(__half, "f16", 128, 64, 65, 66, 67, 68, 69)
WGMMA(__nv_bfloat16, "bf16", 64, 32, 33, 34, 35, 36, 37)
WGMMA(__nv_bfloat16, "bf16", 96, 48, 49, 50, 51, 52, 53)
WGMMA(__nv_bfloat16, "bf16", 128, 64, 65, 66, 67, 68, 69)

#undef WGMMA
#undef D4
#undef D16
#undef D_32
#undef D_64
#undef D_96
#undef D_128
#undef LIST_32
#undef LIST_64
#undef LIST_96
#undef LIST_128

#endif
