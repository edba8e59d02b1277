// Attention of many queries, on the tensor cores of sm_90.
//
//   out[b, t, h] = softmax(scale * q[b, t, h] . k[b, s, g]) v[b, s, g]     over the visible keys s
//
// Shapes    as in attention.cu, which takes float and older chips; g = h / (NH / NKV)
// Dtypes    ELEM is fp16 or bf16; scores, sums and output are kept in float
// Bytes     (2 T NH + 2 S NKV) B HS sizeof ELEM at the least; each tile of queries reads the keys
//           again, from L2
// FLOPs     4 HS per query, head and visible key
// Work      blocks that stay resident deal with tiles of BR queries one after another, first the
//           tiles that see the most keys. A producer warpgroup copies queries, keys and values into
//           a pipeline in shared memory, each stage with an mbarrier for full and one for empty; it
//           is at the next tile while the consumers still write the last. Two consumer warpgroups
//           have 64 queries each. A consumer starts the scores of the next keys and the output of
//           these, and computes the softmax of the former while the latter is multiplied; two named
//           barriers make the consumers take turns with the tensor cores, so that the softmax of
//           one runs beside the products of the other. Weights stay in registers, where wgmma takes
//           its left operand.
// Source    Shah et al., "FlashAttention-3", 2024
//
// Head sizes that are no multiple of 64 have zeros behind them in shared memory.
//
// Entries   attention_wgmma  copies by cp.async, any strides; keys past the end become zero
//           attention_tma    copies by the copy engine, whose tensor maps say where tiles of q, k
//                            and v lie: one thread starts a copy, and no consumer waits for the
//                            stores of other instructions. What lies behind the end of an array
//                            counts as zero, but not what lies behind a sequence's `lengths`
#include "attention_tensors.cuh"
#include "mbarrier.cuh"
#include "softmax_state.cuh"
#include "warpgroup.cuh"

constexpr int CONSUMERS = 2;           // warpgroups
constexpr int BR = CONSUMERS * 64;     // queries of a block
constexpr int BC = 128;                // keys of a tile
constexpr int STAGES = 2;              // of keys, and of values
constexpr int SLABS = (HS + 63) / 64;  // 64 channels of all rows of a tile
constexpr int CHANNELS = HS <= 64 ? 64 : (HS <= 96 ? 96 : 128);  // of the output, with padding
constexpr int QUERY_BYTES = SLABS * BR * 128;
constexpr int TILE_BYTES = SLABS * BC * 128;
constexpr int SHARED_BYTES = QUERY_BYTES + 2 * STAGES * TILE_BYTES + 1024;  // aligned by hand
constexpr int THREADS = (CONSUMERS + 1) * 128;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int UNITS = SLABS * 8;         // copies of 16 bytes of a row
constexpr int STEP = WARPGROUP / UNITS;  // rows that the producer copies at once
constexpr int STEPS = (HS + 15) / 16;    // products of a score
constexpr int CONSUMER_WARPS = CONSUMERS * 4;
constexpr int TURN = 1;  // the first named barrier of the consumers' turns

// What the entries take. The strides are in elements.
struct Call {
  const elem_t *q, *k, *v;
  const int *lengths, *offsets;
  elem_t* out;
  float scale;
  int causal, offset, together, B, T, S, NH, NKV;
  Strides of_q, of_k, of_v, of_out;
};
// Where tiles of q, k and v lie; null without maps.
struct Tiles {
  const TensorMap *q, *k, *v;
};
static_assert(BR == 128 && BC == 128, "the tensor maps have boxes of so many rows");

struct Barriers {
  Mbarrier query_full, query_empty, key_full[STAGES], key_empty[STAGES], value_full[STAGES],
      value_empty[STAGES];
};

__device__ inline unsigned address_of(const Mbarrier& barrier) { return shared_address(&barrier); }

// All threads of the producer copy rows first .. first + COUNT - 1 of a head; those from `end` on
// become zero.
template <int COUNT>
__device__ inline void copy_rows(
    unsigned to, const elem_t* head, int stride, int first, int end, const Mbarrier& full) {
  int thread = threadIdx.x % WARPGROUP, unit = thread % UNITS, row = thread / UNITS;
  unsigned at = to + (unit / 8 * COUNT + row) * 128 + (unit % 8 ^ row % 8) * 16;
  if (unit * 8 < HS) {
    const elem_t* from = head + (size_t)(first + row) * stride + unit * 8;
    size_t step = (size_t)stride * STEP;
#pragma unroll 8
    for (int i = 0; i < COUNT / STEP; i++, from += step)
      cp_async_or_zero(at + i * STEP * 128, from, first + row + i * STEP < end);
  }
  mbarrier_arrive_after_cp_async(address_of(full));
}

// Likewise by the copy engine, of the COUNT rows of a tile; one thread.
template <int COUNT>
__device__ inline void copy_tile(
    unsigned to, const TensorMap* tiles, int first, int head, int batch, const Mbarrier& full) {
  mbarrier_arrive_expect_tx(address_of(full), SLABS * COUNT * 128);
#pragma unroll
  for (int slab = 0; slab < SLABS; slab++)
    copy_box(to + slab * COUNT * 128, tiles, slab * 64, first, head, batch, address_of(full));
}

// The fragments of weights as the left operand of the next products.
__device__ inline void pack(const float (&s)[BC / 8][4], unsigned (&p)[BC / 16][4]) {
#pragma unroll
  for (int j = 0; j < BC / 16; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      p[j][i] = packed<elem_t>(s[j * 2 + i / 2][i % 2 * 2], s[j * 2 + i / 2][i % 2 * 2 + 1]);
}

template <bool MAPS>
__device__ __forceinline__ void attend(const Call& call, const Tiles& maps) {
  auto [q, k, v, lengths, offsets, out, scale, causal, offset, together, B, T, S, NH, NKV, of_q,
        of_k, of_v, of_out] = call;
  extern __shared__ unsigned char memory[];
  __shared__ Barriers barriers;
  unsigned queries = (shared_address(memory) + 1023) / 1024 * 1024;
  unsigned keys = queries + QUERY_BYTES, values = keys + STAGES * TILE_BYTES;
  int tiles = (T + BR - 1) / BR, items = tiles * B * NH;
  int group = threadIdx.x / WARPGROUP;

  if (HS % 64 && !MAPS)  // what is never copied
    for (int i = threadIdx.x; i < (SHARED_BYTES - 1024) / 16; i += THREADS)
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(queries + i * 16), "r"(0)
                   : "memory");
  if (threadIdx.x == 0) {
    constexpr int COPIERS = MAPS ? 1 : WARPGROUP;
    mbarrier_init(address_of(barriers.query_full), COPIERS);
    mbarrier_init(address_of(barriers.query_empty), CONSUMER_WARPS);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(address_of(barriers.key_full[i]), COPIERS);
      mbarrier_init(address_of(barriers.value_full[i]), COPIERS);
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
    fewer_registers<24>();
    if (MAPS && threadIdx.x > 0) return;
    PipelineState key_stage = {0, 0}, value_stage = {0, 0};
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
      const elem_t* key = k + of_k.at(item.batch, 0, kv);
      const elem_t* value = v + of_v.at(item.batch, 0, kv);

      mbarrier_wait(address_of(barriers.query_empty), query_parity ^ 1);
      query_parity ^= 1;
      if constexpr (MAPS)
        copy_tile<BR>(queries, maps.q, first, item.head, item.batch, barriers.query_full);
      else
        copy_rows<BR>(queries, q + of_q.at(item.batch, 0, item.head), of_q.token, first, T,
                      barriers.query_full);
      int count = (end + BC - 1) / BC;
      // In the order in which they are used: keys are one tile ahead of values.
#pragma unroll 1
      for (int i = 0; i <= count; i++) {
        if (i < count) {
          mbarrier_wait(address_of(barriers.key_empty[key_stage.stage]), key_stage.parity ^ 1);
          unsigned to = keys + key_stage.stage * TILE_BYTES;
          int t0 = (count - 1 - i) * BC;
          const Mbarrier& full = barriers.key_full[key_stage.stage];
          if constexpr (MAPS)
            copy_tile<BC>(to, maps.k, t0, kv, item.batch, full);
          else
            copy_rows<BC>(to, key, of_k.token, t0, end, full);
          key_stage.next(STAGES);
        }
        if (i > 0) {
          mbarrier_wait(address_of(barriers.value_empty[value_stage.stage]),
                        value_stage.parity ^ 1);
          unsigned to = values + value_stage.stage * TILE_BYTES;
          int t0 = (count - i) * BC;
          const Mbarrier& full = barriers.value_full[value_stage.stage];
          if constexpr (MAPS)
            copy_tile<BC>(to, maps.v, t0, kv, item.batch, full);
          else
            copy_rows<BC>(to, value, of_v.token, t0, end, full);
          value_stage.next(STAGES);
        }
      }
    }
    cp_async_wait<0>();
    return;
  }

  more_registers<240>();
  int consumer = group - 1, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
  int along = lane % 4, across = lane / 4;  // place in a fragment
  PipelineState key_stage = {0, 0}, value_stage = {0, 0};
  unsigned query_parity = 0;
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  // The first consumer begins.
  if (consumer == 1) barrier_arrive<CONSUMERS * WARPGROUP>(TURN);

  float s[BC / 8][4], o[CHANNELS / 8][4];
  unsigned p[BC / 16][4];
  auto release = [&](const Mbarrier& empty) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(address_of(empty));
  };
  // Start the scores of the tile of keys in this stage.
  auto start_scores = [&](int stage) {
    unsigned long long a = wgmma_descriptor(queries + consumer * 64 * 128);
    unsigned long long b = wgmma_descriptor(keys + stage * TILE_BYTES);
    registers_to_wgmma();
#pragma unroll
    for (int c = 0; c < STEPS; c++)
      Wgmma<elem_t, BC>::both_shared(s, a + (c / 4 * BR * 128 + c % 4 * 32) / 16,
                                     b + (c / 4 * BC * 128 + c % 4 * 32) / 16, c > 0);
    wgmma_commit();
  };
  auto start_output = [&](int stage) {
    unsigned long long b = wgmma_descriptor_rows(values + stage * TILE_BYTES, BC * 128);
    registers_to_wgmma();
#pragma unroll
    for (int j = 0; j < BC / 16; j++)
      Wgmma<elem_t, CHANNELS>::left_registers(o, p[j], b + j * 2048 / 16, 1);
    wgmma_commit();
  };

#pragma unroll 1
  for (int n = 0; n * (int)gridDim.x < items; n++) {
    int number = item_number(n);
    if (number >= items) continue;
    Item item = item_of(number, tiles, B * NH, NH, together);
    Visible visible = visible_of(lengths, offsets, offset, causal, item.batch, T, S);
    int end = visible.end(min((item.tile + 1) * BR, T) - 1), count = (end + BC - 1) / BC;
    int row = item.tile * BR + consumer * 64 + warp * 16 + across;  // and row + 8
    int ends[2] = {visible.end(row), visible.end(row + 8)};
    int first_end = visible.end(item.tile * BR + consumer * 64);  // all queries see as many keys
    float m[2] = {MINUS_INFINITY, MINUS_INFINITY}, l[2] = {};
    float old[2];
#pragma unroll
    for (int d = 0; d < CHANNELS / 8; d++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[d][i] = 0.0f;

    // Scores of the tile from t0 on become weights.
    auto softmax = [&](int t0) {
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
        old[half] = power_of_two(__fmul_rn(m[half], factor) - base);
        m[half] = larger;
        l[half] *= old[half];
#pragma unroll
        for (int j = 0; j < BC / 8; j++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float& score = s[j][half * 2 + i];
            score = power_of_two(fmaf(score, factor, -base));
            l[half] += score;
          }
      }
    };

    if (count > 0) {
      mbarrier_wait(address_of(barriers.query_full), query_parity);
      query_parity ^= 1;
      mbarrier_wait(address_of(barriers.key_full[key_stage.stage]), key_stage.parity);
      if constexpr (!MAPS) shared_to_wgmma();
      start_scores(key_stage.stage);
      wgmma_wait_group<0>();
      keep_order(s);
      release(barriers.key_empty[key_stage.stage]);
      key_stage.next(STAGES);
      softmax((count - 1) * BC);
      pack(s, p);
#pragma unroll 1
      for (int tile = count - 2; tile >= 0; tile--) {
        mbarrier_wait(address_of(barriers.key_full[key_stage.stage]), key_stage.parity);
        if constexpr (!MAPS) shared_to_wgmma();
        barrier_sync<CONSUMERS * WARPGROUP>(TURN + consumer);
        start_scores(key_stage.stage);
        mbarrier_wait(address_of(barriers.value_full[value_stage.stage]), value_stage.parity);
        if constexpr (!MAPS) shared_to_wgmma();
        start_output(value_stage.stage);
        barrier_arrive<CONSUMERS * WARPGROUP>(TURN + (consumer ^ 1));
        wgmma_wait_group<1>();
        keep_order(s);
        release(barriers.key_empty[key_stage.stage]);
        key_stage.next(STAGES);
        softmax(tile * BC);
        wgmma_wait_group<0>();
        keep_order(o);
        keep_order(p);
        release(barriers.value_empty[value_stage.stage]);
        value_stage.next(STAGES);
#pragma unroll
        for (int d = 0; d < CHANNELS / 8; d++)
#pragma unroll
          for (int i = 0; i < 4; i++) o[d][i] *= old[i / 2];
        pack(s, p);
      }
      release(barriers.query_empty);
      mbarrier_wait(address_of(barriers.value_full[value_stage.stage]), value_stage.parity);
      if constexpr (!MAPS) shared_to_wgmma();
      start_output(value_stage.stage);
      wgmma_wait_group<0>();
      keep_order(o);
      keep_order(p);
      release(barriers.value_empty[value_stage.stage]);
      value_stage.next(STAGES);
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
      l[half] = warp_sum<4>(l[half]);
      int t = row + half * 8;
      float share = l[half] > 0.0f ? 1.0f / l[half] : 0.0f;  // a query that sees no key gives zeros
      elem_t* to = out + of_out.at(item.batch, t, item.head);
#pragma unroll
      for (int d = 0; d < CHANNELS / 8; d += 4) {
        unsigned unit[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          unit[i] = packed<elem_t>(o[d + i][half * 2] * share, o[d + i][half * 2 + 1] * share);
        transpose_quad(unit);
        if (t < T && (d + along) * 8 < HS)
          *reinterpret_cast<uint4*>(to + (d + along) * 8) =
              make_uint4(unit[0], unit[1], unit[2], unit[3]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_wgmma(const elem_t* q,
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
  attend<false>({q,
                 k,
                 v,
                 lengths,
                 offsets,
                 out,
                 scale,
                 causal,
                 offset,
                 together,
                 B,
                 T,
                 S,
                 NH,
                 NKV,
                 {q_stride_B, q_stride_T, q_stride_NH},
                 {k_stride_B, k_stride_S, k_stride_NKV},
                 {v_stride_B, v_stride_S, v_stride_NKV},
                 {out_stride_B, out_stride_T, out_stride_NH}},
                {});
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tma(const elem_t* q,
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
                  int out_stride_NH,
                  const __grid_constant__ TensorMap q_tiles,
                  const __grid_constant__ TensorMap k_tiles,
                  const __grid_constant__ TensorMap v_tiles) {
  attend<true>({q,
                k,
                v,
                lengths,
                offsets,
                out,
                scale,
                causal,
                offset,
                together,
                B,
                T,
                S,
                NH,
                NKV,
                {q_stride_B, q_stride_T, q_stride_NH},
                {k_stride_B, k_stride_S, k_stride_NKV},
                {v_stride_B, v_stride_S, v_stride_NKV},
                {out_stride_B, out_stride_T, out_stride_NH}},
               {&q_tiles, &k_tiles, &v_tiles});
}

#endif
