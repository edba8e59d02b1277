// Attention of one new token a sequence over its cache, on tensor cores.
//
//   out[b, h] = softmax(scale * q[b, h] . k[b, s, g]) v[b, s, g]     s < lengths[b]
//
// Shapes    as in decode_attention.cu, which takes float and older chips; g = h / (NH / NKV)
// Dtypes    ELEM is fp16 or bf16; scores, sums and states are kept in float
// Bytes     2 lengths[b] NKV HS sizeof ELEM a sequence: query heads that share keys share one read
// FLOPs     4 lengths[b] NH HS a sequence
// Work      a block for a key head, a part of the keys and a sequence. The up to 16 query heads
//           that share keys are the rows of the left operand of mma.m16n8k16. Each warp has a
//           pipeline of its own: STAGES tiles of KEYS keys and values in shared memory, filled by
//           cp.async. Copies in flight take no registers, so the memory stays busy while the warp
//           multiplies. The states of the warps are merged in shared memory, those of blocks by
//           decode_attention_merge.cu.
//
// Needs sm_80 (mma.m16n8k16, cp.async). Head sizes that are no multiple of 16 have zeros behind
// them in shared memory.
#include "decode_attention.cuh"
#include "mma.cuh"

constexpr int STAGES = 3;
constexpr int KEYS = HS <= 64 ? 32 : 16;  // of a tile
constexpr int MOST_HEADS = 16;            // query heads of a block
constexpr int STEPS = (HS + 15) / 16;
constexpr int ROW_UNITS = STEPS * 2;  // copies of a row, with padding
// Elements of a row: those of PITCH<ROW_UNITS> in mma.cuh.
constexpr int LINE = (ROW_UNITS & (ROW_UNITS - 1)) == 0 ? ROW_UNITS * 8 : ROW_UNITS * 8 + 8;
constexpr int STAGE_BYTES = 2 * KEYS * LINE * 2;  // of a warp
// Of the state of a warp, which later lies in the place of its tiles.
constexpr int STATE_BYTES = MOST_HEADS * (HS + 2) * 4;

#if __CUDA_ARCH__ >= 800

static_assert(LINE == PITCH<ROW_UNITS>, "rows are laid out by swizzled()");

struct WarpState {
  float m[MOST_HEADS], l[MOST_HEADS], o[MOST_HEADS][HS];
};
static_assert(STATE_BYTES == sizeof(WarpState), "the launch asks for so much");

extern "C" __global__ void __launch_bounds__(MOST_WARPS* WARP)
    decode_attention_mma(const elem_t* q,
                         const elem_t* k_cache,
                         const elem_t* v_cache,
                         const int* lengths,
                         elem_t* out,
                         float* states,
                         float scale,
                         int T,
                         int NH,
                         int NKV,
                         int q_stride_B,
                         int q_stride_NH,
                         int k_cache_stride_B,
                         int k_cache_stride_T,
                         int k_cache_stride_NKV,
                         int v_cache_stride_B,
                         int v_cache_stride_T,
                         int v_cache_stride_NKV,
                         int out_stride_B,
                         int out_stride_NH) {
  Strides of_q = {q_stride_B, 0, q_stride_NH}, of_out = {out_stride_B, 0, out_stride_NH};
  Strides of_k = {k_cache_stride_B, k_cache_stride_T, k_cache_stride_NKV};
  Strides of_v = {v_cache_stride_B, v_cache_stride_T, v_cache_stride_NKV};
  extern __shared__ __align__(128) unsigned char memory[];
  constexpr int WARP_BYTES =
      STAGES * STAGE_BYTES > STATE_BYTES ? STAGES * STAGE_BYTES : (STATE_BYTES + 127) / 128 * 128;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment
  Part part = part_of<MOST_HEADS>(lengths, T, NH, NKV, KEYS);
  elem_t* own = reinterpret_cast<elem_t*>(memory + warp * WARP_BYTES);
  constexpr int TO_VALUES = KEYS * LINE, STAGE = 2 * KEYS * LINE;

  // Past the end zeros are stored, for a weight of zero would not hide a NaN.
  const elem_t *from_k = k_cache + of_k.at(part.batch, 0, part.kv),
               *from_v = v_cache + of_v.at(part.batch, 0, part.kv);
  auto fetch = [&](int t0, int stage) {
    elem_t* to = own + stage * STAGE;
#pragma unroll
    for (int i = lane; i < KEYS * ROW_UNITS; i += WARP) {
      int row = i / ROW_UNITS, unit = i % ROW_UNITS, at = swizzled<ROW_UNITS>(row, unit);
      bool there = t0 + row < part.end && unit * 8 < HS;
      cp_async_or_zero(shared_address(to + at), from_k + (size_t)of_k.token * (t0 + row) + unit * 8,
                       there);
      cp_async_or_zero(shared_address(to + at + TO_VALUES),
                       from_v + (size_t)of_v.token * (t0 + row) + unit * 8, there);
    }
  };
  int first = part.begin + warp * KEYS, stride = warps * KEYS;
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    if (first + s * stride < part.end) fetch(first + s * stride, s);
    cp_async_commit();
  }

  // Heads that there are not have the queries of the last.
  unsigned query[STEPS][4];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const elem_t* row =
        q + of_q.at(part.batch, 0, part.head + min(across + half * 8, part.heads - 1));
#pragma unroll
    for (int c = 0; c < STEPS; c++) {
      query[c][half] = *reinterpret_cast<const unsigned*>(row + c * 16 + along * 2);
      query[c][half + 2] =
          c * 16 + 8 < HS ? *reinterpret_cast<const unsigned*>(row + c * 16 + 8 + along * 2) : 0;
    }
  }

  float o[ROW_UNITS][4] = {}, m[2] = {LOWEST, LOWEST}, l[2] = {};
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  int stage = 0;
#pragma unroll 1
  for (int t0 = first; t0 < part.end; t0 += stride) {
    const elem_t *keys = own + stage * STAGE, *values = keys + TO_VALUES;
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    float scores[KEYS / 8][4] = {};
#pragma unroll
    for (int c = 0; c < STEPS; c++)
#pragma unroll
      for (int j = 0; j < KEYS / 16; j++) {
        unsigned b[4];  // channels 0 to 7 and 8 to 15 of eight keys, then of the next eight
        ldmatrix(
            b, keys + swizzled<ROW_UNITS>(j * 16 + lane / 16 * 8 + lane % 8, c * 2 + lane / 8 % 2));
        mma<elem_t>(scores[j * 2], query[c], b[0], b[1]);
        mma<elem_t>(scores[j * 2 + 1], query[c], b[2], b[3]);
      }

    float weights[2][KEYS / 4];  // of heads `across` and `across + 8`
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int i = 0; i < KEYS / 4; i++)
        weights[half][i] = t0 + i / 2 * 8 + along * 2 + i % 2 < part.end
                               ? scores[i / 2][half * 2 + i % 2] * factor
                               : MINUS_INFINITY;
      float old = add_scores(weights[half], m[half], l[half]);
#pragma unroll
      for (int n = 0; n < ROW_UNITS; n++) {
        o[n][half * 2] *= old;
        o[n][half * 2 + 1] *= old;
      }
    }
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
      unsigned a[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[i] = packed<elem_t>(weights[i % 2][j * 4 + i / 2 * 2],
                              weights[i % 2][j * 4 + i / 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < ROW_UNITS; n += 2) {
        unsigned b[4];  // keys 0 to 7 and 8 to 15 of eight channels, then of the next eight
        ldmatrix_trans(b, values + swizzled<ROW_UNITS>(j * 16 + lane % 16, n + lane / 16));
        mma<elem_t>(o[n], a, b[0], b[1]);
        mma<elem_t>(o[n + 1], a, b[2], b[3]);
      }
    }
    __syncwarp();
    int next = t0 + STAGES * stride;
    if (next < part.end) fetch(next, stage);
    cp_async_commit();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  cp_async_wait<0>();
  __syncwarp();

  WarpState& state = *reinterpret_cast<WarpState*>(own);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    l[half] = warp_sum<4>(l[half]);
    int row = across + half * 8;
    if (along == 0) {
      state.m[row] = m[half];
      state.l[row] = l[half];
    }
#pragma unroll
    for (int n = 0; n < ROW_UNITS; n++)
      if (n * 8 < HS) {
        float pair[2] = {o[n][half * 2], o[n][half * 2 + 1]};
        store_floats(&state.o[row][n * 8 + along * 2], pair);
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < part.heads * HS; i += blockDim.x) {
    int head = i / HS, channel = i % HS;
    float ms[MOST_WARPS], ls[MOST_WARPS], os[MOST_WARPS], merged_m, merged_l, merged_o;
#pragma unroll
    for (int w = 0; w < MOST_WARPS; w++) {
      const WarpState& theirs =
          *reinterpret_cast<const WarpState*>(memory + min(w, warps - 1) * WARP_BYTES);
      ms[w] = w < warps ? theirs.m[head] : LOWEST;
      ls[w] = w < warps ? theirs.l[head] : 0.0f;
      os[w] = w < warps ? theirs.o[head][channel] : 0.0f;
    }
    merge(ms, ls, os, merged_m, merged_l, merged_o);
    store_state(part, part.head + head, channel, merged_m, merged_l, merged_o, out, states, of_out,
                NH);
  }
}

#endif
