// The product of many rows with a matrix in float32, on tensor cores, by split operands.
//
//   y[n] = activation(W x[n] + bias) + residual[n]
//
// A float is the sum of two TF32 numbers, but for its last bits: `high`, the float rounded, or the
// float itself, since tensor cores read only its first 11 bits of mantissa, and `low`, the rest. Of
// the four products of the parts, low low is left out: of a float's rounding or less on average.
//
//   W x = low(W) high(x) + high(W) low(x) + high(W) high(x)
//
// Tensor cores add with truncation. So sums over a CHUNK of K are added to sums in registers by
// ordinary additions, which round, and the two small products of a chunk come before the large.
// Infinities become NaN: their low part is.
//
// Shapes    x [N, K]; W [M, K] rows; bias [M]; residual and y [N, M]; K a multiple of 4
// Dtypes    float
// Bytes     (N M / ROWS + N M / OUTPUTS) K floats from L2
// FLOPs     2 N M K, for which tensor cores do three times as many
// Work      a block makes ROWS x OUTPUTS values. Chunks of both operands pass through a pipeline of
//           STAGES stages in shared memory (cp.async).
//           linear_split (sm_90): one warpgroup fills the stages and splits the weights in shared
//           memory; two multiply by wgmma, each half of the rows, which they split in registers.
//           While one adds up its chunk, the other keeps the tensor cores busy.
//           linear_split_mma (sm_80): eight warps multiply by mma.m16n8k8 and split both operands
//           in registers. Also for sm_86 and newer, but there the library's product in float32 is
//           at least as fast: TF32 is not three times as fast as float.
//           The blocks of GROUP rows of tiles are neighbours, so that what they read stays in L2.
//
// Source    Ootomo, Yokota, "Recovering single precision accuracy from Tensor Cores while
//           surpassing the FP32 theoretical peak performance", 2022
#include "epilogue.cuh"
#include "mbarrier.cuh"
#include "mma.cuh"

#if __CUDA_ARCH__ >= 800

constexpr int ROWS = 128;     // of x
constexpr int OUTPUTS = 128;  // rows of the weights
constexpr int CHUNK = 32;     // of K: a row of 128 bytes, in the layout of swizzled<UNITS>
constexpr int VEC = 4;        // floats of a copy
constexpr int UNITS = CHUNK / VEC;
constexpr int GROUP = 12;
constexpr int TILE_BYTES = ROWS * CHUNK * 4;
static_assert(ROWS == OUTPUTS, "both operands are copied alike");

constexpr int LINE = OUTPUTS + 4;  // of a row of sums: 16 bytes keep banks apart

// The bytes at which 16 of a tile begin.
__device__ inline unsigned place(int row, int unit) { return swizzled<UNITS>(row, unit) * 2; }

// The tile that a block makes.
struct Place {
  int n0, m0;
  __device__ Place(int N, int M) {
    int down = (N + ROWS - 1) / ROWS, across = (M + OUTPUTS - 1) / OUTPUTS;
    int first = blockIdx.x / (GROUP * across) * GROUP, in_group = blockIdx.x % (GROUP * across);
    int rows = min(down - first, GROUP);
    n0 = (first + in_group % rows) * ROWS;
    m0 = in_group / rows * OUTPUTS;
  }
};

// Copies chunks of both operands to shared memory, with THREADS threads. What lies past the last
// row, or past K, is zero.
template <int THREADS>
struct Copier {
  static constexpr int STEP = THREADS / UNITS;  // rows at once
  static constexpr int COPIES = ROWS / STEP;
  const float *x, *weight;
  int row, rows_x, rows_weight, left;
  size_t stride;

  __device__ Copier(const float* x, const float* weight, const Place& at, int N, int M, int K) {
    int unit = threadIdx.x % UNITS;
    row = threadIdx.x % THREADS / UNITS;
    this->x = x + (size_t)(at.n0 + row) * K + unit * VEC;
    this->weight = weight + (size_t)(at.m0 + row) * K + unit * VEC;
    rows_x = N - at.n0 - row;
    rows_weight = M - at.m0 - row;
    left = K - unit * VEC;
    stride = (size_t)STEP * K;
  }
  __device__ unsigned own_place() const { return place(row, threadIdx.x % UNITS); }

  // The next chunk of K, to tiles at these addresses.
  __device__ void copy(unsigned to_x, unsigned to_weight) {
    const float *from_x = x, *from_weight = weight;
    unsigned own = own_place();
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      unsigned to = own + i * STEP * CHUNK * 4;
      cp_async_or_zero(to_x + to, from_x, left > 0 && i * STEP < rows_x);
      cp_async_or_zero(to_weight + to, from_weight, left > 0 && i * STEP < rows_weight);
      from_x += stride;
      from_weight += stride;
    }
    x += CHUNK;
    weight += CHUNK;
    left -= CHUNK;
  }
};

// Write the tile from its sums in shared memory, with `threads` threads.
__device__ inline void write(const float (*sums)[LINE],
                             const Epilogue<float>& epilogue,
                             const Place& at,
                             int N,
                             int M,
                             int threads) {
  constexpr int LANES = OUTPUTS / 4;
  int column = threadIdx.x % LANES * 4, m = at.m0 + column, columns = min(M - m, 4);
  if (columns <= 0) return;
  bool aligned = M % 4 == 0;
  float bias[4];
#pragma unroll
  for (int i = 0; i < 4; i++) bias[i] = epilogue.bias_at(m + i, i < columns);
  int rows = min(N - at.n0, ROWS);
#pragma unroll 2
  for (int row = threadIdx.x / LANES; row < rows; row += threads / LANES) {
    float4 sum = *reinterpret_cast<const float4*>(&sums[row][column]);
    float values[4] = {sum.x, sum.y, sum.z, sum.w}, added[4] = {};
    size_t first = (size_t)(at.n0 + row) * M + m;
    if (epilogue.residual) {
      if (aligned)
        load_floats(epilogue.residual + first, added);
      else
#pragma unroll
        for (int i = 0; i < 4; i++) added[i] = i < columns ? epilogue.residual[first + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      values[i] = activate(values[i] + bias[i], epilogue.activation) + added[i];
    if (aligned) {
      store_floats(epilogue.y + first, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < columns) epilogue.y[first + i] = values[i];
    }
  }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int STAGES = 4;
constexpr int IN_FLIGHT = 2;  // stages that are copied while an earlier one is split
constexpr int THREADS = 384;
constexpr int GROUP_THREADS = 128;
constexpr int FRAGMENTS = OUTPUTS / 8;

struct Stage {
  float x[ROWS * CHUNK], weight[OUTPUTS * CHUNK], low[OUTPUTS * CHUNK];
};
constexpr int STAGES_BYTES = STAGES * 3 * TILE_BYTES;
static_assert(STAGES_BYTES == STAGES * sizeof(Stage), "the launch asks for so much");

__device__ inline void produce(
    Copier<GROUP_THREADS> copier, unsigned stages, unsigned full, unsigned empty, int chunks) {
  unsigned own = copier.own_place();
  PipelineState at = {}, ready = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks + IN_FLIGHT; chunk++) {
    if (chunk < chunks) {
      unsigned stage = stages + at.stage * (unsigned)sizeof(Stage);
      mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
      copier.copy(stage, stage + TILE_BYTES);
      at.next(STAGES);
    }
    cp_async_commit();
    if (chunk < IN_FLIGHT) continue;
    cp_async_wait<IN_FLIGHT>();
    // Each thread splits what it has copied itself, so nobody waits for others.
    unsigned weight = stages + ready.stage * (unsigned)sizeof(Stage) + TILE_BYTES + own;
#pragma unroll
    for (int i = 0; i < copier.COPIES; i++) {
      unsigned from = weight + i * copier.STEP * CHUNK * 4;
      float4 v;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "r"(from));
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(from + TILE_BYTES),
                   "f"(tf32_low(v.x)), "f"(tf32_low(v.y)), "f"(tf32_low(v.z)), "f"(tf32_low(v.w))
                   : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    mbarrier_arrive(full + ready.stage * 8);
    ready.next(STAGES);
  }
}

__device__ inline void consume(float (&total)[FRAGMENTS][4],
                               int group,
                               Stage* storage,
                               unsigned full,
                               unsigned empty,
                               int chunks) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  int row = group * 64 + warp * 16 + lane % 16, unit = lane / 16;
  float sums[FRAGMENTS][4] = {};
  PipelineState at = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    Stage& stage = storage[at.stage];
    mbarrier_wait(full + at.stage * 8, at.parity);
    unsigned high[CHUNK / 8][4], low[CHUNK / 8][4];
#pragma unroll
    for (int k = 0; k < CHUNK / 8; k++)
      ldmatrix(high[k], reinterpret_cast<char*>(stage.x) + place(row, k * 2 + unit));
#pragma unroll
    for (int k = 0; k < CHUNK / 8; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) low[k][i] = tf32_split(high[k][i]);
    unsigned long long weight = wgmma_descriptor(shared_address(stage.weight));
    unsigned long long weight_low = wgmma_descriptor(shared_address(stage.low));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < CHUNK / 8; k++) wgmma_tf32(sums, low[k], weight + k * 2, k > 0);
#pragma unroll
    for (int k = 0; k < CHUNK / 8; k++) wgmma_tf32(sums, high[k], weight_low + k * 2, true);
#pragma unroll
    for (int k = 0; k < CHUNK / 8; k++) wgmma_tf32(sums, high[k], weight + k * 2, true);
    wgmma_commit();
    wgmma_wait(sums);
    __syncwarp();  // all lanes have read their part of x
    if (lane == 0) mbarrier_arrive(empty + at.stage * 8);
#pragma unroll
    for (int j = 0; j < FRAGMENTS; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[j][i] += sums[j][i];
    at.next(STAGES);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_split(const float* x,
                                                                      const float* weight,
                                                                      const float* bias,
                                                                      const float* residual,
                                                                      float* y,
                                                                      int activation,
                                                                      int N,
                                                                      int M,
                                                                      int K) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Stage* storage = reinterpret_cast<Stage*>(memory);
  __shared__ Mbarrier full[STAGES], empty[STAGES];
  unsigned first_full = shared_address(full), first_empty = shared_address(empty);
  if (threadIdx.x < STAGES) {
    mbarrier_init(first_full + threadIdx.x * 8, GROUP_THREADS);
    mbarrier_init(first_empty + threadIdx.x * 8, 2 * GROUP_THREADS / WARP);
  }
  griddepcontrol_launch_dependents();
  __syncthreads();
  griddepcontrol_wait();

  Place at(N, M);
  int chunks = (K + CHUNK - 1) / CHUNK, group = threadIdx.x / GROUP_THREADS;
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    Copier<GROUP_THREADS> copier(x, weight, at, N, M, K);
    produce(copier, shared_address(memory), first_full, first_empty, chunks);
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  float total[FRAGMENTS][4] = {};
  consume(total, group, storage, first_full, first_empty, chunks);
  // Both groups have read their last stage.
  constexpr int CONSUMERS = 2 * GROUP_THREADS;
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
  auto sums = reinterpret_cast<float (*)[LINE]>(memory);
  int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < FRAGMENTS; j++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      *reinterpret_cast<float2*>(&sums[row + i * 8][j * 8 + lane % 4 * 2]) =
          make_float2(total[j][i * 2], total[j][i * 2 + 1]);
  asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
  write(sums, {bias, residual, y, activation}, at, N, M, CONSUMERS);
}

#endif

// ---------------------------------------------------------------------------------------------
// mma.m16n8k8

constexpr int MMA_STAGES = 3;
constexpr int MMA_THREADS = 256;
constexpr int MMA_BYTES = MMA_STAGES * 2 * TILE_BYTES;
static_assert(MMA_BYTES >= ROWS * LINE * 4, "the sums lie where the stages were");

extern "C" __global__ void __launch_bounds__(MMA_THREADS, 1) linear_split_mma(const float* x,
                                                                              const float* weight,
                                                                              const float* bias,
                                                                              const float* residual,
                                                                              float* y,
                                                                              int activation,
                                                                              int N,
                                                                              int M,
                                                                              int K) {
  extern __shared__ __align__(1024) unsigned char memory[];
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  Place at(N, M);
  Copier<MMA_THREADS> copier(x, weight, at, N, M, K);
  int chunks = (K + CHUNK - 1) / CHUNK;
  unsigned stages = shared_address(memory);
#pragma unroll
  for (int chunk = 0; chunk < MMA_STAGES - 1; chunk++) {
    unsigned stage = stages + chunk * 2 * TILE_BYTES;
    if (chunk < chunks) copier.copy(stage, stage + TILE_BYTES);
    cp_async_commit();
  }

  // A warp makes 64 rows of 32 outputs.
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int first_row = warp / 4 * 64, first_output = warp % 4 * 32;
  int row_x = first_row + lane % 16, unit_x = lane / 16;
  int row_weight = first_output + lane / 16 * 8 + lane % 8, unit_weight = lane / 8 % 2;
  float total[4][4][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; chunk++) {
    cp_async_wait<MMA_STAGES - 2>();
    __syncthreads();
    if (chunk + MMA_STAGES - 1 < chunks) {
      unsigned stage = stages + (chunk + MMA_STAGES - 1) % MMA_STAGES * 2 * TILE_BYTES;
      copier.copy(stage, stage + TILE_BYTES);
    }
    cp_async_commit();
    unsigned char* stage = memory + chunk % MMA_STAGES * 2 * TILE_BYTES;
    float sums[4][4][4] = {};
#pragma unroll
    for (int k = 0; k < CHUNK / 8; k++) {
      unsigned a[4][4], b[2][4], a_low[4][4], b_low[2][4];
#pragma unroll
      for (int i = 0; i < 4; i++) ldmatrix(a[i], stage + place(row_x + i * 16, k * 2 + unit_x));
#pragma unroll
      for (int i = 0; i < 2; i++)
        ldmatrix(b[i], stage + TILE_BYTES + place(row_weight + i * 16, k * 2 + unit_weight));
#pragma unroll
      for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int i = 0; i < 4; i++) a_low[i][e] = tf32_split(a[i][e]);
#pragma unroll
        for (int i = 0; i < 2; i++) b_low[i][e] = tf32_split(b[i][e]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const unsigned* high = &b[j / 2][j % 2 * 2];
          const unsigned* low = &b_low[j / 2][j % 2 * 2];
          mma_tf32(sums[i][j], a_low[i], high[0], high[1]);
          mma_tf32(sums[i][j], a[i], low[0], low[1]);
          mma_tf32(sums[i][j], a[i], high[0], high[1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) total[i][j][e] += sums[i][j][e];
  }

  cp_async_wait<0>();
  __syncthreads();
  auto sums = reinterpret_cast<float (*)[LINE]>(memory);
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<float2*>(
            &sums[first_row + i * 16 + half * 8 + lane / 4][first_output + j * 8 + lane % 4 * 2]) =
            make_float2(total[i][j][half * 2], total[i][j][half * 2 + 1]);
  __syncthreads();
  write(sums, {bias, residual, y, activation}, at, N, M, MMA_THREADS);
}

#endif
