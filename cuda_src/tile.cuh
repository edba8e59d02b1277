// A tile of a GEMM: operands in shared memory, sums in the registers of a block. Two groups of four
// warps alternate over the chunks of K, so that one waits for its operands while the other
// multiplies; each has sums of its own.
#pragma once

#include "mma.cuh"

#if __CUDA_ARCH__ >= 800

constexpr int ROWS = 64;     // of x
constexpr int OUTPUTS = 64;  // rows of the weights
constexpr int CHUNK = 64;    // of K: a row of 128 bytes
constexpr int GROUPS = 2;
constexpr int GROUP_WARPS = 4;

// A chunk of both operands, in the layout of swizzled<UNITS>.
constexpr int VEC = 8;  // elements of a copy
constexpr int UNITS = CHUNK / VEC;
struct Stage {
  elem_t x[ROWS * CHUNK], weight[OUTPUTS * CHUNK];
};

// Store two sums, or add them.
__device__ inline void store_pair(float* at, float first, float second, bool add) {
  float2 pair = make_float2(first, second);
  if (add) {
    float2 before = *reinterpret_cast<const float2*>(at);
    pair.x += before.x;
    pair.y += before.y;
  }
  *reinterpret_cast<float2*>(at) = pair;
}

// multiply()   all lanes of a group add a chunk, of whose rows of x `rows` exist
// wait()       returns when the chunks have been read and the sums are complete
// store()      stores the sums, or adds them, in rows of LINE floats
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Tile {
  static_assert(UNITS == 8, "wgmma_descriptor() describes rows of 128 bytes");
  float sums[8][4] = {};

  __device__ void multiply(const Stage& stage, int) {  // rows past the last are zero
    unsigned long long x = wgmma_descriptor(shared_address(stage.x));
    unsigned long long weight = wgmma_descriptor(shared_address(stage.weight));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++) wgmma<elem_t>(sums, x + k * 2, weight + k * 2);
    wgmma_commit();
  }

  __device__ void wait() { wgmma_wait(sums); }

  template <int LINE>
  __device__ void store(float (*to)[LINE], bool add) const {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % GROUP_WARPS;
    int row = warp * 16 + lane / 4, output = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        store_pair(&to[row + i * 8][output + j * 8], sums[j][i * 2], sums[j][i * 2 + 1], add);
  }
};

#else

// A warp computes half of the rows and half of the outputs.
struct Tile {
  float sums[2][4][4] = {};

  __device__ static int first_row() { return threadIdx.x / WARP / 2 % 2 * (ROWS / 2); }
  __device__ static int first_output() { return threadIdx.x / WARP % 2 * (OUTPUTS / 2); }

  __device__ void multiply(const Stage& stage, int rows) {
    if (first_row() >= rows) return;
    // The lane's first addresses for ldmatrix; a step of 16 along K changes only the unit.
    int lane = threadIdx.x % WARP;
    int row_x = first_row() + lane % 16, unit_x = lane / 16;
    int row_weight = first_output() + lane / 16 * 8 + lane % 8, unit_weight = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++) {
      unsigned a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        ldmatrix(a[i], &stage.x[swizzled<UNITS>(row_x + i * 16, k * 2 + unit_x)]);
        ldmatrix(b[i], &stage.weight[swizzled<UNITS>(row_weight + i * 16, k * 2 + unit_weight)]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          mma<elem_t>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  __device__ void wait() {}

  template <int LINE>
  __device__ void store(float (*to)[LINE], bool add) const {
    int lane = threadIdx.x % WARP;
    int row = first_row() + lane / 4, output = first_output() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        store_pair(&to[row + i * 8][output + j * 8], sums[i / 2][j][i % 2 * 2],
                   sums[i / 2][j][i % 2 * 2 + 1], add);
  }
};

#endif

#endif
