// Attention of many queries, on any chip.
//
//   out[b, t, h] = softmax(scale * q[b, t, h] . k[b, s, g]) v[b, s, g]     over the visible keys s
//
// Shapes    q, out [B, T, NH, HS]; k, v [B, S, NKV, HS], each with strides of its own between
//           sequences, tokens and heads; NKV divides NH, and g = h / (NH / NKV) is the key head of
//           query head h. lengths [B] or null: keys of each sequence, else S. With `causal` query t
//           sees the keys up to offsets[b] + t, or offset + t where offsets is null. All ELEM but
//           lengths and offsets, which are int. A query that sees no key gives zeros.
// Bytes     (2 T NH + 2 S NKV) B HS sizeof ELEM at the least; each tile of queries reads the keys
//           again, from L2
// FLOPs     4 HS per query, head and visible key
// Work      a block for each tile of BR queries; tiles of BC keys pass through shared memory.
//           16 x 16 threads have the scores and the output as small squares in registers. No T x S
//           matrix exists: the softmax is online.
// Source    Dao et al., "FlashAttention", 2022; Milakov, Gimelshein, 2018
//
// The ladder
//   attention        one multiplication after the other, in float
//   attention_mma    on tensor cores, sm_80 and newer (attention_mma.cu)
//   attention_wgmma  on those of sm_90, by warpgroups: fp16 and bf16 (attention_wgmma.cu)
//   attention_split  likewise fp32 (attention_split.cu)
#include "attention_tensors.cuh"
#include "softmax_state.cuh"

constexpr int SIDE = 16;                     // threads of a block: SIDE x SIDE
constexpr int BR = HS <= 64 ? 64 : 32;       // queries of a block
constexpr int BC = HS <= 64 ? 32 : 16;       // keys of a tile
constexpr int RPT = BR / SIDE;               // query rows of a thread
constexpr int CPT = BC / SIDE;               // key columns of a thread
constexpr int DPT = (HS + SIDE - 1) / SIDE;  // output channels of a thread
constexpr int SPAN = 32;                     // products of a score that are summed together

extern "C" __global__ void __launch_bounds__(SIDE* SIDE) attention(const elem_t* q,
                                                                   const elem_t* k,
                                                                   const elem_t* v,
                                                                   const int* lengths,
                                                                   const int* offsets,
                                                                   elem_t* out,
                                                                   float scale,
                                                                   int causal,
                                                                   int offset,
                                                                   int together,
                                                                   int B,
                                                                   int T,
                                                                   int S,
                                                                   int NH,
                                                                   int NKV,
                                                                   int q_stride_B,
                                                                   int q_stride_T,
                                                                   int q_stride_NH,
                                                                   int k_stride_B,
                                                                   int k_stride_S,
                                                                   int k_stride_NKV,
                                                                   int v_stride_B,
                                                                   int v_stride_S,
                                                                   int v_stride_NKV,
                                                                   int out_stride_B,
                                                                   int out_stride_T,
                                                                   int out_stride_NH) {
  Item item = item_of(blockIdx.x, (T + BR - 1) / BR, B * NH, NH, together);
  int first = item.tile * BR, rows = min(BR, T - first), kv = item.head / (NH / NKV);
  Visible visible = visible_of(lengths, offsets, offset, causal, item.batch, T, S);
  int end = visible.end(first + rows - 1);
  q += Strides{q_stride_B, q_stride_T, q_stride_NH}.at(item.batch, first, item.head);
  k += Strides{k_stride_B, k_stride_S, k_stride_NKV}.at(item.batch, 0, kv);
  v += Strides{v_stride_B, v_stride_S, v_stride_NKV}.at(item.batch, 0, kv);
  out += Strides{out_stride_B, out_stride_T, out_stride_NH}.at(item.batch, first, item.head);

  __shared__ float Q[BR][HS + 1], K[BC][HS + 1], V[BC][HS], P[BR][BC + 1];
  int tid = threadIdx.x, ty = tid / SIDE, tx = tid % SIDE;
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  for (int i = tid; i < rows * HS; i += SIDE * SIDE)
    Q[i / HS][i % HS] = to_float(q[(size_t)(i / HS) * q_stride_T + i % HS]);

  float o[RPT][DPT] = {}, m[RPT], l[RPT] = {};
#pragma unroll
  for (int i = 0; i < RPT; i++) m[i] = MINUS_INFINITY;
  for (int t0 = 0; t0 < end; t0 += BC) {
    __syncthreads();
    for (int i = tid; i < BC * HS; i += SIDE * SIDE) {
      int r = i / HS, c = i % HS, t = min(t0 + r, end - 1);
      K[r][c] = to_float(k[(size_t)t * k_stride_S + c]);
      V[r][c] = to_float(v[(size_t)t * v_stride_S + c]);
    }
    __syncthreads();

    // A sum of every SPAN products, and then of sums: rounding errors grow less.
    float scores[RPT][CPT] = {};
    for (int begin = 0; begin < HS; begin += SPAN) {
      float of_span[RPT][CPT] = {};
#pragma unroll 4  // with more, registers spill
      for (int c = begin; c < min(begin + SPAN, HS); c++) {
        float query[RPT], key[CPT];
#pragma unroll
        for (int i = 0; i < RPT; i++) query[i] = Q[min(ty * RPT + i, rows - 1)][c];
#pragma unroll
        for (int j = 0; j < CPT; j++) key[j] = K[tx + j * SIDE][c];
#pragma unroll
        for (int i = 0; i < RPT; i++)
#pragma unroll
          for (int j = 0; j < CPT; j++) of_span[i][j] = fmaf(query[i], key[j], of_span[i][j]);
      }
#pragma unroll
      for (int i = 0; i < RPT; i++)
#pragma unroll
        for (int j = 0; j < CPT; j++) scores[i][j] += of_span[i][j];
    }

#pragma unroll
    for (int i = 0; i < RPT; i++) {
      int last = visible.end(first + min(ty * RPT + i, rows - 1));
      float larger = MINUS_INFINITY;
#pragma unroll
      for (int j = 0; j < CPT; j++) {
        if (t0 + tx + j * SIDE >= last) scores[i][j] = MINUS_INFINITY;
        larger = fmaxf(larger, scores[i][j]);
      }
      larger = fmaxf(m[i], warp_max<SIDE>(larger));
      // A query may see none of the keys: its maximum is then minus infinity.
      float base = larger == MINUS_INFINITY ? 0.0f : __fmul_rn(larger, factor);
      float old = power_of_two(__fmul_rn(m[i], factor) - base), sum = 0.0f;
      m[i] = larger;
#pragma unroll
      for (int j = 0; j < CPT; j++) {
        float weight = power_of_two(fmaf(scores[i][j], factor, -base));
        sum += weight;
        P[ty * RPT + i][tx + j * SIDE] = weight;
      }
      l[i] = fmaf(l[i], old, warp_sum<SIDE>(sum));
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
    float share = l[i] > 0.0f ? 1.0f / l[i] : 0.0f;
#pragma unroll
    for (int d = 0; d < DPT; d++)
      if (tx + d * SIDE < HS)
        out[(size_t)r * out_stride_T + tx + d * SIDE] = from_float<elem_t>(o[i][d] * share);
  }
}
