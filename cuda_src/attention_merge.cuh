// How the warps and blocks that share a query of decode attention bring their findings together.
#pragma once

#include "softmax.cuh"

#ifndef HS
#define HS 64
#endif

constexpr int SPLIT = 8;  // blocks of the largest cluster; also in gpt2cupy/ops/attention.py

// An empty partial softmax has the smallest number as its maximum and not minus infinity, whose
// difference to itself is no number: so nothing has to be asked before a factor is taken.
constexpr float LOWEST = -3.4028235e38f;

// Maximum, sum of weights and weighted values of each of COUNT partial softmaxes.
// Values are stored 16 bytes at a time; COUNT is even.
template <int COUNT>
struct alignas(16) Findings {
  float tops[COUNT], sums[COUNT], values[COUNT][HS];
};

// COUNT partial softmaxes of one channel as one.
template <int COUNT>
__device__ inline void combine(const float (&tops)[COUNT],
                               const float (&sums)[COUNT],
                               const float (&values)[COUNT],
                               float& top,
                               float& sum,
                               float& value) {
  top = tops[0];
#pragma unroll
  for (int i = 1; i < COUNT; i++) top = fmaxf(top, tops[i]);
  sum = value = 0.0f;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    float factor = power_of_two(tops[i] - top);
    sum = fmaf(sums[i], factor, sum);
    value = fmaf(values[i], factor, value);
  }
}

// Prepare the first block of a cluster for the findings of the others, and tell them.
__device__ inline void open_to_blocks(Findings<SPLIT>& blocks, int block) {
  constexpr int SIZE = sizeof(blocks) / sizeof(float);
  if (block == 0)
    for (int i = threadIdx.x; i < SIZE; i += blockDim.x)
      reinterpret_cast<float*>(&blocks)[i] = __uint_as_float(PENDING);
  cluster_arrive();
}

// Give the findings of the `count` blocks that share the query to the first, which returns true.
__device__ inline bool meet_blocks(Findings<SPLIT>& blocks,
                                   int block,
                                   int count,
                                   int channel,
                                   float& top,
                                   float& sum,
                                   float& value) {
  if (block > 0) {
    Findings<SPLIT>& there = *cluster_shared(&blocks, 0);
    send_to_block(&there.values[block][channel], value);
    if (channel == 0) {
      send_to_block(&there.tops[block], top);
      send_to_block(&there.sums[block], sum);
    }
    return false;
  }
  float tops[SPLIT], sums[SPLIT], values[SPLIT];
  bool waiting;
  do {
    waiting = false;
#pragma unroll
    for (int b = 1; b < SPLIT; b++) {
      tops[b] = look_for(&blocks.tops[b]);
      sums[b] = look_for(&blocks.sums[b]);
      values[b] = look_for(&blocks.values[b][channel]);
      waiting |= b < count && (pending(tops[b]) || pending(sums[b]) || pending(values[b]));
    }
  } while (waiting);
  tops[0] = top;
  sums[0] = sum;
  values[0] = value;
#pragma unroll
  for (int b = 1; b < SPLIT; b++)
    if (b >= count) {
      tops[b] = LOWEST;
      sums[b] = values[b] = 0.0f;
    }
  combine(tops, sums, values, top, sum, value);
  return true;
}

// What the warps of the `count` blocks found becomes the output of the head: all threads come here,
// after a barrier. `count` is 1 where blocks do not share a query.
template <int WARPS, bool CLUSTERED>
__device__ inline void finish(const Findings<WARPS>& warps,
                              Findings<SPLIT>& blocks,
                              int block,
                              int count,
                              bool idle,
                              elem_t* out) {
  if constexpr (CLUSTERED)
    if (count > 1) cluster_wait();  // the first block is prepared
  for (int channel = threadIdx.x; channel < HS; channel += WARPS * WARP) {
    float tops[WARPS], sums[WARPS], values[WARPS], top, sum, value;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      tops[w] = warps.tops[w];
      sums[w] = warps.sums[w];
      values[w] = warps.values[w][channel];
    }
    combine(tops, sums, values, top, sum, value);
    bool mine = true;
    if constexpr (CLUSTERED)
      if (count > 1) mine = meet_blocks(blocks, block, count, channel, top, sum, value);
    if (mine) out[channel] = from_float<elem_t>(idle ? 0.0f : __fdividef(value, sum));
  }
}
