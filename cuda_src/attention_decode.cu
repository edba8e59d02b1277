// Decode attention: one new token per row against its cache, which it extends in the same launch.
//
//   out[b, h] = softmax(scale * q[b, h] . K[slot, h, 0..p]) V[slot, h, 0..p]      p = positions[b]
//
// Shapes    qkv [B, 3C] rows of [q | k | v]; K, V [S, NH, T, HS]; slots, positions [B] int;
//           out [B, C]. All ELEM. K and V at position p are written here, from qkv.
// Bytes     2 (p + 1) HS sizeof ELEM per row and head, plus qkv and out
// FLOPs     4 (p + 1) HS per row and head
// Work      one block per (head, row). A key is read by a group of LANES lanes, VEC elements each;
//           the groups of the block stride over the keys, every one with its own online softmax
//           (running maximum, sum and weighted values), and are merged once at the end: first
//           within each warp by shuffles, then across warps through shared memory.
// Source    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018
//
// A row with slot -1 is idle and gives zeros. Nothing beyond position p is read.
#include "common.cuh"

#ifndef HS
#define HS 64
#endif

constexpr int WARPS = 8;  // also in gpt2cupy/ops/attention.py

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

extern "C" __global__ void __launch_bounds__(WARPS* WARP) attention_decode(const elem_t* qkv,
                                                                           elem_t* k,
                                                                           elem_t* v,
                                                                           const int* slots,
                                                                           const int* positions,
                                                                           elem_t* out,
                                                                           float scale,
                                                                           int NH,
                                                                           int T) {
  int head = blockIdx.x, row = blockIdx.y;
  int warp = threadIdx.x / WARP;
  int group = threadIdx.x % WARP / LANES, lane = threadIdx.x % LANES;
  int slot = slots[row], position = positions[row];
  size_t C = (size_t)NH * HS;
  out += row * C + head * HS;
  if (slot < 0 || position < 0 || position >= T) {
    for (int i = threadIdx.x; i < HS; i += blockDim.x) out[i] = from_float<elem_t>(0.0f);
    return;
  }
  qkv += row * 3 * C + head * HS;
  k += ((size_t)slot * NH + head) * T * HS;
  v += ((size_t)slot * NH + head) * T * HS;

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

  // The bound is the same for all lanes of a warp: the shuffles in the loop need every one.
  for (int first = warp * GROUPS; first <= position; first += WARPS * GROUPS) {
    int t = min(first + group, position);
    bool newest = t == position;
    float key[CHUNKS][VEC], value[CHUNKS][VEC];
    load_head(newest ? qkv + C : k + (size_t)t * HS, lane, key);
    load_head(newest ? qkv + 2 * C : v + (size_t)t * HS, lane, value);

    float score = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++) score = fmaf(query[c][i], key[c][i], score);
    score = warp_sum<LANES>(score);

    if (first + group > position) continue;  // a group past the end went along for the shuffles
    if (newest) {
      store_head(k + (size_t)t * HS, lane, key);
      store_head(v + (size_t)t * HS, lane, value);
    }
    float top = fmaxf(own.top, score);
    float old = rescale(own.top, top), weight = expf(score - top);
    own.top = top;
    own.sum = own.sum * old + weight;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < VEC; i++)
        own.values[c][i] = own.values[c][i] * old + weight * value[c][i];
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

  // Merge the warps.
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
  float top = tops[0];
  for (int w = 1; w < WARPS; w++) top = fmaxf(top, tops[w]);
  for (int i = threadIdx.x; i < HS; i += blockDim.x) {
    float sum = 0.0f, value = 0.0f;
    for (int w = 0; w < WARPS; w++) {
      float factor = rescale(tops[w], top);
      sum += sums[w] * factor;
      value += values[w][i] * factor;
    }
    out[i] = from_float<elem_t>(value / sum);
  }
}
