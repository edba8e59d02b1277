// Products of a persistent step (decode_step.cu): each warp takes its part of x, normed if need be,
// and multiplies all weights of the block with it as they come.
#pragma once

#include "activation.cuh"
#include "mma.cuh"
#include "step_attention.cuh"

#if __CUDA_ARCH__ >= 900

constexpr int SHARED = 226 << 10;  // of a block; also in gpt2cupy/ops/gpt2/step.py
constexpr int GROUP = 64;          // outputs of a block in one turn; likewise
constexpr int SPAN = 32;           // inputs of a warp's load: 4 lanes along K, 8 along the rows
constexpr int UNITS = C / SPAN;    // of K; dealt out to the warps
constexpr int MOST_UNITS = (UNITS + CONSUMERS - 1) / CONSUMERS;
static_assert(UNITS >= CONSUMERS, "each warp has a part of K");

enum Product { QKV, PROJ, FC, OUT };

// What a block has in shared memory behind the ring. Moments and sums are there twice: the next
// product's are written while the last one's may still be read.
template <int N>
struct Room {
  static constexpr int ROW = WIDE * C + 32;  // of x; 64 bytes apart in the banks
  alignas(16) elem_t x[N][ROW];
  float2 moments[2][N][CONSUMERS];  // mean, and sum of squares about it
  float sums[2][CONSUMERS][N][GROUP];
  AttentionRoom attention;
  Share shares[4];  // of each product
  Job job;          // the first; most have no more
};

// Where things are in it, in bytes.
template <int N>
__device__ constexpr int moments_at(int buffer, int n) {
  return sizeof(elem_t) * N * Room<N>::ROW + (buffer * N + n) * CONSUMERS * 8;
}
template <int N>
__device__ constexpr int sums_at(int buffer, int warp, int n) {
  return moments_at<N>(2, 0) + ((buffer * CONSUMERS + warp) * N + n) * GROUP * 4;
}

template <int N>
constexpr int STAGES = (SHARED - (int)sizeof(Room<N>)) / (STAGE + 16);
template <int N>
using Weights = Ring<STAGES<N>>;
template <int N>
using At = Cursor<STAGES<N>>;

// ---------------------------------------------------------------------------------------------
// taking x

// The first unit of K of a warp.
__device__ inline int unit_of(int warp) { return warp * UNITS / CONSUMERS; }

// A lane's part of a row: of each unit of its warp one input.
template <typename T>
using PerUnit = T[MOST_UNITS];

// Whether the warp has unit u of MOST_UNITS; where UNITS is no multiple of CONSUMERS, some warps
// lack the last.
__device__ inline bool has_unit(int me, int u) {
  if (UNITS % CONSUMERS == 0 || u < UNITS / CONSUMERS) return true;
  int warp = me / WARP;
  return u < unit_of(warp + 1) - unit_of(warp);
}
__device__ inline int lane_at(int me, int u) { return (unit_of(me / WARP) + u) * SPAN + me % WARP; }

template <int N>
__device__ inline void wait_for_stream(int me,
                                       const FloatWord* words,
                                       unsigned tag,
                                       PerUnit<float> (&x)[N]) {
  FloatWord w[N * MOST_UNITS];
  wait_for_words(w, tag, [&](int i) {
    int u = i % MOST_UNITS;
    return has_unit(me, u) ? poll(words + i / MOST_UNITS * C + lane_at(me, u))
                           : (FloatWord)tag << 32;
  });
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) x[n][u] = value_of(w[n * MOST_UNITS + u]);
}

struct Norm {
  PerUnit<elem_t> weight, bias;
  __device__ void load(int me, const elem_t* w, const elem_t* b) {
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) {
      int at = UNITS % CONSUMERS ? min(lane_at(me, u), C - 1) : lane_at(me, u);
      weight[u] = w[at];
      bias[u] = b[at];
    }
  }
};

// The warp's part of the normed rows to shared memory, rounded to ELEM as a norm by itself would
// be. Means and variances of parts are put together as in Chan, Golub, LeVeque, 1979.
template <int N>
__device__ inline void normalise(
    int me, const PerUnit<float> (&x)[N], const Norm& norm, float eps, unsigned room, int buffer) {
  int warp = me / WARP, lane = me % WARP;
  float mean[N], square[N], size = unit_of(warp + 1) - unit_of(warp);
#pragma unroll
  for (int n = 0; n < N; n++) {
    mean[n] = square[n] = 0.0f;
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) mean[n] += has_unit(me, u) ? x[n][u] : 0.0f;
    mean[n] *= 1.0f / size;
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++)
      if (has_unit(me, u)) square[n] = fmaf(x[n][u] - mean[n], x[n][u] - mean[n], square[n]);
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
      put8(room + moments_at<N>(buffer, n) + warp * 8,
           {__float_as_uint(mean[n]), __float_as_uint(square[n])});
  sync_consumers();
#pragma unroll
  for (int n = 0; n < N; n++) {
    float means[CONSUMERS], squares[CONSUMERS];
#pragma unroll
    for (int w = 0; w < CONSUMERS; w += 2) {
      uint4 two = get16(room + moments_at<N>(buffer, n) + w * 8);
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
      if (has_unit(me, u))
        put2(room + (n * Room<N>::ROW + lane_at(me, u)) * 2,
             from_float<elem_t>(fmaf((x[n][u] - middle) * inverse, to_float(norm.weight[u]),
                                     to_float(norm.bias[u]))));
  }
  __syncwarp();
}

// The warp's part of rows of elements to shared memory, when they are there; of each row PARTS
// times C.
template <int N, int PARTS>
__device__ inline void wait_for_rows(int me, const ElemWord* words, unsigned tag, unsigned room) {
  constexpr int EACH = SPAN / 4;  // four words at a time, of a unit
  constexpr int ROUNDS = (PARTS * MOST_UNITS * EACH + WARP - 1) / WARP;
  int warp = me / WARP, first = unit_of(warp);
  int units = UNITS % CONSUMERS ? unit_of(warp + 1) - first : MOST_UNITS;
  auto index = [&](int i) { return i % ROUNDS * WARP + me % WARP; };
  auto inside = [&](int i) { return index(i) < PARTS * units * EACH; };
  auto place = [&](int i) {
    int at = min(index(i), PARTS * units * EACH - 1);
    return at / (units * EACH) * C + first * SPAN + at % (units * EACH) * 4;
  };
  uint4 w[N * ROUNDS];
  wait_for_words(w, tag,
                 [&](int i) { return poll_four(words + i / ROUNDS * PARTS * C + place(i)); });
#pragma unroll
  for (int i = 0; i < N * ROUNDS; i++)
    if (inside(i)) put8(room + (i / ROUNDS * Room<N>::ROW + place(i)) * 2, elements_of(w[i]));
  __syncwarp();
}

// ---------------------------------------------------------------------------------------------
// products

// Sums of one turn's outputs over the warp's part of K, to shared memory.
// Of the 16 rows of m16n8k16's left operand, eight are rows of weights at the inputs that a lane
// has in the first and third word of its load, and eight the same rows at those of the other two:
// so a load is an operand as it is. The right operand has of each row of x one column for either.
template <int N, int PARTS>
__device__ inline void multiply(
    int me, const Weights<N>& ring, At<N>& at, int outputs, unsigned room, int buffer) {
  int warp = me / WARP, lane = me % WARP, along = lane % 4, across = lane / 4;
  int first = unit_of(warp) * SPAN + along * 8;
  unsigned weights = first * 2;
  // With fewer than four rows the columns left over repeat the last row; nobody reads their sums.
  unsigned column = room + (min(across / 2, N - 1) * Room<N>::ROW + first + across % 2 * 2) * 2;
  unsigned sums = room + sums_at<N>(buffer, warp, min(along, N - 1)) + across * 4;
  unsigned x[PARTS][MOST_UNITS][2];
#pragma unroll
  for (int p = 0; p < PARTS; p++)
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++)
      if (has_unit(me, u)) {
        x[p][u][0] = get4(column + (p * C + u * SPAN) * 2);
        x[p][u][1] = get4(column + (p * C + u * SPAN + 4) * 2);
      }
#pragma unroll 1
  for (int tile = 0; tile < outputs; tile += TILE) {
    float d[2][4] = {};
    int row = min(across, outputs - tile - 1);
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      ring.wait_full(at);
      unsigned w = ring.slot(at, row) + weights;
#pragma unroll
      for (int u = 0; u < MOST_UNITS; u++)
        if (has_unit(me, u)) {
          uint4 a = get16(w + u * SPAN * 2);
          mma<elem_t>(d[u % 2], {a.x, a.y, a.z, a.w}, x[p][u][0], x[p][u][1]);
        }
      __syncwarp();
      if (lane == 0) ring.release(at);
      at.next();
    }
    if (along < N) put_float(sums + tile * 4, (d[0][0] + d[1][0]) + (d[0][3] + d[1][3]));
  }
}

// Thread i writes output i % GROUP of row i / GROUP.
template <int N>
__device__ inline bool writes(int me, int count) {
  return me < N * GROUP && me % GROUP < count;
}
template <int N>
__device__ inline float sum_of_warps(int me, unsigned room, int buffer) {
  float sums[CONSUMERS];
#pragma unroll
  for (int w = 0; w < CONSUMERS; w++)
    sums[w] = get_float(room + sums_at<N>(buffer, w, 0) + me * 4);  // me = n GROUP + output
  return sum_of(sums);
}

// One product and what is done with its outputs, after x has been taken.
template <int N, int PARTS, typename bias_t, typename use_t>
__device__ inline void product(const Weights<N>& ring,
                               At<N>& at,
                               int& buffer,
                               unsigned room,
                               Share rows,
                               const bias_t* bias,
                               use_t use) {
#pragma unroll 1
  for (int turn = 0; turn < rows.count; turn += GROUP) {
    int me = anew(threadIdx.x), count = min(GROUP, rows.count - turn);
    int m = rows.first + turn + me % GROUP;
    float own_bias = addend(bias, m, writes<N>(me, count));
    multiply<N, PARTS>(me, ring, at, count, room, buffer);
    sync_consumers();
    if (writes<N>(me, count)) use(me / GROUP, m, sum_of_warps<N>(me, room, buffer) + own_bias);
    buffer ^= 1;
  }
}

#endif
