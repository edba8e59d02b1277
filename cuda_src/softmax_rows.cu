// Softmax over the last dimension.
//
//   y = exp(x - max(x)) / sum(exp(x - max(x)))
//
// Shapes    x, y [N, C], each with a stride of its own between rows
// Dtypes    ELEM; maximum, sum and exponentials in float
// Bytes     2 N C sizeof ELEM where a row fits the registers of its block or cluster, 3 else
// Work      a warp or a block per row, or the eight blocks of a cluster with an eighth of it each.
//           Every warp finds the softmax state {m, l} of what it has: the largest value and the sum
//           of exponentials relative to it. States meet in shared memory, those of a cluster in
//           that of each of its blocks (distributed shared memory), in one exchange; there every
//           warp merges them all.
// Source    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018
#include "dsmem.cuh"

constexpr int MOST = 512;  // threads of a block of a cluster
// Channels that a thread keeps in registers, where PARTS blocks share a row.
template <int PARTS>
constexpr int HELD = PARTS == 2   ? 64
                     : PARTS == 4 ? 32
                                  : 16;

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

// The largest of a warp's values, none of which is NaN: as integers of the same order, which the
// chip compares across a warp at once.
__device__ inline float warp_largest(float x) {
#if __CUDA_ARCH__ >= 800
  int bits = __float_as_int(x);
  bits ^= bits >> 31 & 0x7fffffff;
  bits = __reduce_max_sync(FULL_MASK, bits);
  return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
#else
  return warp_max(x);
#endif
}

// The state of all lanes' states.
template <int N>
__device__ inline SoftmaxState warp_merge(const SoftmaxState (&own)[N]) {
  float m = own[0].m, l = 0.0f;
#pragma unroll
  for (int i = 1; i < N; i++) m = fmaxf(m, own[i].m);
  m = warp_largest(m);
#pragma unroll
  for (int i = 0; i < N; i++) l += own[i].l * exponential(own[i].m - base(m));
  return {m, warp_sum(l)};
}

// Where the states of a row's warps meet.
template <int PARTS>
struct Meeting {
  SoftmaxState states[PARTS > 1 ? PARTS * MOST / WARP : WARP];
  Mbarrier arrived;  // completed by the states from all blocks of the cluster
};

// The state of the whole row, from those of this row's warps. Every block of a cluster gets all.
template <int PARTS>
__device__ inline SoftmaxState row_state(SoftmaxState own, Meeting<PARTS>& shared) {
  constexpr int EACH = sizeof(shared.states) / sizeof(SoftmaxState) / WARP;
  int warps = blockDim.x / WARP, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if constexpr (PARTS > 1) {
    cluster_wait();  // the mbarriers are initialised
    unsigned bytes = PARTS * warps * sizeof(SoftmaxState);
    if (threadIdx.x == 0) mbarrier_arrive_expect_tx(shared_address(&shared.arrived), bytes);
    if (lane < PARTS)
      dsmem_store_struct(&shared.states[cluster_rank() * warps + warp], &shared.arrived, lane, own);
    mbarrier_wait_cluster(shared_address(&shared.arrived), 0);
    warps *= PARTS;
  } else {
    if (warps == 1) return own;
    if (lane == 0) shared.states[warp] = own;
    __syncthreads();
  }
  SoftmaxState all[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++)
    all[i] = i * WARP + lane < warps ? shared.states[i * WARP + lane]
                                     : SoftmaxState{MINUS_INFINITY, 0.0f};
  return warp_merge(all);
}

// A row in pieces that lie at multiples of their size in memory, also where the row begins between
// two. Piece p holds the channels from p VEC - `before` on; those outside the row are -inf, and so
// are all of a piece from `last` on.
template <int VEC>
struct Pieces {
  const elem_t* x;
  elem_t* y;
  int C, before;

  __device__ bool inside(int c) const { return c >= 0 && c + VEC <= C; }

  // As words: taken apart when it arrives, each piece would be waited for before the next is asked
  // for.
  __device__ Packed<elem_t, VEC> load(int piece, int last) const {
    int c = piece < last ? piece * VEC - before : C;
    if (inside(c)) return *reinterpret_cast<const Packed<elem_t, VEC>*>(x + c);
    Packed<elem_t, VEC> edge;
    elem_t values[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++)
      values[i] = c + i >= 0 && c + i < C ? x[c + i] : from_float<elem_t>(MINUS_INFINITY);
    memcpy(&edge, values, sizeof edge);
    return edge;
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

template <int VEC>
__device__ inline void unpack(const Packed<elem_t, VEC>& piece, float (&values)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; i++) values[i] = piece[i];
}

// Pieces from `first` to `last` of a row, up to S a thread.
template <int VEC, int S, int PARTS>
__device__ inline void softmax_in_registers(const Pieces<VEC>& row,
                                            int first,
                                            int last,
                                            Meeting<PARTS>& shared) {
  Packed<elem_t, VEC> held[S];
  float values[S][VEC];
  const int start = first + threadIdx.x;
#pragma unroll
  for (int s = 0; s < S; s++) held[s] = row.load(start + s * blockDim.x, last);
#pragma unroll
  for (int s = 0; s < S; s++) unpack(held[s], values[s]);
  float m = MINUS_INFINITY;
#pragma unroll
  for (int s = 0; s < S; s++)
#pragma unroll
    for (int i = 0; i < VEC; i++) m = fmaxf(m, values[s][i]);
  m = warp_largest(m);
  float sums[S];
#pragma unroll
  for (int s = 0; s < S; s++) {
#pragma unroll
    for (int i = 0; i < VEC; i++) values[s][i] = exponential(values[s][i] - base(m));
    sums[s] = sum_of(values[s]);
  }
  SoftmaxState all = row_state({m, warp_sum(sum_of(sums))}, shared);
  float scale = exponential(base(m) - base(all.m)) / all.l;
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
template <int VEC, int PARTS>
__device__ inline void softmax_in_passes(const Pieces<VEC>& row,
                                         int first,
                                         int last,
                                         Meeting<PARTS>& shared) {
  SoftmaxState own[1] = {{MINUS_INFINITY, 0.0f}};
  float values[VEC];
  for (int piece = first + threadIdx.x; piece < last; piece += blockDim.x) {
    unpack(row.load(piece, last), values);
    float m = own[0].m;
#pragma unroll
    for (int i = 0; i < VEC; i++) m = fmaxf(m, values[i]);
    float now = base(m);
    own[0].l *= exponential(own[0].m - now);
    own[0].m = m;
#pragma unroll
    for (int i = 0; i < VEC; i++) own[0].l += exponential(values[i] - now);
  }
  SoftmaxState all = row_state(warp_merge(own), shared);
  float m = base(all.m), scale = 1.0f / all.l;
  for (int piece = first + threadIdx.x; piece < last; piece += blockDim.x) {
    unpack(row.load(piece, last), values);
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = exponential(values[i] - m) * scale;
    row.store(piece, values);
  }
}

template <int VEC, int PARTS>
__device__ inline void softmax_row(const Pieces<VEC>& row, Meeting<PARTS>& shared) {
  constexpr int S = HELD<PARTS> / VEC;
  int rank = PARTS > 1 ? cluster_rank() : 0;
  int pieces = (row.C + row.before + VEC - 1) / VEC;
  int share = (pieces + PARTS - 1) / PARTS;
  int first = min(rank * share, pieces), last = min((rank + 1) * share, pieces);
  if (share <= S * (int)blockDim.x)
    softmax_in_registers<VEC, S>(row, first, last, shared);
  else
    softmax_in_passes<VEC>(row, first, last, shared);
}

template <int PARTS>
__device__ inline void softmax_rows(
    const elem_t* x, elem_t* y, int N, int C, int x_stride, int y_stride) {
  __shared__ Meeting<PARTS> shared;
  if constexpr (PARTS > 1) {
    if (threadIdx.x == 0) {
      mbarrier_init(shared_address(&shared.arrived), 1);
      mbarrier_init_fence();
    }
    cluster_arrive();
  }
  int row = PARTS > 1 ? blockIdx.x / PARTS : blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= N) return;  // whole warps of a block without clusters
  x += (size_t)row * x_stride;
  y += (size_t)row * y_stride;
  constexpr int WIDE = WIDEST<elem_t>;
  int before = (size_t)x / sizeof(elem_t) % WIDE;
  // Element by element where x and y begin at different places between two pieces.
  if ((size_t)y / sizeof(elem_t) % WIDE == before)
    softmax_row<WIDE, PARTS>({x, y, C, before}, shared);
  else
    softmax_row<1, PARTS>({x, y, C, 0}, shared);
}

#define SOFTMAX_ENTRY(name, cluster, parts, threads)                               \
  extern "C" __global__ void cluster __launch_bounds__(threads)                    \
      name(const elem_t* x, elem_t* y, int N, int C, int x_stride, int y_stride) { \
    softmax_rows<parts>(x, y, N, C, x_stride, y_stride);                           \
  }

SOFTMAX_ENTRY(softmax, , 1, 1024)
#if __CUDA_ARCH__ >= 900
SOFTMAX_ENTRY(softmax_c2, __cluster_dims__(2), 2, MOST)
SOFTMAX_ENTRY(softmax_c4, __cluster_dims__(4), 4, MOST)
SOFTMAX_ENTRY(softmax_c8, __cluster_dims__(8), 8, MOST)
#endif
