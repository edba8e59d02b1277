// Attention of many queries in fp32, to its accuracy, on the tensor cores of sm_90.
//
//   out[b, t, h] = softmax(scale * q[b, t, h] . k[b, s, g]) v[b, s, g]     over the visible keys s
//
// Shapes    as in attention.cu; g = h / (NH / NKV)
// Dtypes    all float. A product is six of bf16 (split.cuh), of HS channels or BC keys in a tensor
//           core's sum: that is then added in fp32, for a tensor core truncates
// Bytes     4 (2 T NH + 2 S NKV) B HS at the least; each tile of queries reads the keys again, from
//           L2
// FLOPs     4 HS per query, head and visible key; six times as many are made
// Work      as in attention_wgmma.cu, but the producer warpgroup loads queries, keys and values
//           into registers, splits them, and stores the parts. The products take long: a stage is
//           filled again while the others are multiplied, and the softmax of one consumer hides
//           behind the products of the other without their taking turns.
// Source    Shah et al., "FlashAttention-3", 2024; Henry, Tang, Heinecke, 2019
#include "attention_tensors.cuh"
#include "mbarrier.cuh"
#include "softmax_state.cuh"
#include "split.cuh"
#include "warpgroup.cuh"

constexpr int CONSUMERS = 2;              // warpgroups
constexpr int BR = CONSUMERS * 64;        // queries of a block
constexpr int BC = 64;                    // keys of a tile
constexpr int STAGES = HS <= 64 ? 2 : 1;  // of keys, and of values
constexpr int SLABS = (HS + 63) / 64;     // 64 channels of all rows of a tile
constexpr int CHANNELS = HS <= 64 ? 64 : (HS <= 96 ? 96 : 128);  // of the output, with padding
constexpr int QUERY_BYTES = SLABS * BR * 128;                    // of a part
constexpr int TILE_BYTES = SLABS * BC * 128;                     // of a part
constexpr int SHARED_BYTES = 3 * (QUERY_BYTES + 2 * STAGES * TILE_BYTES) + 1024;
constexpr int THREADS = (CONSUMERS + 1) * 128;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int UNITS = SLABS * 8;         // of eight channels of a row
constexpr int STEP = WARPGROUP / UNITS;  // rows that the producer loads at once
constexpr int STEPS = (HS + 15) / 16;    // products of a score
constexpr int CONSUMER_WARPS = CONSUMERS * 4;
constexpr int STAGE_BYTES = PARTS * TILE_BYTES;
static_assert(PARTS == 3, "the launch asks for so much");

struct Barriers {
  Mbarrier query_full, query_empty, key_full[STAGES], key_empty[STAGES], value_full[STAGES],
      value_empty[STAGES];
};

__device__ inline unsigned address_of(const Mbarrier& barrier) { return shared_address(&barrier); }

// Copies the parts of rows first .. first + COUNT - 1 of a head; those from `end` on become zero.
// All threads of the producer. The first rows are loaded before `empty` is waited for.
template <int COUNT>
__device__ inline void copy_rows(unsigned to,
                                 const float* head,
                                 int stride,
                                 int first,
                                 int end,
                                 const Mbarrier& empty,
                                 unsigned parity,
                                 const Mbarrier& full) {
  constexpr int AT_ONCE = 4;
  int thread = threadIdx.x % WARPGROUP, unit = thread % UNITS, row = thread / UNITS;
  unsigned at = to + (unit / 8 * COUNT + row) * 128 + (unit % 8 ^ row % 8) * 16;
  const float* from = head + (size_t)(first + row) * stride + unit * 8;
  size_t step = (size_t)stride * STEP;
#pragma unroll 1
  for (int i = 0; i < COUNT / STEP; i += AT_ONCE) {
    float values[AT_ONCE][8];
#pragma unroll
    for (int n = 0; n < AT_ONCE; n++) {
#pragma unroll
      for (int c = 0; c < 8; c++) values[n][c] = 0.0f;
      if (unit * 8 < HS && first + row + (i + n) * STEP < end)
        load_floats(from + n * step, values[n]);
    }
    from += AT_ONCE * step;
    if (i == 0) mbarrier_wait(address_of(empty), parity);
#pragma unroll
    for (int n = 0; n < AT_ONCE; n++) {
      uint4 parts[PARTS];
      split_eight(values[n], parts);
#pragma unroll
      for (int p = 0; p < PARTS; p++)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at + p * SLABS * COUNT * 128 +
                                                                      (i + n) * STEP * 128),
                     "r"(parts[p].x), "r"(parts[p].y), "r"(parts[p].z), "r"(parts[p].w)
                     : "memory");
    }
  }
  shared_to_wgmma();
  mbarrier_arrive(address_of(full));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_split(const float* q,
                                                                         const float* k,
                                                                         const float* v,
                                                                         const int* lengths,
                                                                         const int* offsets,
                                                                         float* out,
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
  extern __shared__ unsigned char memory[];
  __shared__ Barriers barriers;
  unsigned queries = (shared_address(memory) + 1023) / 1024 * 1024;
  unsigned keys = queries + PARTS * QUERY_BYTES, values = keys + STAGES * STAGE_BYTES;
  int tiles = (T + BR - 1) / BR, items = tiles * B * NH;
  int group = threadIdx.x / WARPGROUP;
  if (threadIdx.x == 0) {
    mbarrier_init(address_of(barriers.query_full), WARPGROUP);
    mbarrier_init(address_of(barriers.query_empty), CONSUMER_WARPS);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(address_of(barriers.key_full[i]), WARPGROUP);
      mbarrier_init(address_of(barriers.value_full[i]), WARPGROUP);
      mbarrier_init(address_of(barriers.key_empty[i]), CONSUMER_WARPS);
      mbarrier_init(address_of(barriers.value_empty[i]), CONSUMER_WARPS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  // Item n of this block: dealt out forth and back, since later items take less time.
  auto item_number = [&](int n) {
    int place = n % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return n * (int)gridDim.x + place;
  };

  if (group == 0) {
    fewer_registers<80>();
    PipelineState stage = {0, 0};
    unsigned query_parity = 0;
#pragma unroll 1
    for (int n = 0; n * (int)gridDim.x < items; n++) {
      int number = item_number(n);
      if (number >= items) continue;
      Item item = item_of(number, tiles, B * NH, NH, together);
      int first = item.tile * BR, kv = item.head / (NH / NKV);
      Visible visible = visible_of(lengths, offsets, offset, causal, item.batch, T, S);
      int end = visible.end(min(first + BR, T) - 1);
      if (end == 0) continue;
      const float* key = k + Strides{k_stride_B, k_stride_S, k_stride_NKV}.at(item.batch, 0, kv);
      const float* value = v + Strides{v_stride_B, v_stride_S, v_stride_NKV}.at(item.batch, 0, kv);
      copy_rows<BR>(
          queries, q + Strides{q_stride_B, q_stride_T, q_stride_NH}.at(item.batch, 0, item.head),
          q_stride_T, first, T, barriers.query_empty, query_parity ^ 1, barriers.query_full);
      query_parity ^= 1;
#pragma unroll 1
      for (int t0 = (end - 1) / BC * BC; t0 >= 0; t0 -= BC) {
        int s = stage.stage;
        copy_rows<BC>(keys + s * STAGE_BYTES, key, k_stride_S, t0, end, barriers.key_empty[s],
                      stage.parity ^ 1, barriers.key_full[s]);
        copy_rows<BC>(values + s * STAGE_BYTES, value, v_stride_S, t0, end, barriers.value_empty[s],
                      stage.parity ^ 1, barriers.value_full[s]);
        stage.next(STAGES);
      }
    }
    return;
  }

  more_registers<208>();
  int consumer = group - 1, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  int along = lane % 4, across = lane / 4;  // place in a fragment
  PipelineState stage = {0, 0};
  unsigned query_parity = 0;
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  auto release = [&](const Mbarrier& empty) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(address_of(empty));
  };
  unsigned long long query = wgmma_descriptor(queries + consumer * 64 * 128);

#pragma unroll 1
  for (int n = 0; n * (int)gridDim.x < items; n++) {
    int number = item_number(n);
    if (number >= items) continue;
    Item item = item_of(number, tiles, B * NH, NH, together);
    Visible visible = visible_of(lengths, offsets, offset, causal, item.batch, T, S);
    int end = visible.end(min((item.tile + 1) * BR, T) - 1);
    int row = item.tile * BR + consumer * 64 + warp * 16 + across;  // and row + 8
    int ends[2] = {visible.end(row), visible.end(row + 8)};
    int first_end = visible.end(item.tile * BR + consumer * 64);  // all queries see as many keys
    float m[2] = {MINUS_INFINITY, MINUS_INFINITY}, l[2] = {};
    float o[CHANNELS / 8][4];
#pragma unroll
    for (int d = 0; d < CHANNELS / 8; d++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[d][i] = 0.0f;

    if (end > 0) {
      mbarrier_wait(address_of(barriers.query_full), query_parity);
      query_parity ^= 1;
    }
#pragma unroll 1
    for (int t0 = (end - 1) / BC * BC; end > 0 && t0 >= 0; t0 -= BC) {
      float s[BC / 8][4];
      mbarrier_wait(address_of(barriers.key_full[stage.stage]), stage.parity);
      unsigned long long key = wgmma_descriptor(keys + stage.stage * STAGE_BYTES);
      registers_to_wgmma();
#pragma unroll
      for (int i = 0; i < PRODUCTS; i++)
#pragma unroll
        for (int c = 0; c < STEPS; c++)
          Wgmma<__nv_bfloat16, BC>::both_shared(
              s, query + (LEFT_PART[i] * QUERY_BYTES + c / 4 * BR * 128 + c % 4 * 32) / 16,
              key + (RIGHT_PART[i] * TILE_BYTES + c / 4 * BC * 128 + c % 4 * 32) / 16, i + c > 0);
      wgmma_commit();
      wgmma_wait_group<0>();
      keep_order(s);
      release(barriers.key_empty[stage.stage]);

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
        // A query may see none of the keys so far: its maximum is then minus infinity.
        float base = larger == MINUS_INFINITY ? 0.0f : __fmul_rn(larger, factor);
        float old = power_of_two(__fmul_rn(m[half], factor) - base), sum = 0.0f;
        m[half] = larger;
#pragma unroll
        for (int d = 0; d < CHANNELS / 8; d++) {
          o[d][half * 2] *= old;
          o[d][half * 2 + 1] *= old;
        }
#pragma unroll
        for (int j = 0; j < BC / 8; j++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float& score = s[j][half * 2 + i];
            score = power_of_two(fmaf(score, factor, -base));
            sum += score;
          }
        l[half] = fmaf(l[half], old, sum);
      }

      // Weights leave wgmma in the layout of a left operand.
      unsigned p[PARTS][BC / 16][4];
#pragma unroll
      for (int j = 0; j < BC / 16; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          unsigned parts[PARTS];
          split_pair(s[j * 2 + i / 2][i % 2 * 2], s[j * 2 + i / 2][i % 2 * 2 + 1], parts);
#pragma unroll
          for (int n = 0; n < PARTS; n++) p[n][j][i] = parts[n];
        }
      float tile[CHANNELS / 8][4];
      mbarrier_wait(address_of(barriers.value_full[stage.stage]), stage.parity);
      unsigned long long value =
          wgmma_descriptor_rows(values + stage.stage * STAGE_BYTES, BC * 128);
      registers_to_wgmma();
#pragma unroll
      for (int i = 0; i < PRODUCTS; i++)
#pragma unroll
        for (int j = 0; j < BC / 16; j++)
          Wgmma<__nv_bfloat16, CHANNELS>::left_registers(
              tile, p[LEFT_PART[i]][j], value + (RIGHT_PART[i] * TILE_BYTES + j * 2048) / 16,
              i + j > 0);
      wgmma_commit();
      wgmma_wait_group<0>();
      keep_order(tile);
#pragma unroll
      for (int n = 0; n < PARTS; n++) keep_order(p[n]);
      release(barriers.value_empty[stage.stage]);
      stage.next(STAGES);
#pragma unroll
      for (int d = 0; d < CHANNELS / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[d][i] += tile[d][i];
    }
    if (end > 0) release(barriers.query_empty);

#pragma unroll
    for (int half = 0; half < 2; half++) {
      l[half] = warp_sum<4>(l[half]);
      int t = row + half * 8;
      if (t >= T) continue;
      float share = l[half] > 0.0f ? 1.0f / l[half] : 0.0f;  // a query that sees no key gives zeros
      float* to =
          out + Strides{out_stride_B, out_stride_T, out_stride_NH}.at(item.batch, t, item.head);
#pragma unroll
      for (int d = 0; d < CHANNELS / 8; d++)
        if (d * 8 < HS) {
          float pair[2] = {o[d][half * 2] * share, o[d][half * 2 + 1] * share};
          store_floats(to + d * 8 + along * 2, pair);
        }
    }
  }
}

#endif
