// Attention of one new token a sequence over its cache, on any chip.
//
//   out[b, h] = softmax(scale * q[b, h] . k[b, s, g]) v[b, s, g]     s < lengths[b]
//
// Shapes    q, out [B, NH, HS]; k, v [B, T, NKV, HS], each with strides of its own between
//           sequences, tokens and heads; NKV divides NH, and g = h / (NH / NKV) is the key head of
//           query head h. lengths [B] int, the rest ELEM. A sequence without keys gives zeros.
//           states [B, NH, splits, HS + 2] float: o, m and l of each part of the keys
// Bytes     2 lengths[b] NKV HS sizeof ELEM a sequence: up to HEADS query heads that share keys
//           share one read
// FLOPs     4 lengths[b] NH HS a sequence
// Work      a block for a key head, a part of the keys and a sequence. Each warp has a pipeline of
//           its own: two tiles of KEYS keys and values in shared memory, filled by cp.async. Four
//           lanes share a key; then each lane has some channels of the values. The states of the
//           warps are merged in shared memory, those of blocks by decode_attention_merge.cu.
// Source    Dao et al., "Flash-Decoding for long-context inference", 2023
//
// Entries   decode_attention_h1, _h2, _h4, _h8  for HEADS query heads of a block; those beyond them
//                                               are zero, so that the loop over heads has a known
//                                               length and overlaps
#include "decode_attention.cuh"

constexpr int KEYS = 8;  // of a tile
constexpr int STAGES = 2;
// Bytes of a row of shared memory, of elements of BYTES bytes: two neighbours are read at a time,
// by eight lanes, and 64 bytes keep their banks apart.
template <int BYTES>
constexpr int ROW_BYTES = HS * BYTES % 128 == 0 ? HS * BYTES + 64 : HS * BYTES;
template <int BYTES>
constexpr int WARP_BYTES = STAGES * 2 * KEYS * ROW_BYTES<BYTES>;
// Of the state of a warp, which later lies in the place of its tiles, if they are larger.
template <int HEADS>
constexpr int STATE_BYTES = HEADS * (HS + 2) * 4;

constexpr int PITCH = ROW_BYTES<sizeof(elem_t)> / sizeof(elem_t);  // elements
constexpr int VEC = WIDEST<elem_t>;
constexpr int UNITS = HS / VEC;                       // copies of a row
constexpr int PER_LANE = (UNITS + 3) / 4;             // of a key, for each of four lanes
constexpr int OWN = HS > 64 ? 4 : (HS > 32 ? 2 : 1);  // channels of the output of a lane

template <int HEADS>
struct WarpState {
  float m[HEADS], l[HEADS], o[HEADS][HS];
};
static_assert(STATE_BYTES<8> == sizeof(WarpState<8>), "the launch asks for so much");

template <int HEADS>
__device__ inline void attend(const elem_t* q,
                              const elem_t* k,
                              const elem_t* v,
                              const int* lengths,
                              elem_t* out,
                              float* states,
                              float scale,
                              int T,
                              int NH,
                              int NKV,
                              Strides of_q,
                              Strides of_k,
                              Strides of_v,
                              Strides of_out) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ float queries[HEADS][HS];
  constexpr int STATE = STATE_BYTES<HEADS>, TILES = WARP_BYTES<sizeof(elem_t)>;
  constexpr int BYTES = TILES > STATE ? TILES : (STATE + 127) / 128 * 128;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  Part part = part_of<HEADS>(lengths, T, NH, NKV, KEYS);
  elem_t* own = reinterpret_cast<elem_t*>(memory + warp * BYTES);
  const elem_t *from_k = k + of_k.at(part.batch, 0, part.kv),
               *from_v = v + of_v.at(part.batch, 0, part.kv);
  constexpr int TO_VALUES = KEYS * PITCH, STAGE = 2 * KEYS * PITCH;

  // Tokens past the end are not copied, nor read.
  auto fetch = [&](int t0, int stage) {
#pragma unroll
    for (int i = lane; i < KEYS * UNITS; i += WARP) {
      int row = i / UNITS, unit = i % UNITS;
      if (t0 + row >= part.end) continue;
      elem_t* to = own + stage * STAGE + row * PITCH + unit * VEC;
      cp_async(to, from_k + (size_t)of_k.token * (t0 + row) + unit * VEC);
      cp_async(to + TO_VALUES, from_v + (size_t)of_v.token * (t0 + row) + unit * VEC);
    }
  };
  int first = part.begin + warp * KEYS, stride = warps * KEYS;
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    if (first + s * stride < part.end) fetch(first + s * stride, s);
    cp_async_commit();
  }
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  for (int i = threadIdx.x; i < HEADS * HS; i += blockDim.x) {
    int h = i / HS, channel = i % HS;
    queries[h][channel] =
        h < part.heads ? to_float(q[of_q.at(part.batch, 0, part.head + h) + channel]) : 0.0f;
  }
  __syncthreads();

  float o[HEADS][OWN] = {}, m[HEADS], l[HEADS] = {};
#pragma unroll
  for (int h = 0; h < HEADS; h++) m[h] = LOWEST;
  int key = lane / 4, quarter = lane % 4, stage = 0;
#pragma unroll 1
  for (int t0 = first; t0 < part.end; t0 += stride) {
    const elem_t *keys = own + stage * STAGE, *values = keys + TO_VALUES;
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    int there = min(KEYS, part.end - t0);
    float scores[HEADS] = {};
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
      int unit = i * 4 + quarter;
      if (unit >= UNITS) break;
      float of_key[VEC];
      load_floats(keys + min(key, there - 1) * PITCH + unit * VEC, of_key);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float* query = &queries[h][unit * VEC];
        float products[VEC];
#pragma unroll
        for (int c = 0; c < VEC; c++) products[c] = of_key[c] * query[c];
        scores[h] += sum_of(products);
      }
    }
    float olds[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      float score = warp_sum<4>(scores[h]) * factor;
      score = key < there ? score : MINUS_INFINITY;
      float common = fmaxf(m[h], score);
#pragma unroll
      for (int offset = 4; offset < WARP; offset *= 2)
        common = fmaxf(common, __shfl_xor_sync(FULL_MASK, common, offset));
      olds[h] = power_of_two(m[h] - common);
      m[h] = common;
      scores[h] = power_of_two(score - common);
      l[h] = l[h] * olds[h] + scores[h];  // of this lane's keys alone
#pragma unroll
      for (int c = 0; c < OWN; c++) o[h][c] *= olds[h];
    }
    auto add = [&](int t) {
      float value[OWN] = {};
      if (lane * OWN < HS) load_floats(values + t * PITCH + lane * OWN, value);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        float weight = __shfl_sync(FULL_MASK, scores[h], t * 4);
#pragma unroll
        for (int c = 0; c < OWN; c++) o[h][c] = fmaf(weight, value[c], o[h][c]);
      }
    };
    if (there == KEYS) {
#pragma unroll
      for (int t = 0; t < KEYS; t++) add(t);
    } else {
#pragma unroll 1
      for (int t = 0; t < there; t++) add(t);
    }
    __syncwarp();
    int next = t0 + STAGES * stride;
    if (next < part.end) fetch(next, stage);
    cp_async_commit();
    stage ^= 1;
  }
  cp_async_wait<0>();
  __syncwarp();

  WarpState<HEADS>& state = *reinterpret_cast<WarpState<HEADS>*>(own);
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    // The four lanes of a key have the same weight.
    float sum = quarter == 0 ? l[h] : 0.0f;
    sum = warp_sum(sum);
    if (lane == 0) {
      state.m[h] = m[h];
      state.l[h] = sum;
    }
#pragma unroll
    for (int c = 0; c < OWN; c++)
      if (lane * OWN + c < HS) state.o[h][lane * OWN + c] = o[h][c];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < part.heads * HS; i += blockDim.x) {
    int head = i / HS, channel = i % HS;
    float ms[MOST_WARPS], ls[MOST_WARPS], os[MOST_WARPS], merged_m, merged_l, merged_o;
#pragma unroll
    for (int w = 0; w < MOST_WARPS; w++) {
      const WarpState<HEADS>& theirs =
          *reinterpret_cast<const WarpState<HEADS>*>(memory + min(w, warps - 1) * BYTES);
      ms[w] = w < warps ? theirs.m[head] : LOWEST;
      ls[w] = w < warps ? theirs.l[head] : 0.0f;
      os[w] = w < warps ? theirs.o[head][channel] : 0.0f;
    }
    merge(ms, ls, os, merged_m, merged_l, merged_o);
    store_state(part, part.head + head, channel, merged_m, merged_l, merged_o, out, states, of_out,
                NH);
  }
}

#define DECODE_ENTRY(name, heads)                                                                \
  extern "C" __global__ void __launch_bounds__(MOST_WARPS* WARP)                                 \
      name(const elem_t* q, const elem_t* k_cache, const elem_t* v_cache, const int* lengths,    \
           elem_t* out, float* states, float scale, int T, int NH, int NKV, int q_stride_B,      \
           int q_stride_NH, int k_cache_stride_B, int k_cache_stride_T, int k_cache_stride_NKV,  \
           int v_cache_stride_B, int v_cache_stride_T, int v_cache_stride_NKV, int out_stride_B, \
           int out_stride_NH) {                                                                  \
    attend<heads>(q, k_cache, v_cache, lengths, out, states, scale, T, NH, NKV,                  \
                  {q_stride_B, 0, q_stride_NH},                                                  \
                  {k_cache_stride_B, k_cache_stride_T, k_cache_stride_NKV},                      \
                  {v_cache_stride_B, v_cache_stride_T, v_cache_stride_NKV},                      \
                  {out_stride_B, 0, out_stride_NH});                                             \
  }

DECODE_ENTRY(decode_attention_h1, 1)
DECODE_ENTRY(decode_attention_h2, 2)
DECODE_ENTRY(decode_attention_h4, 4)
DECODE_ENTRY(decode_attention_h8, 8)
