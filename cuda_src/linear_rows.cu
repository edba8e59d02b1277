// The product of tens of rows with a matrix, on tensor cores, with its epilogue.
//
//   y[n] = activation(W x[n] + bias) + residual[n]
//
// Shapes    x [N, K]; W [M, K] rows; bias [M]; residual and y [N, M]; K a multiple of 8
// Dtypes    x and W are ELEM (fp16 or bf16); bias, residual and y are ELEM or float (entries
//           ..._f32)
// Bytes     M K sizeof ELEM for every ROWS rows of x; x is read from L2 for every OUTPUTS outputs
// FLOPs     2 N M K
// Work      a cluster of SPLIT blocks makes ROWS x OUTPUTS values, each block from its share of K.
//           Chunks of both operands pass through a pipeline of `stages` stages in shared memory
//           (cp.async). Before griddepcontrol.wait the weights of the first chunks are copied, and
//           those of the others prefetched to L2. Every block sends each other block its partial
//           sums of the rows that that one writes, by one bulk copy; they are added in the order of
//           the blocks. Where the stages hold all chunks of a block nothing waits for a product
//           before the last; else a stage is filled again when its chunk has been read.
//
// A product of 64 rows is bound by latency, not by arithmetic: it takes as long as the last byte of
// the slowest block. So a block should have a multiprocessor for itself, and all of its chunks in
// flight at once (_rows_plan in gpt2cupy/ops).
//
// With batch_invariant=True it takes any number of rows, and a SPLIT that depends on M and K alone.
// A row of x is a row of the fragments: a tensor core sums each by itself, in the order of K, and
// what follows is the same for all rows. So the others, and its place among them, do not matter.
//
// Needs sm_90 for clusters and sm_80 (mma.m16n8k16) for one block a tile. On sm_90 itself tiles are
// multiplied by wgmma (tile.cuh).
#include "dsmem.cuh"
#include "epilogue.cuh"
#include "tile.cuh"

#if __CUDA_ARCH__ >= 800

constexpr int MOST_STAGES = 12;
constexpr int LINE = OUTPUTS + 4;  // of a row of partial sums: 16 bytes keep banks apart
constexpr int STAGE_BYTES = (ROWS + OUTPUTS) * CHUNK * 2;
constexpr int SUMS_BYTES = ROWS * LINE * 4;  // of one block of partial sums
static_assert(STAGE_BYTES == sizeof(Stage), "the launch asks for so much");

constexpr int WARPS = GROUPS * GROUP_WARPS;
constexpr int THREADS = WARPS * WARP;
constexpr int STEP = THREADS / UNITS;  // rows that the block copies at once
constexpr int COPIES = ROWS / STEP;    // of a thread, per chunk and operand
static_assert(ROWS == OUTPUTS, "both operands are copied alike");

template <typename out_t>
__device__ inline void load_row(const out_t* source, int count, bool aligned, float (&to)[4]) {
  if (aligned) {
    load_floats(source, to);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}

template <int SPLIT, typename out_t>
__device__ inline void gemm(const elem_t* x,
                            const elem_t* weight,
                            const Epilogue<out_t>& epilogue,
                            int N,
                            int M,
                            int K,
                            int stages) {
  constexpr int OWN = ROWS / SPLIT;  // rows that this block writes
  extern __shared__ __align__(1024) unsigned char memory[];
  Stage* storage = reinterpret_cast<Stage*>(memory);
  // The partial sums of the rows that this block writes, from each other block of the cluster; and
  // those that it sends to them.
  auto received = reinterpret_cast<float (*)[LINE]>(memory + stages * sizeof(Stage));
  auto partial = SPLIT > 1 ? received + ROWS : received;
  int rank = cluster_rank();
  int m0 = blockIdx.x / SPLIT * OUTPUTS, n0 = blockIdx.y * ROWS;
  int chunks = (K + CHUNK - 1) / CHUNK, share = (chunks + SPLIT - 1) / SPLIT;
  int begin = rank * share, count = max(min(chunks - begin, share), 0);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

  __shared__ Mbarrier arrived;
  __shared__ Mbarrier full[MOST_STAGES], empty[MOST_STAGES];
  unsigned first_full = shared_address(full), first_empty = shared_address(empty);
  if (threadIdx.x < stages) {
    mbarrier_init(first_full + threadIdx.x * 8, THREADS);
    mbarrier_init(first_empty + threadIdx.x * 8, GROUP_WARPS);
  }
  if constexpr (SPLIT > 1) {
    if (threadIdx.x == 0) {
      mbarrier_init(shared_address(&arrived), 1);
      mbarrier_init_fence();
    }
    cluster_arrive();  // others may write to this block's memory
  }
  griddepcontrol_launch_dependents();
  __syncthreads();

  // Outputs past the last have its weights and are not stored. Rows of x past the last are zero.
  int row = threadIdx.x / UNITS, unit = threadIdx.x % UNITS;
  const elem_t *from_weight[COPIES], *from_x[COPIES];
  unsigned to_x[COPIES];
  constexpr unsigned TO_WEIGHT = ROWS * CHUNK * sizeof(elem_t);
  int left = K - begin * CHUNK - unit * VEC;  // of K, from this thread's place in the first chunk
  int left_x[COPIES];
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    int k = begin * CHUNK + unit * VEC, n = n0 + row + i * STEP;
    from_weight[i] = weight + (size_t)min(m0 + row + i * STEP, M - 1) * K + k;
    from_x[i] = x + (size_t)n * K + k;
    left_x[i] = n < N ? left : 0;
    to_x[i] = shared_address(&storage[0].x[swizzled<UNITS>(row + i * STEP, unit)]);
  }
  auto fetch_weight = [&](int chunk, int stage) {
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      cp_async_or_zero(to_x[i] + TO_WEIGHT + stage * (unsigned)sizeof(Stage),
                       from_weight[i] + chunk * CHUNK, chunk * CHUNK < left);
  };
  auto fetch_x = [&](int chunk, int stage) {
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      cp_async_or_zero(to_x[i] + stage * (unsigned)sizeof(Stage), from_x[i] + chunk * CHUNK,
                       chunk * CHUNK < left_x[i]);
  };

  int early = min(count, stages);
#pragma unroll 1
  for (int chunk = 0; chunk < early; chunk++) fetch_weight(chunk, chunk);
  if (unit == 0)  // a row of a chunk is one line of the cache, if K is a multiple of CHUNK
#pragma unroll 1
    for (int chunk = early; chunk < count; chunk++)
#pragma unroll
      for (int i = 0; i < COPIES; i++)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from_weight[i] + chunk * CHUNK));

  // The thread writes four outputs of the rows own_row, own_row + STEP_ROWS, ...
  constexpr int STEP_ROWS = THREADS * 4 / OUTPUTS, OWN_ROWS = (OWN + STEP_ROWS - 1) / STEP_ROWS;
  int own_row = threadIdx.x / (OUTPUTS / 4), column = threadIdx.x % (OUTPUTS / 4) * 4;
  int m = m0 + column, columns = min(M - m, 4);
  bool aligned = M % 4 == 0;
  float own_bias[4] = {};
  if (epilogue.bias && columns > 0) load_row(epilogue.bias + m, columns, aligned, own_bias);
  griddepcontrol_wait();

#pragma unroll 1
  for (int chunk = 0; chunk < early; chunk++) {
    fetch_x(chunk, chunk);
    mbarrier_arrive_after_cp_async(first_full + chunk * 8);
  }
  // Few enough to be kept until they are needed.
  constexpr bool EARLY = OWN_ROWS == 1;
  float own_residual[4] = {};
  auto load_residual = [&](int r) {
    int n = n0 + rank * OWN + r;
    if (epilogue.residual && r < OWN && n < N && columns > 0)
      load_row(epilogue.residual + (size_t)n * M + m, columns, aligned, own_residual);
  };
  if constexpr (EARLY) load_residual(own_row);

  int group = warp / GROUP_WARPS;
  Tile tile;
  PipelineState at = {group, 0}, refill = {0, 0};
#pragma unroll 1
  for (int chunk = group; chunk < count + group; chunk += GROUPS) {
    // Fill the stages of the last chunks again. All threads copy, also those whose group has no
    // chunk in this iteration.
    int first = chunk - group;
    if (first > 0)
      for (int next = first - GROUPS + stages; next < min(first + stages, count); next++) {
        mbarrier_wait(first_empty + refill.stage * 8, refill.parity);
        fetch_weight(next, refill.stage);
        fetch_x(next, refill.stage);
        mbarrier_arrive_after_cp_async(first_full + refill.stage * 8);
        refill.advance(1, stages);
      }
    if (chunk >= count) break;
    mbarrier_wait(first_full + at.stage * 8, at.parity);
    tile.multiply(storage[at.stage], N - n0);
    if (count > stages) {  // others wait for the stage
      tile.wait();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(first_empty + at.stage * 8);
    }
    at.advance(GROUPS, stages);
  }

  // The groups' sums are added where the copies to the rows' owners begin.
  tile.wait();
  if (group == 1) tile.store(partial, false);
  __syncthreads();
  if (group == 0) tile.store(partial, true);
  if constexpr (SPLIT > 1) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    constexpr unsigned PART = OWN * sizeof(*received);
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(shared_address(&arrived), (SPLIT - 1) * PART);
    cluster_wait();  // the mbarriers of all blocks are initialised
    int to = threadIdx.x;
    if (to < SPLIT && to != rank)
      dsmem_copy(received[rank * OWN], partial[to * OWN], PART, &arrived, to);
    mbarrier_wait_cluster(shared_address(&arrived), 0);
    cluster_arrive();
  } else {
    __syncthreads();
  }

#pragma unroll 1
  for (int step = 0; step < OWN_ROWS; step++) {
    int r = own_row + step * STEP_ROWS, n = n0 + rank * OWN + r;
    if (r >= OWN || n >= N || columns <= 0) break;
    if constexpr (!EARLY) load_residual(r);
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = own_bias[i];
#pragma unroll
    for (int part = 0; part < SPLIT; part++) {
      auto from = part == rank ? partial : received;  // its own part lies where it was
      float4 sum = *reinterpret_cast<const float4*>(&from[part * OWN + r][column]);
      values[0] += sum.x;
      values[1] += sum.y;
      values[2] += sum.z;
      values[3] += sum.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
      values[i] = activate(values[i], epilogue.activation) + own_residual[i];
    out_t* target = epilogue.y + (size_t)n * M + m;
    if (aligned) {
      store_floats(target, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < columns) target[i] = from_float<out_t>(values[i]);
    }
  }
  if constexpr (SPLIT > 1) cluster_wait();  // what this block sends is read from its memory
}

#define LINEAR_ROWS_ENTRY(name, cluster, split, out_t)                                      \
  extern "C" __global__ void cluster __launch_bounds__(THREADS)                             \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual, \
           out_t* y, int activation, int N, int M, int K, int stages) {                     \
    gemm<split, out_t>(x, weight, {bias, residual, y, activation}, N, M, K, stages);        \
  }

LINEAR_ROWS_ENTRY(linear_rows_c1, , 1, elem_t)
LINEAR_ROWS_ENTRY(linear_rows_c1_f32, , 1, float)
#if __CUDA_ARCH__ >= 900
LINEAR_ROWS_ENTRY(linear_rows_c2, __cluster_dims__(2), 2, elem_t)
LINEAR_ROWS_ENTRY(linear_rows_c4, __cluster_dims__(4), 4, elem_t)
LINEAR_ROWS_ENTRY(linear_rows_c8, __cluster_dims__(8), 8, elem_t)
LINEAR_ROWS_ENTRY(linear_rows_c2_f32, __cluster_dims__(2), 2, float)
LINEAR_ROWS_ENTRY(linear_rows_c4_f32, __cluster_dims__(4), 4, float)
LINEAR_ROWS_ENTRY(linear_rows_c8_f32, __cluster_dims__(8), 8, float)
#endif

#endif
