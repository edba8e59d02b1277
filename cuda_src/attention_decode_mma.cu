// Decode attention on tensor cores: as attention_decode.cu, for halves.
//
//   out[b, h] = softmax(scale * q[b, h] . K[slot, h, 0..p]) V[slot, h, 0..p]      p = positions[b]
//
// Shapes    as in attention_decode.cu, which takes float and the head sizes that this cannot
// Bytes     2 (p + 1) HS sizeof ELEM per row and head, plus qkv and out
// FLOPs     4 (p + 1) HS per row and head
// Work      a warp takes 16 keys at a time through mma.m16n8k16, whose left operand is the query in
//           every row: most of the products are wasted, on units that would be idle, but a key
//           takes a fraction of the instructions, which is what both one row (each of them is on
//           the step's critical path) and many (they have to keep up with the memory) wait for.
//           Keys go from global memory into the right operand as they lie: which channels a
//           fragment calls k = 0 .. 15 does not matter as long as both operands agree. Of the
//           values, two keys are interleaved by byte permutes, and which channels it calls n = 0 ..
//           7 does not matter either. The first turn's keys and values are loaded before the kernel
//           waits for its predecessor. The warps' partial softmaxes meet in shared memory, and with
//           few rows those of a cluster of blocks in the first block's.
//
// Entries   attention_decode_mma        one block of 8 warps per head
//           attention_decode_mma_2, _4, _8   as many blocks per head: few rows, to fill the chip
//
// Needs sm_80 (mma.m16n8k16) and a head size that is a multiple of 16.
//
// A row with slot -1 is idle and gives zeros. Nothing beyond position p is read.
#include "attention_merge.cuh"
#include "mma.cuh"

#if __CUDA_ARCH__ >= 800 && HS % 16 == 0

constexpr int WARPS = 8;  // of a block; also in gpt2cupy/ops/cached_attention.py
constexpr int VEC = 8;
constexpr int KEYS = 16;                      // of a warp's turn
constexpr int KEY_CHUNKS = (HS + 31) / 32;    // of a lane, 4 lanes a key
constexpr int VALUE_CHUNKS = (HS + 63) / 64;  // of a lane, 8 lanes a key

using Piece = Packed<elem_t, VEC>;

// VEC elements, or zeros where there are none.
__device__ inline Piece load_or_zero(const elem_t* source, bool there) {
  return there ? *reinterpret_cast<const Piece*>(source) : Piece{};
}

template <bool CLUSTERED>
__device__ inline void attend(const elem_t* qkv,
                              elem_t* k,
                              elem_t* v,
                              const int* slots,
                              const int* positions,
                              elem_t* out,
                              float scale,
                              int NH,
                              int T) {
  __shared__ Findings<WARPS> of_warps;
  __shared__ FromBlocks of_blocks;
  int blocks = CLUSTERED ? cluster_size() : 1, block = CLUSTERED ? cluster_rank() : 0;
  int head = CLUSTERED ? cluster_index() : blockIdx.x, row = blockIdx.y;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment

  release_dependents();
  int slot = slots[row], position = positions[row];
  if constexpr (CLUSTERED) open_to_blocks(of_blocks, block);
  bool idle = slot < 0 || position < 0 || position >= T;
  if (idle) position = -1;
  // A block works alone as long as its first turn holds all keys: what blocks have to tell each
  // other takes longer than what they would save.
  blocks = min(blocks, position / (WARPS * KEYS) + 1);
  if (block >= blocks) return;
  size_t C = (size_t)NH * HS;
  out += row * C + head * HS;
  qkv += row * 3 * C + head * HS;
  k += ((size_t)max(slot, 0) * NH + head) * T * HS;
  v += ((size_t)max(slot, 0) * NH + head) * T * HS;

  // Of a turn from key t0 the lane has, of the keys `across` and `across + 8`, channels
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
        keys[i][c] = load_or_zero(k + (size_t)t * HS + channel, t < position && channel < HS);
      }
  };
  auto load_values = [&](int t0) {
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int t = value_of(t0, i), channel = (c * 8 + across) * VEC;
        values[i][c] = load_or_zero(v + (size_t)t * HS + channel, t < position && channel < HS);
      }
  };
  int first = (block * WARPS + warp) * KEYS, stride = blocks * WARPS * KEYS;
  load_keys(first);
  load_values(first);
  wait_for_inputs();

  Piece query[KEY_CHUNKS], new_key[KEY_CHUNKS], new_value[VALUE_CHUNKS];
#pragma unroll
  for (int c = 0; c < KEY_CHUNKS; c++) {
    int channel = (c * 4 + along) * VEC;
    query[c] = load_or_zero(qkv + channel, channel < HS);
    new_key[c] = load_or_zero(qkv + C + channel, channel < HS);
  }
#pragma unroll
  for (int c = 0; c < VALUE_CHUNKS; c++) {
    int channel = (c * 8 + across) * VEC;
    new_value[c] = load_or_zero(qkv + 2 * C + channel, channel < HS);
  }

  if (block == 0 && warp == 0 && !idle) {  // into the cache, by lanes that have different channels
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; c++)
      if (int channel = (c * 4 + along) * VEC; across == 0 && channel < HS)
        *reinterpret_cast<Piece*>(k + (size_t)position * HS + channel) = new_key[c];
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
      if (int channel = (c * 8 + across) * VEC; along == 0 && channel < HS)
        *reinterpret_cast<Piece*>(v + (size_t)position * HS + channel) = new_value[c];
  }

  float output[VALUE_CHUNKS * VEC][4] = {}, top = LOWEST, sum = 0.0f;
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  for (int t0 = first; t0 <= position; t0 += stride) {
    if (t0 + KEYS > position) {  // the turn of the newest key
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
    float old = take_scores(weights, top, sum);
    if (t0 != first)
#pragma unroll
      for (int j = 0; j < VALUE_CHUNKS * VEC; j++) {
        output[j][0] *= old;
        output[j][1] *= old;
      }
    unsigned a[4] = {packed<elem_t>(weights[0], weights[1]), 0,
                     packed<elem_t>(weights[2], weights[3]), 0};
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
      for (int j = 0; j < VEC; j++) {
        constexpr unsigned LOW = 0x5410, HIGH = 0x7632;  // the halves of two words, side by side
        unsigned which = j % 2 ? HIGH : LOW;
        mma<elem_t>(output[c * VEC + j], a,
                    __byte_perm(values[0][c].words[j / 2], values[1][c].words[j / 2], which),
                    __byte_perm(values[2][c].words[j / 2], values[3][c].words[j / 2], which));
      }
    if (more) load_values(t0 + stride);
  }
  sum = warp_sum<4>(sum);

  // All rows of the fragments are alike; the lanes of the first hold n = 2 along and 2 along + 1.
  if (across == 0) {
    if (along == 0) {
      of_warps.tops[warp] = top;
      of_warps.sums[warp] = sum;
    }
#pragma unroll
    for (int c = 0; c < VALUE_CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int channel = (c * 8 + along * 2 + i) * VEC;
        float own[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) own[j] = output[c * VEC + j][i];
        if (channel < HS) store_floats(&of_warps.values[warp][channel], own);
      }
  }
  __syncthreads();
  finish<WARPS, CLUSTERED>(of_warps, of_blocks, block, blocks, idle, out);
}

#define ATTENTION_ENTRY(name, cluster, clustered)                                           \
  extern "C" __global__ void cluster __launch_bounds__(WARPS* WARP, HS <= 64 ? 2 : 1)       \
      name(const elem_t* qkv, elem_t* k, elem_t* v, const int* slots, const int* positions, \
           elem_t* out, float scale, int NH, int T) {                                       \
    attend<clustered>(qkv, k, v, slots, positions, out, scale, NH, T);                      \
  }

ATTENTION_ENTRY(attention_decode_mma, , false)
ATTENTION_ENTRY(attention_decode_mma_2, CLUSTER(2), true)
ATTENTION_ENTRY(attention_decode_mma_4, CLUSTER(4), true)
ATTENTION_ENTRY(attention_decode_mma_8, CLUSTER(SPLIT), true)

#endif
