// The feed-forward network for 1 to 16 rows. The hidden values never leave shared memory.
//
//   y[n] = W2 activation(W1 x[n] + b1) + b2 + residual[n]
//
//   ffn_few_bR_cS   partial[p] = W2[:, part p] activation(W1[part p] x + b1[part p])
//   ffn_sum         y = sum of partial[p] + b2 + residual
//
// Shapes    x [N, C], N <= R; W1 [F, C]; b1 [F]; W2 [M, F]; partial [P, N, M]; b2 [M]; residual and
//           y [N, M]; C, F and M multiples of 8
// Dtypes    x, W1, b1 and W2 are ELEM, fp16 or bf16; partial is float; b2, residual and y are ELEM,
//           or float (ffn_sum_f32)
// Bytes     (C + M) F sizeof ELEM, each read once, and 8 P N M of partial sums, which stay in L2
// FLOPs     2 N F (C + M)
// Work      a cluster of S blocks has a part of the hidden values. Each block makes a share of them
//           from rows of W1, its warps share C; they are added through shared memory and sent to
//           all blocks of the cluster. Then each block makes a share of the outputs from the
//           cluster's columns of W2, a warp by itself eight of them at a time.
//           In mma.m16n8k16 the rows of x are the 16 (with R = 8 half of them) and the rows of W
//           the 8, and a lane loads 16 bytes of a row of W and uses them as they lie, as in
//           skinny.cu: from a pipeline of its own in shared memory, which it fills `ahead` loads
//           before (cp.async), also from W1 to W2. So while hidden values are added and sent, the
//           memory does not wait.
//
// Needs sm_90 for clusters and sm_80 (mma.m16n8k16) for S = 1, where a part is a block's.
#include "dsmem.cuh"
#include "epilogue.cuh"
#include "mma.cuh"

#if __CUDA_ARCH__ >= 800

constexpr int MOST_ROWS = 16;        // of x
constexpr int TILE = 8;              // hidden values or outputs of an mma
constexpr int VEC = WIDEST<elem_t>;  // inputs of a lane's load
constexpr int SPAN = 4 * VEC;        // inputs of a warp's load: 4 lanes along the row, 8 rows
constexpr int WARPS = 16;
constexpr int THREADS = WARPS * WARP;
constexpr int RING_BYTES = THREADS * 16;  // of a load of every lane
constexpr int SUMS = 96;                  // rows of tiles of hidden values whose sums are kept
constexpr int SUM_BYTES = SUMS * WARPS * TILE * 4;

using Piece = Vec<elem_t, VEC>;

__device__ inline unsigned word(const Piece& packed, int i) {
  return reinterpret_cast<const unsigned*>(&packed)[i];
}

// Elements from one row in shared memory to the next: eight rows are 64 bytes apart in the banks.
constexpr int PAD_BYTES = 64;
__device__ inline int pitch(int length) {
  constexpr int PAD = PAD_BYTES / sizeof(elem_t);
  return (length + 2 * PAD - 1) / (2 * PAD) * 2 * PAD + PAD;
}

// d [16, 8] += a w^T for 16 bytes of a lane's rows of x, `across` and `across` + 8, and of W.
__device__ inline void add_product(float (&d)[2][4],
                                   const Piece& a,
                                   const Piece& a8,
                                   const Piece& w) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    unsigned x[4] = {word(a, half * 2), word(a8, half * 2), word(a, half * 2 + 1),
                     word(a8, half * 2 + 1)};
    unsigned w0 = word(w, half * 2), w1 = word(w, half * 2 + 1);
    mma<elem_t>(d[half], x, w0, w1);
  }
}

// A share of `count` things, from `first` on.
struct Share {
  int first, count;
  __device__ Share(int all, int index, int shares) {
    first = (int)((long long)all * index / shares);
    count = (int)((long long)all * (index + 1) / shares) - first;
  }
};

// The loads of a lane, in the order in which they are used: rows of W1, then of W2.
struct Loader {
  const elem_t* from;        // the next load
  int k, end, length, step;  // its place in the row, the row's end for this warp and in memory
  const elem_t* row;
  size_t next;  // elements to the next row
  int rows;     // that are left
  unsigned stage, stages, stages_end;

  __device__ void begin(
      const elem_t* first, size_t to_next, int count, int chunks, int stride, int left) {
    row = from = first;
    next = to_next;
    rows = count;
    step = stride;
    end = chunks * stride;
    length = left;
    k = 0;
  }
  // Whether rows are left afterwards.
  __device__ bool load() {
    cp_async_or_zero(stage, from, k < length && rows > 0);
    cp_async_commit();
    stage += RING_BYTES;
    if (stage == stages_end) stage = stages;
    k += step;
    from += step;
    if (k < end) return true;
    k = 0;
    from = row += next;
    return --rows > 0;
  }
};

// Waits for the oldest of `ahead` loads.
__device__ inline void wait_for_oldest(int ahead) {
  if (ahead >= 12)
    cp_async_wait<11>();
  else if (ahead >= 8)
    cp_async_wait<7>();
  else
    cp_async_wait<3>();
}

// What a block needs to make its hidden values of the sums of its warps.
struct Hidden {
  const elem_t* b1;  // of the cluster's hidden values, or null
  elem_t* rows;      // of the hidden values, in shared memory
  float* sums;       // [BATCH][WARPS][MOST][TILE]
  const Mbarrier* arrived;
  int pitch, first, N, activation;  // first: tile of the block among those of the cluster
};

// Tiles whose sums are kept.
template <int MOST>
constexpr int BATCH = SUMS / MOST;

// Make the hidden values of `count` tiles from `tile` on, for all blocks of the cluster. Not
// inlined: it is rare, and would be there for each of the AHEAD loads.
template <int MOST, int S>
__device__ __noinline__ void send(const Hidden& block, int tile, int count, bool last) {
  __syncthreads();
  if (S > 1 && tile < BATCH<MOST>) cluster_wait();  // the mbarriers of all are initialised
  auto sums = reinterpret_cast<const float (*)[WARPS][MOST][TILE]>(block.sums);
  for (int i = threadIdx.x; i < count * MOST * TILE / 2; i += THREADS) {
    int t = i / (MOST * TILE / 2), n = i / (TILE / 2) % MOST, unit = i % (TILE / 2) * 2;
    if (n >= block.N) continue;
    int place = (block.first + tile + t) * TILE + unit;
    float value[2] = {};
    if (block.b1) load_floats(block.b1 + place, value);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float2 sum = *reinterpret_cast<const float2*>(&sums[t][w][n][unit]);
      value[0] += sum.x;
      value[1] += sum.y;
    }
    Vec<elem_t, 2> both;
#pragma unroll
    for (int j = 0; j < 2; j++)
      both.value[j] = from_float<elem_t>(activate(value[j], block.activation));
    auto to = reinterpret_cast<Vec<elem_t, 2>*>(block.rows + n * block.pitch + place);
    if constexpr (S > 1) {
#pragma unroll
      for (int r = 0; r < S; r++) dsmem_store_struct(to, block.arrived, r, both);
    } else {
      *to = both;
    }
  }
  if (S == 1 || !last) __syncthreads();
}

template <int MOST, int S>
__device__ inline void few(const elem_t* x,
                           const elem_t* w1,
                           const elem_t* b1,
                           const elem_t* w2,
                           float* partial,
                           int activation,
                           int ahead,
                           int N,
                           int C,
                           int F,
                           int M) {
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int along = lane % 4, across = lane / 4;
  // Rows of x; what those past the last give is not stored.
  int row = min(across, N - 1), row8 = min(across + 8, N - 1);
  int rank = S > 1 ? cluster_rank() : 0, part = blockIdx.x / S, parts = gridDim.x / S;
  Share cluster(F / TILE, part, parts);  // tiles of hidden values of the cluster
  Share own(cluster.count, rank, S);     // of this block, among those
  Share outputs(M / TILE, rank, S);      // tiles of outputs of this block
  int hidden = cluster.count * TILE, f0 = cluster.first * TILE;

  extern __shared__ __align__(128) unsigned char memory[];
  int longest = ((F / TILE + parts - 1) / parts) * TILE;
  int x_pitch = pitch(C), h_pitch = pitch(longest);
  elem_t* rows_of_x = reinterpret_cast<elem_t*>(memory + ahead * RING_BYTES);
  elem_t* rows_of_h = rows_of_x + N * x_pitch;
  auto sums = reinterpret_cast<float (*)[WARPS][MOST][TILE]>(rows_of_h + N * h_pitch);

  __shared__ Mbarrier arrived;
  if constexpr (S > 1) {
    if (threadIdx.x == 0) {
      mbarrier_init(shared_address(&arrived), 1);
      mbarrier_init_fence();
      mbarrier_arrive_expect_tx(shared_address(&arrived), N * hidden * sizeof(elem_t));
    }
    cluster_arrive();
  }
  griddepcontrol_launch_dependents();

  // Of W1 all warps share each row, of W2 each warp has rows of its own.
  int place1 = warp * SPAN + along * VEC, place2 = along * VEC;
  int chunks1 = ((C + SPAN - 1) / SPAN - warp + WARPS - 1) / WARPS;
  int chunks2 = (hidden + SPAN - 1) / SPAN;
  int own_tiles = max((outputs.count - warp + WARPS - 1) / WARPS, 0);
  const elem_t* first1 = w1 + (size_t)((cluster.first + own.first) * TILE + across) * C + place1;
  const elem_t* first2 = w2 + (size_t)((outputs.first + warp) * TILE + across) * F + f0 + place2;
  Loader loader;
  loader.stages = loader.stage = shared_address(memory) + threadIdx.x * 16;
  loader.stages_end = loader.stages + ahead * RING_BYTES;
  bool second = own.count == 0;
  auto begin2 = [&] {
    second = true;
    loader.begin(first2, (size_t)WARPS * TILE * F, own_tiles, chunks2, SPAN, hidden - place2);
  };
  auto load = [&] {
    if (!loader.load() && !second) begin2();
  };
  if (second)
    begin2();
  else
    loader.begin(first1, (size_t)TILE * C, own.count, chunks1, SPAN * WARPS, C - place1);
#pragma unroll 1
  for (int i = 0; i < ahead; i++) load();

  griddepcontrol_wait();
  constexpr Piece ZEROS = {};
  int wide = pitch(C) / VEC, hidden_pieces = h_pitch / VEC;
  for (int i = threadIdx.x; i < N * wide; i += THREADS) {
    int n = i / wide, k = i % wide * VEC;
    *reinterpret_cast<Piece*>(rows_of_x + n * x_pitch + k) =
        k < C ? *reinterpret_cast<const Piece*>(x + (size_t)n * C + k) : ZEROS;
  }
  // What lies behind the hidden values is multiplied by zeros.
  for (int i = threadIdx.x; i < N * hidden_pieces; i += THREADS)
    if (i % hidden_pieces * VEC >= hidden) *reinterpret_cast<Piece*>(rows_of_h + i * VEC) = ZEROS;
  __syncthreads();

  float d[2][4] = {}, total[4] = {};
  unsigned stage = loader.stages;
  auto add_up = [&] {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      total[i] += d[0][i] + d[1][i];
      d[0][i] = d[1][i] = 0.0f;
    }
  };
  // Multiply a row of W, chunk after chunk, by these rows.
  auto multiply = [&](const elem_t* at, const elem_t* at8, int chunks, int step) {
#pragma unroll 2
    for (int chunk = 0; chunk < chunks; chunk++, at += step, at8 += step) {
      wait_for_oldest(ahead);
      Piece w, a = *reinterpret_cast<const Piece*>(at), a8 = {};
      if (MOST > 8) a8 = *reinterpret_cast<const Piece*>(at8);
      asm volatile(
          "ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
          : "=r"(reinterpret_cast<unsigned*>(&w)[0]), "=r"(reinterpret_cast<unsigned*>(&w)[1]),
            "=r"(reinterpret_cast<unsigned*>(&w)[2]), "=r"(reinterpret_cast<unsigned*>(&w)[3])
          : "r"(stage)
          : "memory");
      add_product(d, a, a8, w);
      stage += RING_BYTES;
      if (stage == loader.stages_end) stage = loader.stages;
      load();
    }
    add_up();
  };
  auto store = [&](float* to, float* to8) {  // the sums of rows `across` and `across` + 8
    if (to) *reinterpret_cast<float2*>(to) = make_float2(total[0], total[1]);
    if (MOST > 8 && to8) *reinterpret_cast<float2*>(to8) = make_float2(total[2], total[3]);
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] = 0.0f;
  };

  Hidden block = {b1 ? b1 + f0 : nullptr,
                  rows_of_h,
                  &sums[0][0][0][0],
                  &arrived,
                  h_pitch,
                  own.first,
                  N,
                  activation};
#pragma unroll 1
  for (int tile = 0; tile < own.count; tile++) {
    multiply(rows_of_x + row * x_pitch + place1, rows_of_x + row8 * x_pitch + place1, chunks1,
             SPAN * WARPS);
    auto to = sums[tile % BATCH<MOST>][warp];
    store(&to[across][along * 2], &to[(across + 8) % MOST][along * 2]);
    bool last = tile == own.count - 1;
    int count = tile % BATCH<MOST> + 1;
    if (count == BATCH<MOST> || last) send<MOST, S>(block, tile + 1 - count, count, last);
  }
  if constexpr (S > 1) {
    if (own.count == 0) cluster_wait();
    // Also where a warp has no outputs: the block may not end before.
    mbarrier_wait_cluster(shared_address(&arrived), 0);
  }
#pragma unroll 1
  for (int tile = 0; tile < own_tiles; tile++) {
    multiply(rows_of_h + row * h_pitch + place2, rows_of_h + row8 * h_pitch + place2, chunks2,
             SPAN);
    int m = (outputs.first + warp + tile * WARPS) * TILE + along * 2;
    float* to = partial + ((size_t)part * N + across) * M + m;
    store(across < N ? to : nullptr, across + 8 < N ? to + (size_t)8 * M : nullptr);
  }
  cp_async_wait<0>();
}

#define FFN_FEW_ENTRY(name, cluster, most, blocks)                                                \
  extern "C" __global__ void cluster __launch_bounds__(THREADS, 1)                                \
      name(const elem_t* x, const elem_t* w1, const elem_t* b1, const elem_t* w2, float* partial, \
           int activation, int ahead, int N, int C, int F, int M) {                               \
    few<most, blocks>(x, w1, b1, w2, partial, activation, ahead, N, C, F, M);                     \
  }

FFN_FEW_ENTRY(ffn_few_b8_c1, , 8, 1)
FFN_FEW_ENTRY(ffn_few_b16_c1, , 16, 1)
#if __CUDA_ARCH__ >= 900
FFN_FEW_ENTRY(ffn_few_b8_c2, __cluster_dims__(2), 8, 2)
FFN_FEW_ENTRY(ffn_few_b16_c2, __cluster_dims__(2), 16, 2)
#endif

// ---------------------------------------------------------------------------------------------
// the sum of the parts: a thread four outputs of every SHARES-th part

constexpr int SHARES = 8;
constexpr int SUM_THREADS = SHARES * WARP;

template <typename out_t>
__device__ inline void sum(
    const float* partial, const Epilogue<out_t>& epilogue, int P, int N, int M) {
  __shared__ float4 sums[SHARES][WARP];
  griddepcontrol_launch_dependents();
  int lane = threadIdx.x % WARP, share = threadIdx.x / WARP;
  int i = (blockIdx.x * WARP + lane) * 4;
  bool there = i < N * M, last = there && share == 0;
  float values[4] = {}, added[4] = {};
  if (last && epilogue.bias) load_floats(epilogue.bias + i % M, values);
  griddepcontrol_wait();
  if (last && epilogue.residual) load_floats(epilogue.residual + i, added);
  float4 own = {};
  if (there)
#pragma unroll 4
    for (int p = share; p < P; p += SHARES) {
      float4 part = *reinterpret_cast<const float4*>(partial + (size_t)p * N * M + i);
      own.x += part.x;
      own.y += part.y;
      own.z += part.z;
      own.w += part.w;
    }
  sums[share][lane] = own;
  __syncthreads();
  if (!last) return;
#pragma unroll
  for (int s = 0; s < SHARES; s++) {
    float4 part = sums[s][lane];
    values[0] += part.x;
    values[1] += part.y;
    values[2] += part.z;
    values[3] += part.w;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) values[j] += added[j];
  store_floats(epilogue.y + i, values);
}

#define FFN_SUM_ENTRY(name, out_t)                                                                 \
  extern "C" __global__ void __launch_bounds__(SUM_THREADS)                                        \
      name(const float* partial, const out_t* bias, const out_t* residual, out_t* y, int P, int N, \
           int M) {                                                                                \
    sum<out_t>(partial, {bias, residual, y, IDENTITY}, P, N, M);                                   \
  }

FFN_SUM_ENTRY(ffn_sum, elem_t)
FFN_SUM_ENTRY(ffn_sum_f32, float)

#endif
