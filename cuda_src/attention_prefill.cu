// Causal attention of many new tokens per sequence, extending the cache in the same launch.
//
//   out[n, h] = softmax(scale * q[n, h] . K[0..p]) V[0..p]      p = past + n, position of token n
//
// Shapes    qkv [N, 3C] rows of [q | k | v], the tokens of R sequences packed one after another:
//           sequence r owns rows starts[r] .. starts[r + 1] - 1 and follows past[r] cached tokens.
//           K, V [S, NH, T, HS]; out [N, C]. All ELEM. Keys and values of the new tokens are
//           written to the cache here; within this launch they are read from qkv, since the block
//           that writes them may not have run yet.
// Bytes     N 4C sizeof ELEM at the least; each query tile reads the keys before it again, from L2
// FLOPs     4 HS per query, head and visible key
// Work      one block per (tile of BR queries, head, sequence); tiles of BC keys pass through
//           shared memory. 16 x 16 threads have the scores and the output as small squares in
//           registers. No T x T matrix exists: the softmax is online, as in attention_decode.cu.
// Source    Dao et al., "FlashAttention", 2022; Milakov, Gimelshein, 2018
//
// The order of a query's sums depends on the absolute positions of the keys alone, as in
// attention_prefill_mma.cu: not on the pieces of its prompt, nor on its place in the tile.
//
// The ladder
//   attention_naive     one warp per query and head, keys one after another: the formula
//   attention_prefill   tiles in shared memory
#include "attention_head.cuh"

constexpr int SIDE = 16;                     // threads of a block: SIDE x SIDE
constexpr int BR = HS <= 64 ? 64 : 32;       // queries of a block
constexpr int BC = HS <= 64 ? 32 : 16;       // keys of a tile
constexpr int RPT = BR / SIDE;               // query rows of a thread
constexpr int CPT = BC / SIDE;               // key columns of a thread
constexpr int DPT = (HS + SIDE - 1) / SIDE;  // output channels of a thread
constexpr int SPAN = 32;                     // products of a score that are summed together

// Where the key or value of position t lies: in the cache, or in qkv if the token is new. `cached`
// is the head's k or v, `to_new` its to_k or to_v.
__device__ inline const elem_t* key_or_value(const Head& head,
                                             const elem_t* cached,
                                             int to_new,
                                             int t) {
  return t < head.past ? cached + (size_t)t * HS
                       : head.q + (size_t)((t - head.past) * head.qkv_heads + to_new) * HS;
}

__device__ inline float half_warp_max(float x) { return warp_max<SIDE>(x); }
__device__ inline float half_warp_sum(float x) { return warp_sum<SIDE>(x); }

extern "C" __global__ void __launch_bounds__(SIDE* SIDE) attention_prefill(const elem_t* qkv,
                                                                           elem_t* k,
                                                                           elem_t* v,
                                                                           const int* starts,
                                                                           const int* slots,
                                                                           const int* past_tokens,
                                                                           elem_t* out,
                                                                           float scale,
                                                                           int NH,
                                                                           int T) {
  Head head =
      prefill_head(qkv, k, v, starts, slots, past_tokens, out, blockIdx.y, blockIdx.z, NH, T);
  // Later tiles have more keys: start them first.
  int first = (gridDim.x - 1 - blockIdx.x) * BR;
  if (first >= head.count) return;
  int rows = min(BR, head.count - first), past = head.past;

  __shared__ float Q[BR][HS + 1], K[BC][HS + 1], V[BC][HS], P[BR][BC + 1];
  int tid = threadIdx.x, ty = tid / SIDE, tx = tid % SIDE;

  for (int i = tid; i < rows * HS; i += SIDE * SIDE) {
    int r = i / HS, c = i % HS, t = past + first + r;
    const elem_t* token = head.q + (size_t)((first + r) * head.qkv_heads) * HS + c;
    Q[r][c] = to_float(*token) * scale;
    if (t < T) {
      head.k[(size_t)t * HS + c] = token[(size_t)head.to_k * HS];
      head.v[(size_t)t * HS + c] = token[(size_t)head.to_v * HS];
    }
  }

  float o[RPT][DPT] = {}, m[RPT], l[RPT] = {};
#pragma unroll
  for (int i = 0; i < RPT; i++) m[i] = MINUS_INFINITY;

  int keys = past + first + rows;  // one past the last key that any query of the tile sees
  for (int t0 = 0; t0 < keys; t0 += BC) {
    __syncthreads();
    for (int i = tid; i < BC * HS; i += SIDE * SIDE) {
      int r = i / HS, c = i % HS, t = min(t0 + r, keys - 1);
      K[r][c] = to_float(key_or_value(head, head.k, head.to_k, t)[c]);
      V[r][c] = to_float(key_or_value(head, head.v, head.to_v, t)[c]);
    }
    __syncthreads();

    // A sum of every SPAN products, and then of sums: rounding errors grow less.
    float scores[RPT][CPT] = {};
    for (int begin = 0; begin < HS; begin += SPAN) {
      float of_span[RPT][CPT] = {};
#pragma unroll 4  // with more, registers spill
      for (int c = begin; c < min(begin + SPAN, HS); c++) {
        float q[RPT], key[CPT];
#pragma unroll
        for (int i = 0; i < RPT; i++) q[i] = Q[min(ty * RPT + i, rows - 1)][c];
#pragma unroll
        for (int j = 0; j < CPT; j++) key[j] = K[tx + j * SIDE][c];
#pragma unroll
        for (int i = 0; i < RPT; i++)
#pragma unroll
          for (int j = 0; j < CPT; j++) of_span[i][j] = fmaf(q[i], key[j], of_span[i][j]);
      }
#pragma unroll
      for (int i = 0; i < RPT; i++)
#pragma unroll
        for (int j = 0; j < CPT; j++) scores[i][j] += of_span[i][j];
    }

#pragma unroll
    for (int i = 0; i < RPT; i++) {
      // Every query sees key 0, so after the first tile the maximum is a number.
      int last = past + first + min(ty * RPT + i, rows - 1);
      float larger = MINUS_INFINITY;
#pragma unroll
      for (int j = 0; j < CPT; j++) {
        if (t0 + tx + j * SIDE > last) scores[i][j] = MINUS_INFINITY;
        larger = fmaxf(larger, scores[i][j]);
      }
      larger = fmaxf(m[i], half_warp_max(larger));
      float old = expf(m[i] - larger), tile_sum = 0.0f;
      m[i] = larger;
#pragma unroll
      for (int j = 0; j < CPT; j++) {
        float weight = expf(scores[i][j] - larger);
        tile_sum += weight;
        P[ty * RPT + i][tx + j * SIDE] = weight;
      }
      l[i] = fmaf(l[i], old, half_warp_sum(tile_sum));
#pragma unroll
      for (int d = 0; d < DPT; d++) o[i][d] *= old;
    }
    __syncthreads();

    // Likewise of each tile, and then of tiles.
    float of_tile[RPT][DPT] = {};
    for (int j = 0; j < BC; j++) {
      float value[DPT];
#pragma unroll
      for (int d = 0; d < DPT; d++) value[d] = tx + d * SIDE < HS ? V[j][tx + d * SIDE] : 0.0f;
#pragma unroll
      for (int i = 0; i < RPT; i++) {
        float weight = P[ty * RPT + i][j];
#pragma unroll
        for (int d = 0; d < DPT; d++) of_tile[i][d] = fmaf(weight, value[d], of_tile[i][d]);
      }
    }
#pragma unroll
    for (int i = 0; i < RPT; i++)
#pragma unroll
      for (int d = 0; d < DPT; d++) o[i][d] += of_tile[i][d];
  }

#pragma unroll
  for (int i = 0; i < RPT; i++) {
    int r = ty * RPT + i;
    if (r >= rows) continue;
#pragma unroll
    for (int d = 0; d < DPT; d++) {
      int c = tx + d * SIDE;
      if (c < HS)
        head.out[(first + r) * head.out_heads * HS + c] = from_float<elem_t>(o[i][d] / l[i]);
    }
  }
}

extern "C" __global__ void attention_naive(const elem_t* qkv,
                                           elem_t* k,
                                           elem_t* v,
                                           const int* starts,
                                           const int* slots,
                                           const int* past_tokens,
                                           elem_t* out,
                                           float scale,
                                           int NH,
                                           int T) {
  int token = blockIdx.x, lane = threadIdx.x;
  Head head =
      prefill_head(qkv, k, v, starts, slots, past_tokens, out, blockIdx.y, blockIdx.z, NH, T);
  if (token >= head.count) return;
  size_t from = (size_t)(token * head.qkv_heads) * HS, to = (size_t)(head.past + token) * HS;
  for (int c = lane; c < HS; c += WARP) {
    head.k[to + c] = head.new_k[from + c];
    head.v[to + c] = head.new_v[from + c];
  }
  constexpr int PER_LANE = (HS + WARP - 1) / WARP;
  float m = MINUS_INFINITY, l = 0.0f, o[PER_LANE] = {};
  for (int t = 0; t <= head.past + token; t++) {
    const elem_t* key = key_or_value(head, head.k, head.to_k, t);
    const elem_t* value = key_or_value(head, head.v, head.to_v, t);
    float score = 0.0f;
    for (int c = lane; c < HS; c += WARP) score += to_float(head.q[from + c]) * to_float(key[c]);
    score = warp_sum(score) * scale;
    float larger = fmaxf(m, score);
    float old = expf(m - larger), weight = expf(score - larger);
    m = larger;
    l = l * old + weight;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
      if (lane + i * WARP < HS) o[i] = o[i] * old + weight * to_float(value[lane + i * WARP]);
  }
#pragma unroll
  for (int i = 0; i < PER_LANE; i++)
    if (lane + i * WARP < HS)
      head.out[token * head.out_heads * HS + lane + i * WARP] = from_float<elem_t>(o[i] / l);
}
