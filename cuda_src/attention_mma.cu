// Attention of many queries, on tensor cores by mma.sync.
//
//   out[b, t, h] = softmax(scale * q[b, t, h] . k[b, s, g]) v[b, s, g]     over the visible keys s
//
// Shapes    as in attention.cu; g = h / (NH / NKV)
// Dtypes    ELEM; scores, sums and output are kept in float. A product of float is six of bf16
//           (split.cuh), of BC keys or HS channels in a tensor core's sum: that is then added in
//           fp32, for a tensor core truncates
// Bytes     (2 T NH + 2 S NKV) B HS sizeof ELEM at the least; each tile of queries reads the keys
//           again, from L2
// FLOPs     4 HS per query, head and visible key; six times as many for float
// Work      a block for each tile of BR queries, 16 a warp. Tiles of keys and values pass through
//           shared memory: fp16 and bf16 by cp.async, one tile ahead; float is split on its way.
// Source    Dao, "FlashAttention-2", 2023
//
// Needs sm_80 (mma.m16n8k16, cp.async). Head sizes that are no multiple of 16 have zeros behind
// them in shared memory.
#include "attention_tensors.cuh"
#include "softmax_state.cuh"
#include "split.cuh"

constexpr int WARPS = 4;
constexpr int BR = WARPS * 16;  // queries of a block
constexpr int THREADS = WARPS * 32;
constexpr int STEPS = (HS + 15) / 16;  // of a score's channels
constexpr int ROW_UNITS = STEPS * 2;   // copies of a row, with padding
// Elements of a row: those of PITCH<ROW_UNITS> in mma.cuh.
constexpr int LINE = (ROW_UNITS & (ROW_UNITS - 1)) == 0 ? ROW_UNITS * 8 : ROW_UNITS * 8 + 8;
// By how many 16-bit values an element is kept in: 1, or 3 of float.
template <int KEPT>
constexpr int KEYS = KEPT == 1 ? 64 : 32;
template <int KEPT>
constexpr int BUFFERS = KEPT == 1 ? 2 : 1;
template <int KEPT>
constexpr int SHARED_BYTES = KEPT * (BR + 2 * BUFFERS<KEPT> * KEYS<KEPT>)*LINE * 2;

#if __CUDA_ARCH__ >= 800

constexpr bool WIDE = sizeof(elem_t) == 4;
template <bool>
struct Operand {
  using type = elem_t;
};
template <>
struct Operand<true> {
  using type = __nv_bfloat16;
};
using part_t = Operand<WIDE>::type;  // what is multiplied
constexpr int KEPT = WIDE ? PARTS : 1;
constexpr int BC = KEYS<KEPT>;
constexpr int PART = BC * LINE;  // elements of a part of a tile
constexpr int QUERY_PART = BR * LINE;
static_assert(LINE == PITCH<ROW_UNITS>, "rows are laid out by swizzled()");

// Copies COUNT rows of a head from `first` on; those from `end` on become zero. float arrives at
// once, else a group of cp.async brings them.
template <int COUNT>
__device__ inline void copy_rows(part_t* to, const elem_t* head, int stride, int first, int end) {
#pragma unroll 4
  for (int i = threadIdx.x; i < COUNT * ROW_UNITS; i += THREADS) {
    int row = i / ROW_UNITS, unit = i % ROW_UNITS, at = swizzled<ROW_UNITS>(row, unit);
    bool there = first + row < end && unit * 8 < HS;
    const elem_t* from = head + (size_t)(first + row) * stride + unit * 8;
    if constexpr (WIDE) {
      float values[8] = {};
      if (there) load_floats(from, values);
      uint4 parts[PARTS];
      split_eight(values, parts);
#pragma unroll
      for (int n = 0; n < PARTS; n++)
        *reinterpret_cast<uint4*>(to + n * COUNT * LINE + at) = parts[n];
    } else {
      cp_async_or_zero(shared_address(to + at), from, there);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_mma(const elem_t* q,
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
  extern __shared__ __align__(128) unsigned char memory[];
  part_t* queries = reinterpret_cast<part_t*>(memory);
  part_t* keys = queries + KEPT * QUERY_PART;
  part_t* values = keys + BUFFERS<KEPT> * KEPT * PART;
  Item item = item_of(blockIdx.x, (T + BR - 1) / BR, B * NH, NH, together);
  int first = item.tile * BR, kv = item.head / (NH / NKV);
  Visible visible = visible_of(lengths, offsets, offset, causal, item.batch, T, S);
  int end = visible.end(min(first + BR, T) - 1);
  const elem_t* query =
      q + Strides{q_stride_B, q_stride_T, q_stride_NH}.at(item.batch, 0, item.head);
  const elem_t* key = k + Strides{k_stride_B, k_stride_S, k_stride_NKV}.at(item.batch, 0, kv);
  const elem_t* value = v + Strides{v_stride_B, v_stride_S, v_stride_NKV}.at(item.batch, 0, kv);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment
  int row = first + warp * 16 + across;     // and row + 8
  int ends[2] = {visible.end(row), visible.end(row + 8)};
  int first_end = visible.end(first + warp * 16);  // all queries of the warp see as many keys

  copy_rows<BR>(queries, query, q_stride_T, first, T);
  if constexpr (!WIDE) {
    copy_rows<BC>(keys, key, k_stride_S, 0, end);
    copy_rows<BC>(values, value, v_stride_S, 0, end);
    cp_async_commit();
  }
  float o[ROW_UNITS][4] = {}, m[2] = {MINUS_INFINITY, MINUS_INFINITY}, l[2] = {};
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
#pragma unroll 1
  for (int t0 = 0, buffer = 0; t0 < end; t0 += BC) {
    if constexpr (WIDE) {
      __syncthreads();  // the tile before is read no more
      copy_rows<BC>(keys, key, k_stride_S, t0, end);
      copy_rows<BC>(values, value, v_stride_S, t0, end);
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const part_t *own_keys = keys + buffer * KEPT * PART,
                 *own_values = values + buffer * KEPT * PART;
    if constexpr (!WIDE) {
      buffer ^= 1;
      if (t0 + BC < end) {
        copy_rows<BC>(keys + buffer * PART, key, k_stride_S, t0 + BC, end);
        copy_rows<BC>(values + buffer * PART, value, v_stride_S, t0 + BC, end);
      }
      cp_async_commit();
    }

    float s[BC / 8][4] = {}, small[BC / 8][4] = {};
#pragma unroll
    for (int c = 0; c < STEPS; c++) {
      unsigned a[KEPT][4];
#pragma unroll
      for (int n = 0; n < KEPT; n++)
        ldmatrix(a[n], queries + n * QUERY_PART +
                           swizzled<ROW_UNITS>(warp * 16 + lane % 16, c * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < BC / 16; j++) {
        unsigned b[KEPT][4];
        int at = swizzled<ROW_UNITS>(j * 16 + lane / 16 * 8 + lane % 8, c * 2 + lane / 8 % 2);
#pragma unroll
        for (int n = 0; n < KEPT; n++) ldmatrix(b[n], own_keys + n * PART + at);
        if constexpr (WIDE) {
#pragma unroll
          for (int i = 0; i < PRODUCTS; i++) {
            auto& sums = i == PRODUCTS - 1 ? s : small;
            mma<part_t>(sums[j * 2], a[LEFT_PART[i]], b[RIGHT_PART[i]][0], b[RIGHT_PART[i]][1]);
            mma<part_t>(sums[j * 2 + 1], a[LEFT_PART[i]], b[RIGHT_PART[i]][2], b[RIGHT_PART[i]][3]);
          }
        } else {
          mma<part_t>(s[j * 2], a[0], b[0][0], b[0][1]);
          mma<part_t>(s[j * 2 + 1], a[0], b[0][2], b[0][3]);
        }
      }
    }
    if constexpr (WIDE) {
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] += small[j][i];
    }
    if (t0 + BC > first_end) {
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (t0 + j * 8 + along * 2 + i % 2 >= ends[i / 2]) s[j][i] = MINUS_INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float larger = m[half];
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
        larger = fmaxf(larger, fmaxf(s[j][half * 2], s[j][half * 2 + 1]));
      larger = warp_max<4>(larger);  // four lanes share a row
      // A query may see none of the keys: its maximum is then minus infinity.
      float base = larger == MINUS_INFINITY ? 0.0f : __fmul_rn(larger, factor);
      float old = power_of_two(__fmul_rn(m[half], factor) - base);
      m[half] = larger;
      l[half] *= old;
#pragma unroll
      for (int d = 0; d < ROW_UNITS; d++) {
        o[d][half * 2] *= old;
        o[d][half * 2 + 1] *= old;
      }
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = s[j][half * 2 + i];
          score = power_of_two(fmaf(score, factor, -base));
          l[half] += score;
        }
    }

    // Weights leave mma in the layout of a left operand.
    unsigned p[BC / 16][KEPT][4];
#pragma unroll
    for (int j = 0; j < BC / 16; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float low = s[j * 2 + i / 2][i % 2 * 2], high = s[j * 2 + i / 2][i % 2 * 2 + 1];
        if constexpr (WIDE) {
          unsigned parts[PARTS];
          split_pair(low, high, parts);
#pragma unroll
          for (int n = 0; n < PARTS; n++) p[j][n][i] = parts[n];
        } else {
          p[j][0][i] = packed<part_t>(low, high);
        }
      }
#pragma unroll
    for (int d = 0; d < STEPS; d++) {
      float sums[2][4] = {}, small_sums[2][4] = {};
#pragma unroll
      for (int j = 0; j < BC / 16; j++) {
        unsigned b[KEPT][4];
        int at = swizzled<ROW_UNITS>(j * 16 + lane % 16, d * 2 + lane / 16);
#pragma unroll
        for (int n = 0; n < KEPT; n++) ldmatrix_trans(b[n], own_values + n * PART + at);
#pragma unroll
        for (int side = 0; side < 2; side++) {
          if constexpr (WIDE) {
#pragma unroll
            for (int i = 0; i < PRODUCTS; i++)
              mma<part_t>(i == PRODUCTS - 1 ? sums[side] : small_sums[side], p[j][LEFT_PART[i]],
                          b[RIGHT_PART[i]][side * 2], b[RIGHT_PART[i]][side * 2 + 1]);
          } else {
            mma<part_t>(o[d * 2 + side], p[j][0], b[0][side * 2], b[0][side * 2 + 1]);
          }
        }
      }
      if constexpr (WIDE) {
#pragma unroll
        for (int side = 0; side < 2; side++)
#pragma unroll
          for (int i = 0; i < 4; i++) o[d * 2 + side][i] += sums[side][i] + small_sums[side][i];
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    l[half] = warp_sum<4>(l[half]);
    int t = row + half * 8;
    if (t >= T) continue;
    float share = l[half] > 0.0f ? 1.0f / l[half] : 0.0f;  // a query that sees no key gives zeros
    elem_t* to =
        out + Strides{out_stride_B, out_stride_T, out_stride_NH}.at(item.batch, t, item.head);
#pragma unroll
    for (int d = 0; d < ROW_UNITS; d++)
      if (d * 8 < HS) {
        float pair[2] = {o[d][half * 2] * share, o[d][half * 2 + 1] * share};
        store_floats(to + d * 8 + along * 2, pair);
      }
  }
}

#endif
