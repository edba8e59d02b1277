// What the kernels of decode_attention() share: which query heads and keys a block has, and where
// its softmax states go.
#pragma once

#include "attention_tensors.cuh"
#include "softmax_state.cuh"

constexpr int MOST_WARPS = 4;  // of a block

// The keys of a sequence that a block reads, for some of the query heads that share them.
struct Part {
  int batch, kv, split;
  int head, heads;  // the first query head, and how many
  int begin, end;   // keys
};

// Block (kv head and group of up to MOST_HEADS query heads, split, sequence). Splits are multiples
// of `tile` keys.
template <int MOST_HEADS>
__device__ inline Part part_of(const int* lengths, int T, int NH, int NKV, int tile) {
  int share = NH / NKV, groups = (share + MOST_HEADS - 1) / MOST_HEADS;
  int kv = blockIdx.x / groups, group = blockIdx.x % groups;
  int keys = min(max(lengths[blockIdx.z], 0), T);
  int tiles = (keys + tile - 1) / tile, each = (tiles + gridDim.y - 1) / gridDim.y * tile;
  int begin = min((int)blockIdx.y * each, keys);
  return {(int)blockIdx.z,
          kv,
          (int)blockIdx.y,
          kv * share + group * MOST_HEADS,
          min(MOST_HEADS, share - group * MOST_HEADS),
          begin,
          min(begin + each, keys)};
}

// Writes channel `channel` of a head: the result, if the block has all keys, else its state.
// states [B, NH, splits, HS + 2]: o, then m and l.
__device__ inline void store_state(const Part& part,
                                   int head,
                                   int channel,
                                   float m,
                                   float l,
                                   float o,
                                   elem_t* out,
                                   float* states,
                                   Strides to,
                                   int NH) {
  if (gridDim.y == 1) {
    out[to.at(part.batch, 0, head) + channel] = from_float<elem_t>(l > 0.0f ? o / l : 0.0f);
    return;
  }
  float* state = states + (((size_t)part.batch * NH + head) * gridDim.y + part.split) * (HS + 2);
  state[channel] = o;
  if (channel == 0) {
    state[HS] = m;
    state[HS + 1] = l;
  }
}
