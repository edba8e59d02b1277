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
//           Chunks of both operands pass through a ring of shared memory (cp.async), of `ring`
//           stages; the weights of the first chunks are loaded, and those of the others called into
//           L2, before the kernel waits for its predecessor. Every block sends each of the others
//           its partial sums of the rows that that one finishes, one bulk copy each; they are added
//           in the order of the blocks. Where the ring holds all chunks of a block nothing waits
//           for a product before the last; else a stage is filled again when its chunk has been
//           read.
//
// A product of 64 rows is a matter of latency, not of arithmetic: what it takes is the way of its
// last byte, in the slowest block. So a block should have a multiprocessor for itself, and all of
// its chunks under way at once (gpt2cupy/ops/linear_kernels.py).
//
// With batch_invariant=True it takes any number of rows, and a SPLIT that depends on M and K alone.
// A row of x is a row of the fragments: a tensor core sums each by itself, in the order of K, and
// what follows is the same for all rows. So the others, and its place among them, do not matter.
//
// Needs sm_90 for clusters and sm_80 (mma.m16n8k16) for one block a tile. On sm_90 itself tiles are
// multiplied by wgmma (tile.cuh).
#include "activation.cuh"
#include "barrier.cuh"
#include "handover.cuh"
#include "tile.cuh"

#if __CUDA_ARCH__ >= 800

constexpr int MOST_STAGES = 12;    // also in gpt2cupy/ops/linear_kernels.py
constexpr int LINE = OUTPUTS + 4;  // of a row of partial sums: 16 bytes keep banks apart

constexpr int WARPS = GROUPS * GROUP_WARPS;
constexpr int THREADS = WARPS * WARP;
constexpr int STEP = THREADS / UNITS;  // rows that the block copies at once
constexpr int COPIES = ROWS / STEP;    // of a thread, per chunk and operand
static_assert(ROWS == OUTPUTS, "both operands are copied alike");

// A place in the ring, as Cursor in ring.cuh, but of a size known at launch.
struct RingPlace {
  int stage;
  unsigned parity;  // of the ring's round
  // No further than the ring is long, or all chunks fit it.
  __device__ void advance(int by, int ring) {
    stage += by;
    if (stage >= ring) {
      stage -= ring;
      parity ^= 1;
    }
  }
};

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
                               int K,
                               int ring) {
  constexpr int OWN = ROWS / SPLIT;  // rows that this block finishes
  extern __shared__ __align__(1024) unsigned char memory[];
  Stage* stages = reinterpret_cast<Stage*>(memory);
  // The partial sums of the rows that this block finishes, from each other block of the cluster;
  // and those that it sends to them.
  auto received = reinterpret_cast<float (*)[LINE]>(memory + ring * sizeof(Stage));
  auto partial = SPLIT > 1 ? received + ROWS : received;
  int rank = cluster_rank();
  int m0 = blockIdx.x / SPLIT * OUTPUTS, n0 = blockIdx.y * ROWS;
  int chunks = (K + CHUNK - 1) / CHUNK, share = (chunks + SPLIT - 1) / SPLIT;
  int begin = rank * share, count = max(min(chunks - begin, share), 0);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

  __shared__ Counter arrived;
  __shared__ Barrier came[MOST_STAGES], used[MOST_STAGES];
  unsigned first_came = shared_address(came), first_used = shared_address(used);
  if (threadIdx.x < ring) {
    open_barrier(first_came + threadIdx.x * 8, THREADS);
    open_barrier(first_used + threadIdx.x * 8, GROUP_WARPS);
  }
  if constexpr (SPLIT > 1) {
    if (threadIdx.x == 0) open_counter(&arrived);
    cluster_begin();  // others may write to this block's memory
  }
  release_dependents();
  __syncthreads();

  // Outputs past the last have its weights; nobody stores them. Rows of x past the last are zero.
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
    to_x[i] = shared_address(&stages[0].x[place_of<UNITS>(row + i * STEP, unit)]);
  }
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
                   chunk * CHUNK < left_x[i]);
  };

  int early = min(count, ring);
#pragma unroll 1
  for (int chunk = 0; chunk < early; chunk++) fetch_weight(chunk, chunk);
  if (unit == 0)  // a row of a chunk is one line of the cache, if K is a multiple of CHUNK
#pragma unroll 1
    for (int chunk = early; chunk < count; chunk++)
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

#pragma unroll 1
  for (int chunk = 0; chunk < early; chunk++) {
    fetch_x(chunk, chunk);
    arrive_after_copies(first_came + chunk * 8);
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

  int group = warp / GROUP_WARPS;
  Tile tile;
  RingPlace place = {group, 0}, refill = {0, 0};
#pragma unroll 1
  for (int chunk = group; chunk < count + group; chunk += GROUPS) {
    // Fill the stages of the last turn again. All threads copy, also those whose group has no chunk
    // in this turn.
    int turn = chunk - group;
    if (turn > 0)
      for (int next = turn - GROUPS + ring; next < min(turn + ring, count); next++) {
        wait_barrier(first_used + refill.stage * 8, refill.parity);
        fetch_weight(next, refill.stage);
        fetch_x(next, refill.stage);
        arrive_after_copies(first_came + refill.stage * 8);
        refill.advance(1, ring);
      }
    if (chunk >= count) break;
    wait_barrier(first_came + place.stage * 8, place.parity);
    tile.multiply(stages[place.stage], N - n0);
    if (count > ring) {  // others wait for the stage
      tile.finish();
      __syncwarp();
      if (lane == 0) arrive(first_used + place.stage * 8);
    }
    place.advance(GROUPS, ring);
  }

  // The groups' sums are put together where the copies to the rows' owners begin.
  tile.finish();
  if (group == 1) tile.put(partial, false);
  __syncthreads();
  if (group == 0) tile.put(partial, true);
  if constexpr (SPLIT > 1) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    constexpr unsigned PART = OWN * sizeof(*received);
    if (threadIdx.x == 0) expect_bytes(&arrived, (SPLIT - 1) * PART);
    cluster_wait();  // the counters of all blocks are ready
    int to = threadIdx.x;
    if (to < SPLIT && to != rank)
      send_block(received[rank * OWN], partial[to * OWN], PART, &arrived, to);
    wait_for_bytes(&arrived);
    cluster_begin();
  } else {
    __syncthreads();
  }

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
      auto from = part == rank ? partial : received;  // its own part lies where it was
      float4 sum = *reinterpret_cast<const float4*>(&from[part * OWN + r][column]);
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
  if constexpr (SPLIT > 1) cluster_wait();  // what this block sends is read from its memory
}

#define LINEAR_ROWS_ENTRY(name, cluster, split, out_t)                                      \
  extern "C" __global__ void cluster __launch_bounds__(THREADS)                             \
      name(const elem_t* x, const elem_t* weight, const out_t* bias, const out_t* residual, \
           out_t* y, int activation, int N, int M, int K, int ring) {                       \
    product<split>(x, weight, bias, residual, y, activation, N, M, K, ring);                \
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
