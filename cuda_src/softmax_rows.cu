// Softmax over the last dimension.
//
//   y = exp(x - max(x)) / sum(exp(x - max(x)))
//
// Shapes    x, y [N, C], each with a stride of its own between rows
// Dtypes    ELEM; maximum, sum and exponentials in float
// Bytes     2 N C sizeof ELEM where a row fits the registers of its block or cluster, 3 else
// Work      a warp or a block per row, or the eight blocks of a cluster with an eighth of it each.
//           Every warp finds the softmax state {m, l} of what it has: the largest value and the sum
//           of exponentials relative to it. States meet in shared memory, and between the blocks of
//           a cluster in each other's (distributed shared memory), in one exchange.
// Source    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018
#include "common.cuh"

constexpr int HELD = 16;  // channels that a thread keeps in registers

struct alignas(8) SoftmaxState {
  float m;  // largest value, -inf of nothing
  float l;  // sum of exp(value - m)
};

__device__ inline float exponential(float x) {
  if constexpr (sizeof(elem_t) == sizeof(float))
    return expf(x);
  else
    return __expf(x);
}

// What m stands for in a difference: of a row of -inf alone every weight is exp(-inf) = 0.
__device__ inline float base(float m) { return m == MINUS_INFINITY ? 0.0f : m; }

__device__ inline SoftmaxState merge(SoftmaxState a, SoftmaxState b) {
  float m = fmaxf(a.m, b.m);
  return {m, a.l * exponential(a.m - base(m)) + b.l * exponential(b.m - base(m))};
}

__device__ inline SoftmaxState warp_merge(SoftmaxState own) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    own = merge(own, {__shfl_xor_sync(FULL_MASK, own.m, offset),
                      __shfl_xor_sync(FULL_MASK, own.l, offset)});
  return own;
}

// The state of another block of the cluster.
__device__ inline SoftmaxState state_of(const SoftmaxState* mine, int rank) {
  SoftmaxState state = *mine;
#if __CUDA_ARCH__ >= 900
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(mine)), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(state.m), "=f"(state.l)
               : "r"(address)
               : "memory");
#endif
  return state;
}

// All threads of the cluster have arrived, and what they wrote to shared memory can be read.
__device__ inline void cluster_arrive_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

// The state of the whole row, from those of this row's threads.
template <bool CLUSTERED>
__device__ inline SoftmaxState row_state(SoftmaxState own, SoftmaxState* shared) {
  int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
  own = warp_merge(own);
  if (warps > 1) {
    if (lane == 0) shared[threadIdx.x / WARP] = own;
    __syncthreads();
    own = warp_merge(lane < warps ? shared[lane] : SoftmaxState{MINUS_INFINITY, 0.0f});
  }
  if constexpr (CLUSTERED) {
    if (threadIdx.x == 0) shared[WARP] = own;
    cluster_arrive_release();
    cluster_wait();
    own = warp_merge(lane < cluster_size() ? state_of(&shared[WARP], lane)
                                           : SoftmaxState{MINUS_INFINITY, 0.0f});
    cluster_arrive_release();  // no block ends, and takes its state along, before all have read it
  }
  return own;
}

// A row in pieces that lie at multiples of their size in memory, also where the row begins between
// two: piece p holds the channels from p VEC - `before` on, and those outside the row count as
// -inf.
template <int VEC>
struct Pieces {
  const elem_t* x;
  elem_t* y;
  int C, before;

  __device__ bool inside(int c) const { return c >= 0 && c + VEC <= C; }

  __device__ void load(int piece, float (&values)[VEC]) const {
    int c = piece * VEC - before;
    if (inside(c)) {
      load_floats(x + c, values);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; i++)
        values[i] = c + i >= 0 && c + i < C ? to_float(x[c + i]) : MINUS_INFINITY;
    }
  }

  __device__ void store(int piece, const float (&values)[VEC]) const {
    int c = piece * VEC - before;
    if (inside(c)) {
      store_floats(y + c, values);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; i++)
        if (c + i >= 0 && c + i < C) y[c + i] = from_float<elem_t>(values[i]);
    }
  }
};

// Pieces from `first` to `last` of a row, up to S a thread.
template <int VEC, int S, bool CLUSTERED>
__device__ inline void softmax_in_registers(const Pieces<VEC>& row,
                                            int first,
                                            int last,
                                            SoftmaxState* shared) {
  float values[S][VEC];
  SoftmaxState own = {MINUS_INFINITY, 0.0f};
  const int start = first + threadIdx.x;
#pragma unroll
  for (int s = 0; s < S; s++) {
    int piece = start + s * blockDim.x;
    if (piece < last) {
      row.load(piece, values[s]);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; i++) values[s][i] = MINUS_INFINITY;
    }
  }
#pragma unroll
  for (int s = 0; s < S; s++)
#pragma unroll
    for (int i = 0; i < VEC; i++) own.m = fmaxf(own.m, values[s][i]);
  float mine = base(own.m);
#pragma unroll
  for (int s = 0; s < S; s++) {
#pragma unroll
    for (int i = 0; i < VEC; i++) values[s][i] = exponential(values[s][i] - mine);
    own.l += sum_of(values[s]);
  }
  SoftmaxState all = row_state<CLUSTERED>(own, shared);
  float scale = exponential(mine - base(all.m)) / all.l;
#pragma unroll
  for (int s = 0; s < S; s++) {
    int piece = start + s * blockDim.x;
    if (piece >= last) continue;
#pragma unroll
    for (int i = 0; i < VEC; i++) values[s][i] *= scale;
    row.store(piece, values[s]);
  }
}

// The same in two passes, for any number of pieces.
template <int VEC, bool CLUSTERED>
__device__ inline void softmax_in_passes(const Pieces<VEC>& row,
                                         int first,
                                         int last,
                                         SoftmaxState* shared) {
  SoftmaxState own = {MINUS_INFINITY, 0.0f};
  float values[VEC];
  for (int piece = first + threadIdx.x; piece < last; piece += blockDim.x) {
    row.load(piece, values);
    float m = own.m;
#pragma unroll
    for (int i = 0; i < VEC; i++) m = fmaxf(m, values[i]);
    float now = base(m);
    own.l *= exponential(own.m - now);
    own.m = m;
#pragma unroll
    for (int i = 0; i < VEC; i++) own.l += exponential(values[i] - now);
  }
  SoftmaxState all = row_state<CLUSTERED>(own, shared);
  float m = base(all.m), scale = 1.0f / all.l;
  for (int piece = first + threadIdx.x; piece < last; piece += blockDim.x) {
    row.load(piece, values);
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = exponential(values[i] - m) * scale;
    row.store(piece, values);
  }
}

template <int VEC, bool CLUSTERED>
__device__ inline void softmax_row(const Pieces<VEC>& row, SoftmaxState* shared) {
  constexpr int S = HELD / VEC;
  int blocks = CLUSTERED ? cluster_size() : 1, rank = CLUSTERED ? cluster_rank() : 0;
  int pieces = (row.C + row.before + VEC - 1) / VEC;
  int share = (pieces + blocks - 1) / blocks;
  int first = min(rank * share, pieces), last = min((rank + 1) * share, pieces);
  if (share <= S * (int)blockDim.x)
    softmax_in_registers<VEC, S, CLUSTERED>(row, first, last, shared);
  else
    softmax_in_passes<VEC, CLUSTERED>(row, first, last, shared);
}

template <bool CLUSTERED>
__device__ inline void softmax_rows(
    const elem_t* x, elem_t* y, int N, int C, int x_stride, int y_stride) {
  __shared__ SoftmaxState shared[WARP + 1];
  int row = CLUSTERED ? blockIdx.x / cluster_size() : blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= N) return;  // whole warps of a block without clusters
  x += (size_t)row * x_stride;
  y += (size_t)row * y_stride;
  constexpr int WIDE = WIDEST<elem_t>;
  int before = (size_t)x / sizeof(elem_t) % WIDE;
  // Element by element where x and y begin at different places between two pieces.
  if ((size_t)y / sizeof(elem_t) % WIDE == before)
    softmax_row<WIDE, CLUSTERED>({x, y, C, before}, shared);
  else
    softmax_row<1, CLUSTERED>({x, y, C, 0}, shared);
  if constexpr (CLUSTERED) cluster_wait();
}

extern "C" __global__ void __launch_bounds__(1024)
    softmax(const elem_t* x, elem_t* y, int N, int C, int x_stride, int y_stride) {
  softmax_rows<false>(x, y, N, C, x_stride, y_stride);
}

#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __cluster_dims__(8) __launch_bounds__(512)
    softmax_c8(const elem_t* x, elem_t* y, int N, int C, int x_stride, int y_stride) {
  softmax_rows<true>(x, y, N, C, x_stride, y_stride);
}
#endif
