// A tile of a product of many rows: operands in shared memory, sums in the registers of a block.
// Two groups of four warps take chunks of K in turn, so that one waits for its operands while the
// other multiplies; each has sums of its own.
#pragma once

#include "mma.cuh"

#if __CUDA_ARCH__ >= 800

constexpr int ROWS = 64;  // of x; also in gpt2cupy/ops/linear_kernels.py, like the next two
constexpr int OUTPUTS = 64;
constexpr int CHUNK = 64;  // of K: a row of 128 bytes
constexpr int GROUPS = 2, GROUP_WARPS = 4;

// A chunk of both operands, whose rows lie as place_of<UNITS> has them.
constexpr int VEC = 8;  // elements of a copy
constexpr int UNITS = CHUNK / VEC;
struct Stage {
  elem_t x[ROWS * CHUNK], weight[OUTPUTS * CHUNK];
};

// Two sums where they belong, added to what is there or not.
__device__ inline void put_pair(float* at, float first, float second, bool add) {
  float2 pair = make_float2(first, second);
  if (add) {
    float2 before = *reinterpret_cast<const float2*>(at);
    pair.x += before.x;
    pair.y += before.y;
  }
  *reinterpret_cast<float2*>(at) = pair;
}

// multiply()   by all lanes of a group: adds a chunk, of whose rows of x `rows` are there
// finish()     returns when the chunks have been read, and the sums are there
// put()        stores the sums, or adds them, in rows of LINE floats
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Tile {
  static_assert(UNITS == 8, "matrix_at() knows rows of 128 bytes");
  float sums[8][4] = {};

  __device__ void multiply(const Stage& stage, int) {  // rows that are not there are zero
    unsigned long long x = matrix_at(shared_address(stage.x));
    unsigned long long weight = matrix_at(shared_address(stage.weight));
    begin_products();
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++) warpgroup_mma<elem_t>(sums, x + k * 2, weight + k * 2);
    commit_products();
  }

  __device__ void finish() { wait_for_products(sums); }

  template <int LINE>
  __device__ void put(float (*to)[LINE], bool add) const {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % GROUP_WARPS;
    int row = warp * 16 + lane / 4, output = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        put_pair(&to[row + i * 8][output + j * 8], sums[j][i * 2], sums[j][i * 2 + 1], add);
  }
};

#else

// A warp makes half of the rows and half of the outputs.
struct Tile {
  float sums[2][4][4] = {};

  __device__ static int first_row() { return threadIdx.x / WARP / 2 % 2 * (ROWS / 2); }
  __device__ static int first_output() { return threadIdx.x / WARP % 2 * (OUTPUTS / 2); }

  __device__ void multiply(const Stage& stage, int rows) {
    if (first_row() >= rows) return;
    // Where the lane's addresses for ldmatrix begin; a step of 16 along K changes only the unit.
    int lane = threadIdx.x % WARP;
    int row_x = first_row() + lane % 16, unit_x = lane / 16;
    int row_weight = first_output() + lane / 16 * 8 + lane % 8, unit_weight = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++) {
      unsigned a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        load_matrices(a[i], &stage.x[place_of<UNITS>(row_x + i * 16, k * 2 + unit_x)]);
        load_matrices(b[i],
                      &stage.weight[place_of<UNITS>(row_weight + i * 16, k * 2 + unit_weight)]);
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          mma<elem_t>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  __device__ void finish() {}

  template <int LINE>
  __device__ void put(float (*to)[LINE], bool add) const {
    int lane = threadIdx.x % WARP;
    int row = first_row() + lane / 4, output = first_output() + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        put_pair(&to[row + i * 8][output + j * 8], sums[i / 2][j][i % 2 * 2],
                 sums[i / 2][j][i % 2 * 2 + 1], add);
  }
};

#endif

#endif
