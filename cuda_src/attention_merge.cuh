// How the warps and blocks that share a query of decode attention bring their findings together.
#pragma once

#include "handover.cuh"
#include "softmax.cuh"

#ifndef HS
#define HS 64
#endif

constexpr int SPLIT = 8;  // blocks of the largest cluster; also in gpt2cupy/ops/cached_attention.py

// An empty partial softmax has LOWEST as its maximum and not minus infinity, whose difference to
// itself is no number: so nothing has to be asked before a factor is taken.
//
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

// What the other blocks of a cluster tell the first, and how much of it has come.
struct FromBlocks {
  Findings<SPLIT> findings;
  Counter counter;
};

// Prepare for it; all threads of all blocks, before anything is sent.
__device__ inline void open_to_blocks(FromBlocks& from, int block) {
  if (block == 0 && threadIdx.x == 0) open_counter(&from.counter);
  cluster_begin();
}

// Bytes that a block sends.
constexpr unsigned SENT = (HS + 2) * sizeof(float);

// Give the findings of this block to the first.
__device__ inline void send_findings(
    const FromBlocks& from, int block, int channel, float top, float sum, float value) {
  const Findings<SPLIT>& place = from.findings;
  send(&place.values[block][channel], &from.counter, 0, value);
  if (channel == 0) {
    send(&place.tops[block], &from.counter, 0, top);
    send(&place.sums[block], &from.counter, 0, sum);
  }
}

// Merge the findings of `count` blocks with those of the first, which calls it.
__device__ inline void merge_blocks(
    FromBlocks& from, int count, int channel, float& top, float& sum, float& value) {
  wait_for_bytes(&from.counter);
  float tops[SPLIT], sums[SPLIT], values[SPLIT];
  tops[0] = top;
  sums[0] = sum;
  values[0] = value;
#pragma unroll
  for (int b = 1; b < SPLIT; b++) {
    bool there = b < count;
    tops[b] = there ? from.findings.tops[b] : LOWEST;
    sums[b] = there ? from.findings.sums[b] : 0.0f;
    values[b] = there ? from.findings.values[b][channel] : 0.0f;
  }
  combine(tops, sums, values, top, sum, value);
}

// What the warps of the `count` blocks found becomes the output of the head: all threads come here,
// after a barrier. `count` is 1 where blocks do not share a query.
template <int WARPS, bool CLUSTERED>
__device__ inline void finish(
    const Findings<WARPS>& warps, FromBlocks& from, int block, int count, bool idle, elem_t* out) {
  if constexpr (CLUSTERED)
    if (count > 1) {
      cluster_wait();  // the first block is prepared
      if (block == 0 && threadIdx.x == 0) expect_bytes(&from.counter, (count - 1) * SENT);
    }
  for (int channel = threadIdx.x; channel < HS; channel += WARPS * WARP) {
    float tops[WARPS], sums[WARPS], values[WARPS], top, sum, value;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      tops[w] = warps.tops[w];
      sums[w] = warps.sums[w];
      values[w] = warps.values[w][channel];
    }
    combine(tops, sums, values, top, sum, value);
    if constexpr (CLUSTERED)
      if (count > 1) {
        if (block > 0) {
          send_findings(from, block, channel, top, sum, value);
          continue;
        }
        merge_blocks(from, count, channel, top, sum, value);
      }
    out[channel] = from_float<elem_t>(idle ? 0.0f : __fdividef(value, sum));
  }
}
