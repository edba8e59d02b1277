// The GEMV of a persistent step (decode_step.cu), of 1 to 4 rows: each warp loads its part of x,
// normalised if need be, and multiplies all weights of the block with it as they arrive.
#pragma once

#include "epilogue.cuh"
#include "mma.cuh"
#include "step_attention.cuh"

#if __CUDA_ARCH__ >= 900

constexpr int SHARED = 226 << 10;  // bytes of a block
constexpr int GROUP = 64;          // outputs of a block at a time
constexpr int SPAN = 32;           // inputs of a warp's load: 4 lanes along K, 8 along the rows
constexpr int UNITS = C / SPAN;    // of K; shared out to the warps
constexpr int MOST_UNITS = (UNITS + CONSUMERS - 1) / CONSUMERS;
static_assert(UNITS >= CONSUMERS, "each warp has a part of K");

enum Matrix { QKV, PROJ, FC, OUT };

// Shared memory of a block behind the pipeline. Moments and sums are double-buffered: those of the
// next matrix are written while the last one's may still be read.
template <int N>
struct SharedStorage {
  static constexpr int ROW = WIDE * C + 32;  // of x; 64 bytes apart in the banks
  alignas(16) elem_t x[N][ROW];
  float2 moments[2][N][CONSUMERS];  // mean, and sum of squares about it
  float sums[2][CONSUMERS][N][GROUP];
  AttentionStorage<N> attention;
  Share shares[4];  // of each matrix
  Job job;          // the first; most blocks have no more
};

// Offsets in it, in bytes.
template <int N>
__device__ constexpr int moments_at(int buffer, int n) {
  return sizeof(elem_t) * N * SharedStorage<N>::ROW + (buffer * N + n) * CONSUMERS * 8;
}
template <int N>
__device__ constexpr int sums_at(int buffer, int warp, int n) {
  return moments_at<N>(2, 0) + ((buffer * CONSUMERS + warp) * N + n) * GROUP * 4;
}

template <int N>
constexpr int STAGES = (SHARED - (int)sizeof(SharedStorage<N>)) / (STAGE_BYTES + 16);
template <int N>
using Weights = Pipeline<STAGES<N>>;

// ---------------------------------------------------------------------------------------------
// x

// The first unit of K of a warp.
__device__ inline int unit_of(int warp) { return warp * UNITS / CONSUMERS; }

// A lane's part of a row: of each unit of its warp one input.
template <typename T>
using PerUnit = T[MOST_UNITS];

// Whether the warp has unit u of MOST_UNITS; where UNITS is no multiple of CONSUMERS, some warps
// lack the last.
__device__ inline bool has_unit(int tid, int u) {
  if (UNITS % CONSUMERS == 0 || u < UNITS / CONSUMERS) return true;
  int warp = tid / WARP;
  return u < unit_of(warp + 1) - unit_of(warp);
}
__device__ inline int lane_at(int tid, int u) {
  return (unit_of(tid / WARP) + u) * SPAN + tid % WARP;
}

template <int N>
__device__ inline void wait_for_stream(int tid,
                                       const FloatMailbox* mailboxes,
                                       unsigned flag,
                                       PerUnit<float> (&x)[N]) {
  FloatMailbox w[N * MOST_UNITS];
  wait_for_flag(w, flag, [&](int i) {
    int u = i % MOST_UNITS;
    return has_unit(tid, u) ? poll(mailboxes + i / MOST_UNITS * C + lane_at(tid, u))
                            : (FloatMailbox)flag << 32;
  });
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) x[n][u] = value_of(w[n * MOST_UNITS + u]);
}

struct Norm {
  PerUnit<elem_t> weight, bias;
  __device__ void load(int tid, const elem_t* w, const elem_t* b) {
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) {
      int at = UNITS % CONSUMERS ? min(lane_at(tid, u), C - 1) : lane_at(tid, u);
      weight[u] = w[at];
      bias[u] = b[at];
    }
  }
};

// Store the warp's part of the normalised rows in shared memory, rounded to ELEM as by norm.cu.
// Means and variances of the parts are combined as in Chan, Golub, LeVeque, 1979.
template <int N>
__device__ inline void normalise(int tid,
                                 const PerUnit<float> (&x)[N],
                                 const Norm& norm,
                                 float eps,
                                 unsigned shared,
                                 int buffer) {
  int warp = tid / WARP, lane = tid % WARP;
  float mean[N], square[N], size = unit_of(warp + 1) - unit_of(warp);
#pragma unroll
  for (int n = 0; n < N; n++) {
    mean[n] = square[n] = 0.0f;
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) mean[n] += has_unit(tid, u) ? x[n][u] : 0.0f;
    mean[n] *= 1.0f / size;
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++)
      if (has_unit(tid, u)) square[n] = fmaf(x[n][u] - mean[n], x[n][u] - mean[n], square[n]);
  }
#pragma unroll
  for (int offset = 1; offset < WARP; offset *= 2) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      float other = __shfl_xor_sync(FULL_MASK, mean[n], offset), apart = other - mean[n];
      square[n] += __shfl_xor_sync(FULL_MASK, square[n], offset);
      mean[n] = 0.5f * (mean[n] + other);
      square[n] = fmaf(apart * apart, 0.5f * size * offset, square[n]);
    }
  }
  if (lane == 0)
#pragma unroll
    for (int n = 0; n < N; n++)
      put8(shared + moments_at<N>(buffer, n) + warp * 8,
           {__float_as_uint(mean[n]), __float_as_uint(square[n])});
  sync_consumers();
#pragma unroll
  for (int n = 0; n < N; n++) {
    float means[CONSUMERS], squares[CONSUMERS];
#pragma unroll
    for (int w = 0; w < CONSUMERS; w += 2) {
      uint4 two = get16(shared + moments_at<N>(buffer, n) + w * 8);
      means[w] = __uint_as_float(two.x);
      squares[w] = __uint_as_float(two.y);
      means[w + 1] = __uint_as_float(two.z);
      squares[w + 1] = __uint_as_float(two.w);
    }
    float weighted[CONSUMERS];
#pragma unroll
    for (int w = 0; w < CONSUMERS; w++)
      weighted[w] = means[w] * ((unit_of(w + 1) - unit_of(w)) * (float)SPAN / C);
    float middle = sum_of(weighted);
#pragma unroll
    for (int w = 0; w < CONSUMERS; w++)
      squares[w] = fmaf((unit_of(w + 1) - unit_of(w)) * (float)SPAN,
                        (means[w] - middle) * (means[w] - middle), squares[w]);
    float inverse = rsqrtf(sum_of(squares) * (1.0f / C) + eps);
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++)
      if (has_unit(tid, u))
        put2(shared + (n * SharedStorage<N>::ROW + lane_at(tid, u)) * 2,
             from_float<elem_t>(fmaf((x[n][u] - middle) * inverse, to_float(norm.weight[u]),
                                     to_float(norm.bias[u]))));
  }
  __syncwarp();
}

// Store the warp's part of rows of elements in shared memory, when they have arrived; of each row
// PARTS times C.
template <int N, int PARTS>
__device__ inline void wait_for_rows(int tid,
                                     const ElemMailbox* mailboxes,
                                     unsigned flag,
                                     unsigned shared) {
  constexpr int EACH = SPAN / 4;  // four mailboxes at a time, of a unit
  constexpr int ROUNDS = (PARTS * MOST_UNITS * EACH + WARP - 1) / WARP;
  int warp = tid / WARP, first = unit_of(warp);
  int units = UNITS % CONSUMERS ? unit_of(warp + 1) - first : MOST_UNITS;
  auto index = [&](int i) { return i % ROUNDS * WARP + tid % WARP; };
  auto inside = [&](int i) { return index(i) < PARTS * units * EACH; };
  auto place = [&](int i) {
    int at = min(index(i), PARTS * units * EACH - 1);
    return at / (units * EACH) * C + first * SPAN + at % (units * EACH) * 4;
  };
  uint4 w[N * ROUNDS];
  wait_for_flag(w, flag,
                [&](int i) { return poll_four(mailboxes + i / ROUNDS * PARTS * C + place(i)); });
#pragma unroll
  for (int i = 0; i < N * ROUNDS; i++)
    if (inside(i))
      put8(shared + (i / ROUNDS * SharedStorage<N>::ROW + place(i)) * 2, elements_of(w[i]));
  __syncwarp();
}

// ---------------------------------------------------------------------------------------------
// the GEMV

// Store the sums of up to GROUP outputs over the warp's part of K in shared memory.
// Of the 16 rows of m16n8k16's left operand, eight are rows of weights at the inputs that a lane
// has in the first and third word of its load, and eight the same rows at those of the other two:
// so a load is an operand as it is. The right operand has of each row of x one column for either.
template <int N, int PARTS>
__device__ inline void multiply(int tid,
                                const Weights<N>& pipeline,
                                PipelineState& at,
                                int outputs,
                                unsigned shared,
                                int buffer) {
  int warp = tid / WARP, lane = tid % WARP, along = lane % 4, across = lane / 4;
  int first = unit_of(warp) * SPAN + along * 8;
  unsigned weights = first * 2;
  // With fewer than four rows the columns left over repeat the last row; their sums are not read.
  unsigned column =
      shared + (min(across / 2, N - 1) * SharedStorage<N>::ROW + first + across % 2 * 2) * 2;
  unsigned sums = shared + sums_at<N>(buffer, warp, min(along, N - 1)) + across * 4;
  unsigned x[PARTS][MOST_UNITS][2];
#pragma unroll
  for (int p = 0; p < PARTS; p++)
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++)
      if (has_unit(tid, u)) {
        x[p][u][0] = get4(column + (p * C + u * SPAN) * 2);
        x[p][u][1] = get4(column + (p * C + u * SPAN + 4) * 2);
      }
#pragma unroll 1
  for (int tile = 0; tile < outputs; tile += TILE) {
    float d[2][4] = {};
    int row = min(across, outputs - tile - 1);
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      pipeline.wait_full(at);
      unsigned w = pipeline.row(at, row) + weights;
#pragma unroll
      for (int u = 0; u < MOST_UNITS; u++)
        if (has_unit(tid, u)) {
          uint4 a = get16(w + u * SPAN * 2);
          mma<elem_t>(d[u % 2], {a.x, a.y, a.z, a.w}, x[p][u][0], x[p][u][1]);
        }
      __syncwarp();
      if (lane == 0) pipeline.release(at);
      at.next(STAGES<N>);
    }
    if (along < N) put_float(sums + tile * 4, (d[0][0] + d[1][0]) + (d[0][3] + d[1][3]));
  }
}

// Thread i writes output i % GROUP of row i / GROUP.
template <int N>
__device__ inline bool writes(int tid, int count) {
  return tid < N * GROUP && tid % GROUP < count;
}
template <int N>
__device__ inline float sum_of_warps(int tid, unsigned shared, int buffer) {
  float sums[CONSUMERS];
#pragma unroll
  for (int w = 0; w < CONSUMERS; w++)
    sums[w] = get_float(shared + sums_at<N>(buffer, w, 0) + tid * 4);  // tid = n GROUP + output
  return sum_of(sums);
}

// Multiply all rows of the block's share by the x in shared memory, and call use(n, m, y).
template <int N, int PARTS, typename bias_t, typename use_t>
__device__ inline void gemv(const Weights<N>& pipeline,
                            PipelineState& at,
                            int& buffer,
                            unsigned shared,
                            Share rows,
                            const bias_t* bias,
                            use_t use) {
#pragma unroll 1
  for (int first = 0; first < rows.count; first += GROUP) {
    int tid = opaque(threadIdx.x), count = min(GROUP, rows.count - first);
    int m = rows.first + first + tid % GROUP;
    float own_bias = bias && writes<N>(tid, count) ? to_float(bias[m]) : 0.0f;
    multiply<N, PARTS>(tid, pipeline, at, count, shared, buffer);
    sync_consumers();
    if (writes<N>(tid, count)) use(tid / GROUP, m, sum_of_warps<N>(tid, shared, buffer) + own_bias);
    buffer ^= 1;
  }
}

#endif
