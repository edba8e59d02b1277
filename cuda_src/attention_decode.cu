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
//           attention_decode_rows   one smaller block per head: so many rows that blocks wait for
//                                   room; six of them fit a multiprocessor at HS = 64
//
// A row with slot -1 is idle and gives zeros. Nothing beyond position p is read.
#include "common.cuh"

#ifndef HS
#define HS 64
#endif

constexpr int MOST_WARPS = 8;    // of a block; also in gpt2cupy/ops/attention.py
constexpr int FEWEST_WARPS = 4;  // of attention_decode_rows; likewise
constexpr int SPLIT = 8;         // blocks of the largest cluster; likewise

// Turns of loads under way: in a cluster, in a block that has all keys (where bfloat16 would spill
// registers), and among so many blocks that more of them count for more than more loads of each.
constexpr int AHEAD = 4;
template <typename T>
constexpr int AHEAD_ALONE = AHEAD;
template <>
constexpr int AHEAD_ALONE<__half> = HS <= 64 ? 8 : AHEAD;
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

// A softmax in progress: weights exp(score - top) summed in `sum`, values weighted alike.
struct Partial {
  float top, sum, values[CHUNKS][VEC];
};

// The factor that brings a partial from its own maximum to a common one; 0 for an empty partial.
__device__ inline float rescale(float top, float common) {
  return top == MINUS_INFINITY ? 0.0f : expf(top - common);
}

__device__ inline void load_head(const elem_t* source, int lane, float (&values)[CHUNKS][VEC]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int chunk = lane + c * LANES;
    if (chunk * VEC < HS) {
      load_floats(source + chunk * VEC, values[c]);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; i++) values[c][i] = 0.0f;
    }
  }
}

__device__ inline void store_head(elem_t* target, int lane, const float (&values)[CHUNKS][VEC]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int chunk = lane + c * LANES;
    if (chunk * VEC < HS) store_floats(target + chunk * VEC, values[c]);
  }
}

// Merge partials of one channel: their maxima, sums and weighted values (HS apart).
template <int MOST>
__device__ inline void combine(const float* tops,
                               const float* sums,
                               const float* values,
                               int count,
                               float& top,
                               float& sum,
                               float& value) {
  top = MINUS_INFINITY;
  sum = value = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST; i++)
    if (i < count) top = fmaxf(top, tops[i]);
#pragma unroll
  for (int i = 0; i < MOST; i++)
    if (i < count) {
      float factor = rescale(tops[i], top);
      sum += sums[i] * factor;
      value += values[i * HS] * factor;
    }
}

// Keys and values of one turn, as they lie in memory.
struct Pair {
  Vec<elem_t, VEC> key[CHUNKS], value[CHUNKS];
};

__device__ inline void load_packed(const elem_t* source, int lane, Vec<elem_t, VEC> (&to)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int chunk = lane + c * LANES;
    if (chunk * VEC < HS)
      to[c] = *reinterpret_cast<const Vec<elem_t, VEC>*>(source + chunk * VEC);
    else
      to[c] = {};
  }
}

__device__ inline void store_packed(elem_t* to, int lane, const Vec<elem_t, VEC> (&from)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    int chunk = lane + c * LANES;
    if (chunk * VEC < HS) *reinterpret_cast<Vec<elem_t, VEC>*>(to + chunk * VEC) = from[c];
  }
}

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
  int head = blockIdx.x / blocks, row = blockIdx.y;
  int warp = threadIdx.x / WARP;
  int group = threadIdx.x % WARP / LANES, lane = threadIdx.x % LANES;

  if constexpr (CLUSTERED) cluster_begin();  // others may write to this block's shared memory
  release_dependents();
  int slot = slots[row], position = positions[row];
  bool idle = slot < 0 || position < 0 || position >= T;
  if (idle) position = -1;
  size_t C = (size_t)NH * HS;
  out += row * C + head * HS;
  qkv += row * 3 * C + head * HS;
  k += ((size_t)max(slot, 0) * NH + head) * T * HS;
  v += ((size_t)max(slot, 0) * NH + head) * T * HS;

  // A turn of the cluster takes `stride` keys; this group's are own, own + stride, ...
  int stride = blocks * WARPS * GROUPS;
  int own_key = (block * WARPS + warp) * GROUPS + group;
  Pair ahead[AHEAD];
#pragma unroll
  for (int turn = 0; turn < AHEAD; turn++) {
    int t = own_key + turn * stride;
    if (t < position) {
      load_packed(k + (size_t)t * HS, lane, ahead[turn].key);
      load_packed(v + (size_t)t * HS, lane, ahead[turn].value);
    }
  }
  wait_for_inputs();

  float query[CHUNKS][VEC];
  load_head(qkv, lane, query);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) query[c][i] *= scale;

  Partial own;
  own.top = MINUS_INFINITY;
  own.sum = 0.0f;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < VEC; i++) own.values[c][i] = 0.0f;

  // Every group fetches the newest pair beside the query, though one only will take it: a load
  // started later would be waited for.
  Pair newest;
  load_packed(qkv + C, lane, newest.key);
  load_packed(qkv + 2 * C, lane, newest.value);

  auto take = [&](int t, Pair& pair) {
    if (t == position) {
      pair = newest;
      store_packed(k + (size_t)t * HS, lane, pair.key);
      store_packed(v + (size_t)t * HS, lane, pair.value);
    }
    float score = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++)
        score = fmaf(query[c][i], to_float(pair.key[c].value[i]), score);
    // Every lane of the warp takes part; a group past the end drops what it got.
    score = warp_sum<LANES>(score);
    if (t > position) return;
    float top = fmaxf(own.top, score);
    float old = rescale(own.top, top), weight = expf(score - top);
    own.top = top;
    own.sum = own.sum * old + weight;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++)
        own.values[c][i] = own.values[c][i] * old + weight * to_float(pair.value[c].value[i]);
  };

  // The bounds are the same for all lanes of a warp: the shuffles need every one. AHEAD turns stay
  // under way all the time; a load at its turn would be waited for in full.
  for (int first = own_key - group; first <= position; first += AHEAD * stride)
#pragma unroll
    for (int turn = 0; turn < AHEAD; turn++) {
      int t = first + group + turn * stride;
      if (t - group > position) break;
      take(t, ahead[turn]);
      t += AHEAD * stride;
      if (t < position) {
        load_packed(k + (size_t)t * HS, lane, ahead[turn].key);
        load_packed(v + (size_t)t * HS, lane, ahead[turn].value);
      }
    }
  __syncwarp();

  // Merge the groups of the warp.
#pragma unroll
  for (int offset = LANES; offset < WARP; offset *= 2) {
    float top = fmaxf(own.top, __shfl_xor_sync(FULL_MASK, own.top, offset));
    float factor = rescale(own.top, top);
    own.top = top;
    own.sum *= factor;
    own.sum += __shfl_xor_sync(FULL_MASK, own.sum, offset);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        own.values[c][i] *= factor;
        own.values[c][i] += __shfl_xor_sync(FULL_MASK, own.values[c][i], offset);
      }
  }

  // Merge the warps, and hand the result to the first block of the cluster if there is one.
  __shared__ float tops[WARPS], sums[WARPS], values[WARPS][HS];
  if (group == 0) {
    if (lane == 0) {
      tops[warp] = own.top;
      sums[warp] = own.sum;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        int channel = (lane + c * LANES) * VEC + i;
        if (channel < HS) values[warp][channel] = own.values[c][i];
      }
  }
  __syncthreads();
  float value = 0.0f;
  if (threadIdx.x < HS)
    combine<WARPS>(tops, sums, &values[0][threadIdx.x], WARPS, own.top, own.sum, value);
  if constexpr (CLUSTERED) {
    __shared__ float block_tops[SPLIT], block_sums[SPLIT], block_values[SPLIT][HS];
    cluster_wait();
    if (threadIdx.x < HS) {
      cluster_shared(block_values, 0)[block][threadIdx.x] = value;
      if (threadIdx.x == 0) {
        cluster_shared(block_tops, 0)[block] = own.top;
        cluster_shared(block_sums, 0)[block] = own.sum;
      }
    }
    cluster_arrive();
    if (block > 0) return;
    cluster_wait();
    if (threadIdx.x < HS)
      combine<SPLIT>(block_tops, block_sums, &block_values[0][threadIdx.x], blocks, own.top,
                     own.sum, value);
  }
  if (threadIdx.x < HS) out[threadIdx.x] = from_float<elem_t>(idle ? 0.0f : value / own.sum);
}

#define ATTENTION_ENTRY(name, cluster, clustered, ahead, warps, resident)                   \
  extern "C" __global__ void cluster __launch_bounds__(warps* WARP, resident)               \
      name(const elem_t* qkv, elem_t* k, elem_t* v, const int* slots, const int* positions, \
           elem_t* out, float scale, int NH, int T) {                                       \
    attend<warps, clustered, ahead>(qkv, k, v, slots, positions, out, scale, NH, T);        \
  }

ATTENTION_ENTRY(attention_decode, , false, AHEAD_ALONE<elem_t>, MOST_WARPS, 2)
ATTENTION_ENTRY(attention_decode_2, CLUSTER(2), true, AHEAD, MOST_WARPS, 2)
ATTENTION_ENTRY(attention_decode_4, CLUSTER(4), true, AHEAD, MOST_WARPS, 2)
ATTENTION_ENTRY(attention_decode_8, CLUSTER(SPLIT), true, AHEAD, MOST_WARPS, 2)
ATTENTION_ENTRY(attention_decode_rows, , false, AHEAD_ROWS, FEWEST_WARPS, HS <= 64 ? 6 : 4)
