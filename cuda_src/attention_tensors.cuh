// How the kernels of attention() and decode_attention() see their arrays: any strides between
// sequences, tokens and heads, channels side by side.
#pragma once

#include "common.cuh"

#ifndef HS
#define HS 64
#endif

// In elements.
struct Strides {
  int batch, token, head;
  __device__ size_t at(int b, int t, int h) const {
    return (size_t)batch * b + (size_t)token * t + (size_t)head * h;
  }
};

// Which keys the queries of a sequence see: those before `keys`, and with `causal` none behind
// the query's own position, which is `offset` for query 0.
struct Visible {
  int keys, offset;
  bool causal;

  // One past the last key that query t sees; 0 if it sees none.
  __device__ int end(int t) const { return causal ? max(min(keys, offset + t + 1), 0) : keys; }
};

// Of sequence b. Lengths are clamped to 0 .. S; `offsets` and `lengths` may be null.
__device__ inline Visible visible_of(
    const int* lengths, const int* offsets, int offset, int causal, int b, int T, int S) {
  int keys = lengths ? min(max(lengths[b], 0), S) : S;
  if (offsets) offset = offsets[b];
  // Beyond these bounds nothing changes, and sums cannot overflow.
  return {keys, min(max(offset, -T), S), causal != 0};
}

// One block's worth of work: a tile of queries of a head of a sequence.
struct Item {
  int tile, head, batch;
};

// Item i of `tiles` tiles for each of `heads` heads of all sequences. The heads are dealt with
// `together` at a time, so that their keys and values stay in L2; of these the last tiles, which
// see the most keys, come first.
__device__ inline Item item_of(int i, int tiles, int heads, int NH, int together) {
  int group = i / (together * tiles), rest = i % (together * tiles);
  int count = min(together, heads - group * together);
  int head = group * together + rest % count;
  return {tiles - 1 - rest / count, head % NH, head / NH};
}

// Transposes a square of values that the four lanes of a quad hold: lane i has its row, and then
// its column. So lanes that hold two neighbouring elements of four units each hold one unit whole.
__device__ inline void transpose_quad(unsigned (&x)[4]) {
#pragma unroll
  for (int side = 1; side < 4; side *= 2) {
    bool upper = threadIdx.x & side;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (j & side) continue;
      unsigned received = __shfl_xor_sync(FULL_MASK, upper ? x[j] : x[j + side], side);
      if (upper)
        x[j] = received;
      else
        x[j + side] = received;
    }
  }
}
