// Decode attention on tensor cores: as attention_decode.cu, for fp16 and bf16.
//
//   out[b, h] = softmax(scale * q[b, h] . K[slot, h, 0..p]) V[slot, h, 0..p]      p = positions[b]
//
// Shapes    as in attention_decode.cu, which takes float and the head sizes that this cannot
// Bytes     2 (p + 1) HS sizeof ELEM per row and head, plus qkv and out
// FLOPs     4 (p + 1) HS per row and head
// Work      a warp multiplies a tile of 16 keys at a time by mma.m16n8k16, whose left operand is
//           the query in every row: most of the products are wasted, on units that would be idle,
//           but a key takes a fraction of the instructions. That is what counts with one row, where
//           each instruction is on the step's critical path, and with many, which have to keep up
//           with the memory. Keys go from global memory into the right operand as they lie: which
//           channels a fragment calls k = 0 .. 15 does not matter as long as both operands agree.
//           Of the values, two keys are interleaved by byte permutes, and which channels it calls n
//           = 0 .. 7 does not matter either. The first tile is loaded before griddepcontrol.wait.
//           The warps' softmax states are merged through shared memory, with few rows those of a
//           cluster of blocks through the first block's.
//
// Entries   attention_decode_mma              one block of 8 warps per head
//           attention_decode_mma_c2, _c4, _c8   as many blocks per head: few rows, to fill the chip
//
// Needs sm_80 (mma.m16n8k16) and a head size that is a multiple of 16.
//
// A row with slot -1 is idle and gives zeros. Nothing beyond position p is read.
#include "attention_head.cuh"
#include "attention_merge.cuh"
#include "mma.cuh"

#if __CUDA_ARCH__ >= 800 && HS % 16 == 0

constexpr int WARPS = 8;  // of a block
constexpr int VEC = 8;
constexpr int KEYS = 16;                      // of a warp's tile
constexpr int KEY_CHUNKS = (HS + 31) / 32;    // of a lane, 4 lanes a key
constexpr int VALUE_CHUNKS = (HS + 63) / 64;  // of a lane, 8 lanes a key

using Piece = Packed<elem_t, VEC>;

// VEC elements, or zeros where there are none.
__device__ inline Piece load_or_zero(const elem_t* source, bool there) {
  return there ? *reinterpret_cast<const Piece*>(source) : Piece{};
}

template <bool CLUSTERED>
__device__ inline void attend(const Head& head, float scale) {
  __shared__ SoftmaxStates<WARPS> states;
  __shared__ ClusterStates cluster;
  int blocks = CLUSTERED ? cluster_size() : 1, block = CLUSTERED ? cluster_rank() : 0;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment

  if constexpr (CLUSTERED) open_cluster_states(cluster, block);
  bool idle = head.count == 0;
  int position = head.past;  // -1 in an idle row
  // A block works alone as long as its first tiles hold all keys: the exchange between blocks takes
  // longer than what they would save.
  blocks = min(blocks, position / (WARPS * KEYS) + 1);
  if (block >= blocks) return;

  // Of a tile from key t0 the lane has, of the keys `across` and `across + 8`, channels
  // (4 c + along) VEC and on; of the values 2 along, 2 along + 1 and these + 8, channels
  // (8 c + across) VEC and on.
  Piece keys[2][KEY_CHUNKS], values[4][VALUE_CHUNKS];
  auto key_of = [&](int t0, int i) { return t0 + i * 8 + across; };
  auto value_of = [&](int t0, int i) { return t0 + i / 2 * 8 + along * 2 + i % 2; };
  auto load_keys = [&](int t0) {
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int t = key_of(t0, i), channel = (c * 4 + along) * VEC;
        keys[i][c] = load_or_zero(head.k + (size_t)t * HS + channel, t < position && channel < HS);
      }
  };
  auto load_values = [&](int t0) {
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int t = value_of(t0, i), channel = (c * 8 + across) * VEC;
        values[i][c] =
            load_or_zero(head.v + (size_t)t * HS + channel, t < position && channel < HS);
      }
  };
  int first = (block * WARPS + warp) * KEYS, stride = blocks * WARPS * KEYS;
  load_keys(first);
  load_values(first);
  griddepcontrol_wait();

  Piece query[KEY_CHUNKS], new_key[KEY_CHUNKS], new_value[VALUE_CHUNKS];
#pragma unroll
  for (int c = 0; c < KEY_CHUNKS; c++) {
    int channel = (c * 4 + along) * VEC;
    query[c] = load_or_zero(head.q + channel, channel < HS);
    new_key[c] = load_or_zero(head.new_k + channel, channel < HS);
  }
#pragma unroll
  for (int c = 0; c < VALUE_CHUNKS; c++) {
    int channel = (c * 8 + across) * VEC;
    new_value[c] = load_or_zero(head.new_v + channel, channel < HS);
  }

  if (block == 0 && warp == 0 && !idle) {  // to the cache, by lanes that have different channels
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; c++)
      if (int channel = (c * 4 + along) * VEC; across == 0 && channel < HS)
        *reinterpret_cast<Piece*>(head.k + (size_t)position * HS + channel) = new_key[c];
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
      if (int channel = (c * 8 + across) * VEC; along == 0 && channel < HS)
        *reinterpret_cast<Piece*>(head.v + (size_t)position * HS + channel) = new_value[c];
  }

  float o[VALUE_CHUNKS * VEC][4] = {}, m = LOWEST, l = 0.0f;
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  for (int t0 = first; t0 <= position; t0 += stride) {
    if (t0 + KEYS > position) {  // the tile of the newest key
#pragma unroll
      for (int c = 0; c < KEY_CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (key_of(t0, i) == position) keys[i][c] = new_key[c];
#pragma unroll
      for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (value_of(t0, i) == position) values[i][c] = new_value[c];
    }

    // Of keys 2 along, 2 along + 1, and these + 8: the first two of scores[0] and of scores[1].
    float scores[2][4] = {};
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; c++)
#pragma unroll
      for (int part = 0; part < 2; part++) {
        unsigned a[4] = {query[c].words[part * 2], 0, query[c].words[part * 2 + 1], 0};
#pragma unroll
        for (int i = 0; i < 2; i++)
          mma<elem_t>(scores[i], a, keys[i][c].words[part * 2], keys[i][c].words[part * 2 + 1]);
      }
    bool more = t0 + stride <= position;
    if (more) load_keys(t0 + stride);

    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      weights[i] = value_of(t0, i) > position ? MINUS_INFINITY : scores[i / 2][i % 2] * factor;
    float old = add_scores(weights, m, l);
    if (t0 != first)
#pragma unroll
      for (int j = 0; j < VALUE_CHUNKS * VEC; j++) {
        o[j][0] *= old;
        o[j][1] *= old;
      }
    unsigned a[4] = {packed<elem_t>(weights[0], weights[1]), 0,
                     packed<elem_t>(weights[2], weights[3]), 0};
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
      for (int j = 0; j < VEC; j++) {
        constexpr unsigned LOW = 0x5410,
                           HIGH = 0x7632;  // the 16-bit parts of two words, side by side
        unsigned which = j % 2 ? HIGH : LOW;
        mma<elem_t>(o[c * VEC + j], a,
                    __byte_perm(values[0][c].words[j / 2], values[1][c].words[j / 2], which),
                    __byte_perm(values[2][c].words[j / 2], values[3][c].words[j / 2], which));
      }
    if (more) load_values(t0 + stride);
  }
  l = warp_sum<4>(l);

  // All rows of the fragments are alike; the lanes of the first hold n = 2 along and 2 along + 1.
  if (across == 0) {
    if (along == 0) {
      states.m[warp] = m;
      states.l[warp] = l;
    }
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int channel = (c * 8 + along * 2 + i) * VEC;
        float own[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) own[j] = o[c * VEC + j][i];
        if (channel < HS) store_floats(&states.o[warp][channel], own);
      }
  }
  __syncthreads();
  write_output<WARPS, CLUSTERED>(states, cluster, block, blocks, idle, head.out);
}

#define ATTENTION_ENTRY(name, cluster, clustered)                                           \
  extern "C" __global__ void cluster __launch_bounds__(WARPS* WARP, HS <= 64 ? 2 : 1)       \
      name(const elem_t* qkv, elem_t* k, elem_t* v, const int* slots, const int* positions, \
           elem_t* out, float scale, int NH, int T) {                                       \
    griddepcontrol_launch_dependents();                                                     \
    int head = clustered ? cluster_index() : blockIdx.x;                                    \
    attend<clustered>(decode_head(qkv, k, v, slots, positions, out, head, NH, T), scale);   \
  }

ATTENTION_ENTRY(attention_decode_mma, , false)
#if __CUDA_ARCH__ >= 900
ATTENTION_ENTRY(attention_decode_mma_c2, __cluster_dims__(2), true)
ATTENTION_ENTRY(attention_decode_mma_c4, __cluster_dims__(4), true)
ATTENTION_ENTRY(attention_decode_mma_c8, __cluster_dims__(8), true)
#endif

#endif
