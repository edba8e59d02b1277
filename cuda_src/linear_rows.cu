// The product of tens of rows with a matrix, on tensor cores, with its epilogue.
//
//   y[n] = activation(W x[n] + bias) + residual[n]
//
// Shapes    x [N, K]; W [M, K] rows; bias [M]; residual and y [N, M]; K a multiple of 8
// Dtypes    x and W are ELEM (half or bfloat16); bias, residual and y are ELEM or float (entries
//           ..._f32)
// Bytes     M K sizeof ELEM for every ROWS rows of x; x is read from L2 for every OUTPUTS outputs
// FLOPs     2 N M K
// Work      a cluster of SPLIT blocks makes ROWS x OUTPUTS values, each block from its share of K.
//           Chunks of both operands pass through a ring of shared memory (cp.async); the weights
//           of the first chunks are loaded, and those of the others called into L2, before the
//           kernel waits for its predecessor. Every block sends each of the others its partial
//           sums of the rows that that one finishes; they are added in the order of the blocks.
//
// A product of 64 rows is a matter of latency, not of arithmetic: what it takes is the way of its
// last byte. The library's kernels are as fast once they run, but begin when all before them is
// over.
//
// With batch_invariant=True it takes any number of rows, and a SPLIT that depends on M and K alone.
// A row of x is a row of the fragments: a tensor core sums each by itself, in the order of K, and
// what follows is the same for all rows. So the others, and its place among them, do not matter.
//
// Needs sm_90 for clusters and sm_80 (mma.m16n8k16) for one block a tile.
#include "activation.cuh"
#include "handover.cuh"
#include "mma.cuh"

#if __CUDA_ARCH__ >= 800

// The constants up to the ring's are also in gpt2cupy/ops/product.py.
constexpr int ROWS = 64;
constexpr int OUTPUTS = 64;
constexpr int CHUNK = 64;  // of K: a row of 128 bytes
constexpr int STAGES = 4;
constexpr int LINE = OUTPUTS + 4;  // of a row of partial sums: 16 bytes keep banks apart

constexpr int WARPS = 8;  // each makes a quarter of the rows and half of the outputs
constexpr int THREADS = WARPS * WARP;
constexpr int VEC = 8;                 // elements of a copy
constexpr int UNITS = CHUNK / VEC;     // copies of a row
constexpr int STEP = THREADS / UNITS;  // rows that the block copies at once
constexpr int COPIES = ROWS / STEP;    // of a thread, per chunk and operand
static_assert(ROWS == OUTPUTS, "both operands are copied alike");

struct Stage {
  elem_t x[ROWS * CHUNK], weight[OUTPUTS * CHUNK];
};

// Where 16 bytes of a row lie: the eight rows that a tensor core reads at once fall into different
// banks.
__device__ inline int swizzled(int row, int unit) {
  return row * CHUNK + (unit ^ (row % UNITS)) * VEC;
}

// 16 bytes to shared memory, or zeros. Addresses are ready-made: with one or two warps of a
// scheduler, what counts is the number of instructions between a barrier and the first product.
__device__ inline void copy_or_zero(unsigned to_shared, const elem_t* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}

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
__device__ inline void product(const elem_t* x,
                               const elem_t* weight,
                               const out_t* bias,
                               const out_t* residual,
                               out_t* y,
                               int activation,
                               int N,
                               int M,
                               int K) {
  constexpr int OWN = ROWS / SPLIT;  // rows that this block finishes
  extern __shared__ __align__(128) unsigned char memory[];
  Stage* stages = reinterpret_cast<Stage*>(memory);
  // The partial sums of this block's rows, from every block of the cluster in turn.
  auto received = reinterpret_cast<float (*)[LINE]>(
      memory + min(STAGES, ((K + CHUNK - 1) / CHUNK + SPLIT - 1) / SPLIT) * sizeof(Stage));
  int rank = cluster_rank();
  int m0 = blockIdx.x / SPLIT * OUTPUTS, n0 = blockIdx.y * ROWS;
  int chunks = (K + CHUNK - 1) / CHUNK, share = (chunks + SPLIT - 1) / SPLIT;
  int begin = rank * share, count = max(min(chunks - begin, share), 0);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment

  __shared__ Counter arrived;
  if constexpr (SPLIT > 1) {
    if (threadIdx.x == 0) open_counter(&arrived);
    cluster_begin();  // others may write to this block's memory
  }
  release_dependents();

  // Rows past the last repeat it; they end in outputs that nobody stores.
  int row = threadIdx.x / UNITS, unit = threadIdx.x % UNITS;
  const elem_t *from_weight[COPIES], *from_x[COPIES];
  unsigned to_x[COPIES];
  constexpr unsigned TO_WEIGHT = ROWS * CHUNK * sizeof(elem_t);
#pragma unroll
  for (int i = 0; i < COPIES; i++) {
    int k = begin * CHUNK + unit * VEC;
    from_weight[i] = weight + (size_t)min(m0 + row + i * STEP, M - 1) * K + k;
    from_x[i] = x + (size_t)min(n0 + row + i * STEP, N - 1) * K + k;
    to_x[i] = shared_address(&stages[0].x[swizzled(row + i * STEP, unit)]);
  }
  int left = K - begin * CHUNK - unit * VEC;  // of K, from this thread's place in the first chunk
  auto fetch_weight = [&](int chunk, int stage) {
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      copy_or_zero(to_x[i] + TO_WEIGHT + stage * (unsigned)sizeof(Stage),
                   from_weight[i] + chunk * CHUNK, chunk * CHUNK < left);
  };
  auto fetch_x = [&](int chunk, int stage) {
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      copy_or_zero(to_x[i] + stage * (unsigned)sizeof(Stage), from_x[i] + chunk * CHUNK,
                   chunk * CHUNK < left);
  };

#pragma unroll
  for (int chunk = 0; chunk < STAGES - 1; chunk++)
    if (chunk < count) fetch_weight(chunk, chunk);
  if (unit == 0)  // a row of a chunk is one line of the cache
#pragma unroll 1
    for (int chunk = STAGES - 1; chunk < count; chunk++)
#pragma unroll
      for (int i = 0; i < COPIES; i++)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from_weight[i] + chunk * CHUNK));

  // What this thread finishes: four outputs of the rows own_row, own_row + STEP_ROWS, ...
  constexpr int STEP_ROWS = THREADS * 4 / OUTPUTS, TURNS = (OWN + STEP_ROWS - 1) / STEP_ROWS;
  int own_row = threadIdx.x / (OUTPUTS / 4), column = threadIdx.x % (OUTPUTS / 4) * 4;
  int m = m0 + column, columns = min(M - m, 4);
  bool aligned = M % 4 == 0;
  float own_bias[4] = {};
  if (bias && columns > 0) load_row(bias + m, columns, aligned, own_bias);
  wait_for_inputs();

#pragma unroll
  for (int chunk = 0; chunk < STAGES - 1; chunk++) {
    if (chunk < count) fetch_x(chunk, chunk);
    copy_commit();
  }
  // Few enough to be kept until they are needed.
  constexpr bool EARLY = TURNS == 1;
  float own_residual[4] = {};
  auto load_residual = [&](int r) {
    int n = n0 + rank * OWN + r;
    if (residual && r < OWN && n < N && columns > 0)
      load_row(residual + (size_t)n * M + m, columns, aligned, own_residual);
  };
  if constexpr (EARLY) load_residual(own_row);

  int first_row = warp / 2 * 16, first_output = warp % 2 * (OUTPUTS / 2);
  // Where the lane's addresses for ldmatrix begin; a step of 16 along K changes only the unit.
  int row_x = first_row + lane % 16, unit_x = lane / 16;
  int row_weight = first_output + lane / 16 * 8 + lane % 8, unit_weight = lane / 8 % 2;
  float sums[4][4] = {};
#pragma unroll 1
  for (int chunk = 0, stage = 0; chunk < count; chunk++, stage = (stage + 1) % STAGES) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // this chunk is there for all, and nobody reads the one before any more
    if (chunk + STAGES - 1 < count) {
      fetch_weight(chunk + STAGES - 1, (stage + STAGES - 1) % STAGES);
      fetch_x(chunk + STAGES - 1, (stage + STAGES - 1) % STAGES);
    }
    copy_commit();
    const Stage& own = stages[stage];
    unsigned a[CHUNK / 16][4], b[CHUNK / 16][2][4];
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++) {
      load_matrices(a[k], &own.x[swizzled(row_x, k * 2 + unit_x)]);
#pragma unroll
      for (int i = 0; i < 2; i++)
        load_matrices(b[k][i], &own.weight[swizzled(row_weight + i * 16, k * 2 + unit_weight)]);
    }
#pragma unroll
    for (int k = 0; k < CHUNK / 16; k++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        mma<elem_t>(sums[j], a[k], b[k][j / 2][j % 2 * 2], b[k][j / 2][j % 2 * 2 + 1]);
  }

  if constexpr (SPLIT > 1) {
    if (threadIdx.x == 0) expect_bytes(&arrived, ROWS * OUTPUTS * sizeof(float));
    cluster_wait();  // the counters of all blocks are ready
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int r = first_row + half * 8;  // eight rows have one owner
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float* target = &received[rank * OWN + r % OWN + across][first_output + j * 8 + along * 2];
      if constexpr (SPLIT > 1)
        send(target, &arrived, r / OWN, sums[j][half * 2], sums[j][half * 2 + 1]);
      else
        *reinterpret_cast<float2*>(target) = make_float2(sums[j][half * 2], sums[j][half * 2 + 1]);
    }
  }
  if constexpr (SPLIT > 1)
    wait_for_bytes(&arrived);
  else
    __syncthreads();

#pragma unroll 1
  for (int turn = 0; turn < TURNS; turn++) {
    int r = own_row + turn * STEP_ROWS, n = n0 + rank * OWN + r;
    if (r >= OWN || n >= N || columns <= 0) break;
    if constexpr (!EARLY) load_residual(r);
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = own_bias[i];
#pragma unroll
    for (int part = 0; part < SPLIT; part++) {
      float4 sum = *reinterpret_cast<const float4*>(&received[part * OWN + r][column]);
      values[0] += sum.x;
      values[1] += sum.y;
      values[2] += sum.z;
      values[3] += sum.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = activate(values[i], activation) + own_residual[i];
    out_t* target = y + (size_t)n * M + m;
    if (aligned) {
      store_floats(target, values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < columns) target[i] = from_float<out_t>(values[i]);
    }
  }
}

#define LINEAR_ROWS_ENTRY(name, cluster, split, out_t)                                      \
  extern "C" __global__ void cluster __launch_bounds__(THREADS)                             \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual, \
           out_t* y, int activation, int N, int M, int K) {                                 \
    product<split>(x, weight, bias, residual, y, activation, N, M, K);                      \
  }

LINEAR_ROWS_ENTRY(linear_rows_1, , 1, elem_t)
LINEAR_ROWS_ENTRY(linear_rows_1_f32, , 1, float)
#if __CUDA_ARCH__ >= 900
LINEAR_ROWS_ENTRY(linear_rows_2, CLUSTER(2), 2, elem_t)
LINEAR_ROWS_ENTRY(linear_rows_4, CLUSTER(4), 4, elem_t)
LINEAR_ROWS_ENTRY(linear_rows_8, CLUSTER(8), 8, elem_t)
LINEAR_ROWS_ENTRY(linear_rows_2_f32, CLUSTER(2), 2, float)
LINEAR_ROWS_ENTRY(linear_rows_4_f32, CLUSTER(4), 4, float)
LINEAR_ROWS_ENTRY(linear_rows_8_f32, CLUSTER(8), 8, float)
#endif

#endif
