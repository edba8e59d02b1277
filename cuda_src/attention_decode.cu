// Decode attention: one new token per row against its cache, which it extends in the same launch.
//
//   out[b, h] = softmax(scale * q[b, h] . K[slot, h, 0..p]) V[slot, h, 0..p]      p = positions[b]
//
// Shapes    qkv [B, 3C] rows of [q | k | v]; K, V [S, NH, T, HS]; slots, positions [B] int;
//           out [B, C]. All ELEM. K and V at position p are written here, from qkv.
// Bytes     2 (p + 1) HS sizeof ELEM per row and head, plus qkv and out
// FLOPs     4 (p + 1) HS per row and head
// Work      one block per (head, row), or a cluster of blocks that deal the keys out among them. A
//           key is read by a group of LANES lanes, VEC elements each; the groups stride over the
//           keys, every one with its own online softmax (running maximum, sum and weighted values),
//           and are merged once at the end: within each warp by shuffles, across warps and across
//           the blocks of the cluster through shared memory. AHEAD turns of keys and values are
//           always under way, the first of them before the kernel waits for its predecessor.
// Source    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018
//
// Entries   attention_decode        one block per head: enough rows, or a chip without clusters
//           attention_decode_2, _4, _8   as many blocks per head: few rows, to fill the chip
//           attention_decode_many   one smaller block per head: so many rows that blocks wait for
//                                   room; six of them fit a multiprocessor at HS = 64
//
// Halves whose head size is a multiple of 16 have attention_decode_mma.cu from sm_80 on.
//
// A row with slot -1 is idle and gives zeros. Nothing beyond position p is read.
#include "attention_merge.cuh"

constexpr int MOST_WARPS = 8;    // of a block; also in gpt2cupy/ops/cached_attention.py
constexpr int FEWEST_WARPS = 4;  // of attention_decode_many; likewise

// Turns of loads under way; fewer among so many blocks that more of them count for more.
constexpr int AHEAD = 4;
constexpr int AHEAD_ROWS = 2;

__device__ constexpr int widest_divisor(int size, int widest) {
  while (size % widest) widest /= 2;
  return widest;
}

__device__ constexpr int lanes_for(int chunks) {
  int lanes = 1;
  while (lanes < chunks && lanes < WARP) lanes *= 2;
  return lanes;
}

constexpr int VEC = widest_divisor(HS, WIDEST<elem_t>);
constexpr int LANES = lanes_for(HS / VEC);              // lanes that share one key
constexpr int CHUNKS = (HS / VEC + LANES - 1) / LANES;  // vectors of a key per lane
constexpr int GROUPS = WARP / LANES;                    // keys a warp has in hand

using Piece = Packed<elem_t, VEC>;

// Lane `lane`'s pieces of a key, a value or a query.
__device__ inline void load_head(const elem_t* source, int lane, Piece (&to)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int chunk = lane + c * LANES;
    if (chunk * VEC < HS)
      to[c] = *reinterpret_cast<const Piece*>(source + chunk * VEC);
    else
      to[c] = {};
  }
}

__device__ inline void store_head(elem_t* to, int lane, const Piece (&from)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int chunk = lane + c * LANES;
    if (chunk * VEC < HS) *reinterpret_cast<Piece*>(to + chunk * VEC) = from[c];
  }
}

// The lane's part of a score.
__device__ inline float dot(const float (&query)[CHUNKS][VEC], const Piece (&key)[CHUNKS]) {
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) sum = fmaf(query[c][i], key[c][i], sum);
  return sum;
}

// A softmax in progress: weights 2^(score - top) summed in `sum`, values weighted alike.
struct Partial {
  float top = LOWEST, sum = 0.0f, values[CHUNKS][VEC] = {};

  __device__ void take(float score, const Piece (&value)[CHUNKS]) {
    float weight = power_of_two(score - top);
    sum += weight;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) values[c][i] = fmaf(weight, value[c][i], values[c][i]);
  }

  __device__ void raise(float new_top) {
    float factor = power_of_two(top - new_top);
    top = new_top;
    sum *= factor;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) values[c][i] *= factor;
  }
};

template <int WARPS, bool CLUSTERED, int AHEAD>
__device__ inline void attend(const elem_t* qkv,
                              elem_t* k,
                              elem_t* v,
                              const int* slots,
                              const int* positions,
                              elem_t* out,
                              float scale,
                              int NH,
                              int T) {
  int blocks = CLUSTERED ? cluster_size() : 1, block = CLUSTERED ? cluster_rank() : 0;
  int head = CLUSTERED ? cluster_index() : blockIdx.x, row = blockIdx.y;
  int warp = threadIdx.x / WARP;
  int group = threadIdx.x % WARP / LANES, lane = threadIdx.x % LANES;
  __shared__ Findings<WARPS> of_warps;
  __shared__ FromBlocks of_blocks;

  release_dependents();
  int slot = slots[row], position = positions[row];
  if constexpr (CLUSTERED) open_to_blocks(of_blocks, block);
  bool idle = slot < 0 || position < 0 || position >= T;
  if (idle) position = 0;
  size_t C = (size_t)NH * HS;
  out += row * C + head * HS;
  qkv += row * 3 * C + head * HS;
  k += ((size_t)max(slot, 0) * NH + head) * T * HS;
  v += ((size_t)max(slot, 0) * NH + head) * T * HS;

  // A block works alone as long as the loads it has under way hold all past keys: what blocks have
  // to tell each other takes longer than what they would save.
  if constexpr (CLUSTERED) {
    blocks = min(blocks, max(position - 1, 0) / (AHEAD * WARPS * GROUPS) + 1);
    if (block >= blocks) return;
  }

  // A turn of the blocks takes `stride` keys; this group's are own_key, own_key + stride, ...
  int stride = blocks * WARPS * GROUPS;
  int own_key = (block * WARPS + warp) * GROUPS + group;
  Piece keys[AHEAD][CHUNKS] = {}, values[AHEAD][CHUNKS] = {};
#pragma unroll
  for (int turn = 0; turn < AHEAD; turn++) {
    int t = own_key + turn * stride;
    if (t < position) {
      load_head(k + (size_t)t * HS, lane, keys[turn]);
      load_head(v + (size_t)t * HS, lane, values[turn]);
    }
  }
  wait_for_inputs();

  Piece packed_query[CHUNKS], new_key[CHUNKS], new_value[CHUNKS];
  load_head(qkv, lane, packed_query);
  load_head(qkv + C, lane, new_key);
  load_head(qkv + 2 * C, lane, new_value);
  float query[CHUNKS][VEC];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) query[c][i] = packed_query[c][i] * (scale * LOG2_E);

  // The newest pair is taken by one group, which also puts it into the cache.
  bool takes_newest = block == 0 && warp == 0 && group == 0;
  if (takes_newest && !idle) {
    store_head(k + (size_t)position * HS, lane, new_key);
    store_head(v + (size_t)position * HS, lane, new_value);
  }
  Partial own;
  own.top = warp_sum<LANES>(dot(query, new_key));
  if (!takes_newest) own.top = LOWEST;
  bool empty = true;
  // The bounds are the same for all lanes of a warp: the shuffles need every one. AHEAD turns stay
  // under way all the time; a load at its turn would be waited for in full.
  for (int first = own_key - group;; first += AHEAD * stride) {
    int own_first = first + group, next = own_first + AHEAD * stride;
    bool more = first + AHEAD * stride < position;
    float scores[AHEAD];
#pragma unroll
    for (int turn = 0; turn < AHEAD; turn++) scores[turn] = dot(query, keys[turn]);
    if (more)
#pragma unroll
      for (int turn = 0; turn < AHEAD; turn++)
        if (next + turn * stride < position)
          load_head(k + (size_t)(next + turn * stride) * HS, lane, keys[turn]);
    warp_sums<LANES>(scores);
    float top = fmaxf(own.top, LOWEST);  // the newest key's may be minus infinity
#pragma unroll
    for (int turn = 0; turn < AHEAD; turn++) {
      if (own_first + turn * stride >= position) scores[turn] = MINUS_INFINITY;
      top = fmaxf(top, scores[turn]);
    }
    if (empty) {
      float newest = own.top;
      own.top = top;
      if (takes_newest) own.take(newest, new_value);
    } else {
      own.raise(top);
    }
    empty = false;
#pragma unroll
    for (int turn = 0; turn < AHEAD; turn++) own.take(scores[turn], values[turn]);
    if (!more) break;
#pragma unroll
    for (int turn = 0; turn < AHEAD; turn++)
      if (next + turn * stride < position)
        load_head(v + (size_t)(next + turn * stride) * HS, lane, values[turn]);
  }
  __syncwarp();

  // Merge the groups of the warp: brought to one maximum, they are added.
  float top = own.top;
#pragma unroll
  for (int offset = LANES; offset < WARP; offset *= 2)
    top = fmaxf(top, __shfl_xor_sync(FULL_MASK, top, offset));
  own.raise(top);
#pragma unroll
  for (int offset = LANES; offset < WARP; offset *= 2) {
    own.sum += __shfl_xor_sync(FULL_MASK, own.sum, offset);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++)
        own.values[c][i] += __shfl_xor_sync(FULL_MASK, own.values[c][i], offset);
  }

  if (group == 0) {
    if (lane == 0) {
      of_warps.tops[warp] = own.top;
      of_warps.sums[warp] = own.sum;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        int channel = (lane + c * LANES) * VEC + i;
        if (channel < HS) of_warps.values[warp][channel] = own.values[c][i];
      }
  }
  __syncthreads();
  finish<WARPS, CLUSTERED>(of_warps, of_blocks, block, blocks, idle, out);
}

#define ATTENTION_ENTRY(name, cluster, clustered, ahead, warps, resident)                   \
  extern "C" __global__ void cluster __launch_bounds__(warps* WARP, resident)               \
      name(const elem_t* qkv, elem_t* k, elem_t* v, const int* slots, const int* positions, \
           elem_t* out, float scale, int NH, int T) {                                       \
    attend<warps, clustered, ahead>(qkv, k, v, slots, positions, out, scale, NH, T);        \
  }

ATTENTION_ENTRY(attention_decode, , false, AHEAD, MOST_WARPS, 2)
ATTENTION_ENTRY(attention_decode_2, CLUSTER(2), true, AHEAD, MOST_WARPS, 2)
ATTENTION_ENTRY(attention_decode_4, CLUSTER(4), true, AHEAD, MOST_WARPS, 2)
ATTENTION_ENTRY(attention_decode_8, CLUSTER(SPLIT), true, AHEAD, MOST_WARPS, 2)
ATTENTION_ENTRY(attention_decode_many, , false, AHEAD_ROWS, FEWEST_WARPS, HS <= 64 ? 6 : 4)
