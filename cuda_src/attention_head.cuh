// One head of one sequence, as the attention kernels see it: where its new tokens lie in the rows
// of [q | k | v], and where its past lies in the cache.
//
// Shapes    qkv [N, 3C]; K, V [S, NH, T, HS]; out [N, C]; C = NH HS
#pragma once

#include "common.cuh"

#ifndef HS
#define HS 64
#endif

// A distance between heads is a number of heads, of HS elements each: the compiler computes an
// address from two ints and the constant HS with fewer instructions and registers than from a
// stride in elements. A kernel that reads many tokens goes from q alone, by to_k and to_v: every
// pointer that a loop uses takes two registers.
struct Head {
  const elem_t *q, *new_k, *new_v;  // of the first new token; of the next, qkv_heads on
  elem_t *k, *v;                    // of the slot [T, HS]
  elem_t* out;                      // of the first new token; of the next, out_heads on
  int past;                         // tokens that the cache has
  int count;                        // new tokens; none in an idle row
  int qkv_heads, out_heads;         // heads of a row of qkv, and of out
  int to_k, to_v;                   // heads from q to new_k and new_v
};

// Where the keys of a head begin in one layer of the cache.
__device__ inline size_t cache_offset(int slot, int head, int NH, int T) {
  return ((size_t)slot * NH + head) * T * HS;
}

// A head of `count` tokens that follow `past` others and whose rows begin at `row`.
__device__ inline Head head_of(const elem_t* qkv,
                               elem_t* k,
                               elem_t* v,
                               elem_t* out,
                               int row,
                               int slot,
                               int past,
                               int count,
                               int head,
                               int NH,
                               int T) {
  size_t C = (size_t)NH * HS;
  size_t cache = cache_offset(slot, head, NH, T);
  qkv += row * 3 * C + head * HS;
  out += row * C + head * HS;
  return {qkv,  qkv + C, qkv + 2 * C, k + cache, v + cache, out,
          past, count,   3 * NH,      NH,        NH,        2 * NH};
}

// A head of row `row` of a decode batch: one new token, or none if the slot is -1 or the position
// outside the cache.
__device__ inline Head decode_head(const elem_t* qkv,
                                   elem_t* k,
                                   elem_t* v,
                                   const int* slots,
                                   const int* positions,
                                   elem_t* out,
                                   int head,
                                   int NH,
                                   int T) {
  int row = blockIdx.y, slot = slots[row], position = positions[row];
  bool idle = slot < 0 || position < 0 || position >= T;
  return head_of(qkv, k, v, out, row, max(slot, 0), idle ? -1 : position, !idle, head, NH, T);
}

// A head of a sequence of packed prompts.
__device__ inline Head prefill_head(const elem_t* qkv,
                                    elem_t* k,
                                    elem_t* v,
                                    const int* starts,
                                    const int* slots,
                                    const int* past,
                                    elem_t* out,
                                    int head,
                                    int sequence,
                                    int NH,
                                    int T) {
  int start = starts[sequence], count = starts[sequence + 1] - start;
  return head_of(qkv, k, v, out, start, slots[sequence], past[sequence], count, head, NH, T);
}
