// Decode attention: one new token per row against its cache, which it extends in the same launch.
//
//   out[b, h] = softmax(scale * q[b, h] . K[slot, h, 0..p]) V[slot, h, 0..p]      p = positions[b]
//
// Shapes    qkv [B, 3C] rows of [q | k | v]; K, V [S, NH, T, HS]; slots, positions [B] int;
//           out [B, C]. All ELEM. K and V at position p are written here, from qkv.
// Bytes     2 (p + 1) HS sizeof ELEM per row and head, plus qkv and out
// FLOPs     4 (p + 1) HS per row and head
// Work      one block per (head, row), or a cluster of blocks that share the keys. A key is read by
//           a group of LANES lanes, VEC elements each; the groups stride over the keys, each with a
//           softmax state of its own. States are merged once at the end: within a warp by shuffles,
//           across warps through shared memory, across the blocks of a cluster through distributed
//           shared memory. Each group has the loads of AHEAD keys and values in flight, the first
//           of them before griddepcontrol.wait.
// Source    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018
//
// Entries   attention_decode        one block per head: enough rows, or a chip without clusters
//           attention_decode_c2, _c4, _c8   as many blocks per head: few rows, to fill the chip
//           attention_decode_many   one smaller block per head: more rows than blocks are resident;
//                                   six of them fit a multiprocessor at HS = 64
//
// fp16 and bf16 whose head size is a multiple of 16 have attention_decode_mma.cu from sm_80 on.
//
// A row with slot -1 is idle and gives zeros. Nothing beyond position p is read.
#include "attention_head.cuh"
#include "attention_merge.cuh"

constexpr int WARPS = 8;       // of a block
constexpr int MANY_WARPS = 4;  // of a block of attention_decode_many

// Loads in flight of a group; fewer where more resident blocks are worth more.
constexpr int AHEAD = 4;
constexpr int MANY_AHEAD = 2;

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
constexpr int GROUPS = WARP / LANES;                    // keys that a warp reads at a time

using Piece = Packed<elem_t, VEC>;

// Load the lane's pieces of a key, a value or a query.
__device__ inline void load_pieces(const elem_t* source, int lane, Piece (&to)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int chunk = lane + c * LANES;
    if (chunk * VEC < HS)
      to[c] = *reinterpret_cast<const Piece*>(source + chunk * VEC);
    else
      to[c] = {};
  }
}

__device__ inline void store_pieces(elem_t* to, int lane, const Piece (&from)[CHUNKS]) {
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

// A softmax state, of which the lane has some channels of the output.
struct SoftmaxState {
  float m = LOWEST, l = 0.0f, o[CHUNKS][VEC] = {};

  // Add a key whose score is at most m.
  __device__ void add(float score, const Piece (&value)[CHUNKS]) {
    float weight = power_of_two(score - m);
    l += weight;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) o[c][i] = fmaf(weight, value[c][i], o[c][i]);
  }

  // Rescale to a larger maximum.
  __device__ void rescale(float larger) {
    float factor = power_of_two(m - larger);
    m = larger;
    l *= factor;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) o[c][i] *= factor;
  }
};

template <int BLOCK_WARPS, bool CLUSTERED, int LOADS>
__device__ inline void attend(const Head& head, float scale) {
  int blocks = CLUSTERED ? cluster_size() : 1, block = CLUSTERED ? cluster_rank() : 0;
  int warp = threadIdx.x / WARP;
  int group = threadIdx.x % WARP / LANES, lane = threadIdx.x % LANES;
  __shared__ SoftmaxStates<BLOCK_WARPS> states;
  __shared__ ClusterStates cluster;

  if constexpr (CLUSTERED) open_cluster_states(cluster, block);
  bool idle = head.count == 0;
  int position = max(head.past, 0);

  // A block works alone as long as its loads in flight hold all past keys: the exchange between
  // blocks takes longer than what they would save.
  if constexpr (CLUSTERED) {
    blocks = min(blocks, max(position - 1, 0) / (LOADS * BLOCK_WARPS * GROUPS) + 1);
    if (block >= blocks) return;
  }

  // All groups of all blocks read `stride` keys at a time; this group's are own_key, own_key +
  // stride, ...
  int stride = blocks * BLOCK_WARPS * GROUPS;
  int own_key = (block * BLOCK_WARPS + warp) * GROUPS + group;
  Piece keys[LOADS][CHUNKS] = {}, values[LOADS][CHUNKS] = {};
#pragma unroll
  for (int ahead = 0; ahead < LOADS; ahead++) {
    int t = own_key + ahead * stride;
    if (t < position) {
      load_pieces(head.k + (size_t)t * HS, lane, keys[ahead]);
      load_pieces(head.v + (size_t)t * HS, lane, values[ahead]);
    }
  }
  griddepcontrol_wait();

  Piece packed_query[CHUNKS], new_key[CHUNKS], new_value[CHUNKS];
  load_pieces(head.q, lane, packed_query);
  load_pieces(head.new_k, lane, new_key);
  load_pieces(head.new_v, lane, new_value);
  float query[CHUNKS][VEC];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) query[c][i] = packed_query[c][i] * (scale * LOG2_E);

  // The newest key and value are added by one group, which also stores them in the cache.
  bool adds_newest = block == 0 && warp == 0 && group == 0;
  if (adds_newest && !idle) {
    store_pieces(head.k + (size_t)position * HS, lane, new_key);
    store_pieces(head.v + (size_t)position * HS, lane, new_value);
  }
  SoftmaxState own;
  own.m = warp_sum<LANES>(dot(query, new_key));
  if (!adds_newest) own.m = LOWEST;
  bool empty = true;
  // The bounds are the same for all lanes of a warp: the shuffles need every one. LOADS loads stay
  // in flight all the time: a load issued at its use would be waited for in full.
  for (int first = own_key - group;; first += LOADS * stride) {
    int own_first = first + group, next = own_first + LOADS * stride;
    bool more = first + LOADS * stride < position;
    float scores[LOADS];
#pragma unroll
    for (int ahead = 0; ahead < LOADS; ahead++) scores[ahead] = dot(query, keys[ahead]);
    if (more)
#pragma unroll
      for (int ahead = 0; ahead < LOADS; ahead++)
        if (next + ahead * stride < position)
          load_pieces(head.k + (size_t)(next + ahead * stride) * HS, lane, keys[ahead]);
    warp_sums<LANES>(scores);
    float m = fmaxf(own.m, LOWEST);  // the newest key's score may be minus infinity
#pragma unroll
    for (int ahead = 0; ahead < LOADS; ahead++) {
      if (own_first + ahead * stride >= position) scores[ahead] = MINUS_INFINITY;
      m = fmaxf(m, scores[ahead]);
    }
    if (empty) {
      float newest = own.m;
      own.m = m;
      if (adds_newest) own.add(newest, new_value);
    } else {
      own.rescale(m);
    }
    empty = false;
#pragma unroll
    for (int ahead = 0; ahead < LOADS; ahead++) own.add(scores[ahead], values[ahead]);
    if (!more) break;
#pragma unroll
    for (int ahead = 0; ahead < LOADS; ahead++)
      if (next + ahead * stride < position)
        load_pieces(head.v + (size_t)(next + ahead * stride) * HS, lane, values[ahead]);
  }
  __syncwarp();

  // Merge the groups of the warp: rescaled to one maximum, they are added.
  float m = own.m;
#pragma unroll
  for (int offset = LANES; offset < WARP; offset *= 2)
    m = fmaxf(m, __shfl_xor_sync(FULL_MASK, m, offset));
  own.rescale(m);
#pragma unroll
  for (int offset = LANES; offset < WARP; offset *= 2) {
    own.l += __shfl_xor_sync(FULL_MASK, own.l, offset);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) own.o[c][i] += __shfl_xor_sync(FULL_MASK, own.o[c][i], offset);
  }

  if (group == 0) {
    if (lane == 0) {
      states.m[warp] = own.m;
      states.l[warp] = own.l;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        int channel = (lane + c * LANES) * VEC + i;
        if (channel < HS) states.o[warp][channel] = own.o[c][i];
      }
  }
  __syncthreads();
  write_output<BLOCK_WARPS, CLUSTERED>(states, cluster, block, blocks, idle, head.out);
}

#define ATTENTION_ENTRY(name, cluster, clustered, loads, warps, resident)                       \
  extern "C" __global__ void cluster __launch_bounds__(warps* WARP, resident)                   \
      name(const elem_t* qkv, elem_t* k, elem_t* v, const int* slots, const int* positions,     \
           elem_t* out, float scale, int NH, int T) {                                           \
    griddepcontrol_launch_dependents();                                                         \
    int head = clustered ? cluster_index() : blockIdx.x;                                        \
    attend<warps, clustered, loads>(decode_head(qkv, k, v, slots, positions, out, head, NH, T), \
                                    scale);                                                     \
  }

ATTENTION_ENTRY(attention_decode, , false, AHEAD, WARPS, 2)
ATTENTION_ENTRY(attention_decode_many, , false, MANY_AHEAD, MANY_WARPS, HS <= 64 ? 6 : 4)
#if __CUDA_ARCH__ >= 900
ATTENTION_ENTRY(attention_decode_c2, __cluster_dims__(2), true, AHEAD, WARPS, 2)
ATTENTION_ENTRY(attention_decode_c4, __cluster_dims__(4), true, AHEAD, WARPS, 2)
ATTENTION_ENTRY(attention_decode_c8, __cluster_dims__(8), true, AHEAD, WARPS, 2)
#endif
