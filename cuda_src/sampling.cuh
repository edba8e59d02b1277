// What the sampling kernels share: the settings of a row, its token ring, the comparison of two
// tokens, and the noise.
//
// Source    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox);
//           Gumbel-max: Maddison, Tarlow, Minka, 2014
#pragma once

#include "common.cuh"

using u32 = unsigned int;
using u64 = unsigned long long;

#define LARGEST_FLOAT __int_as_float(0x7f7fffff)

struct RowParams {
  u64 seed;
  float temperature;  // 0: greedy
  int top_k;          // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  float repetition;   // 1: off
  float presence;
  float frequency;
  int eos;           // -1: none
  int min_position;  // eos cannot be chosen at a position below this
  int unused;
};

struct alignas(16) RingEntry {
  u32 stamp;
  int id;
  u32 stamp_again;
  float logprob;  // NaN: the row's logits are not finite
};

struct Best {
  float value;
  int id;
};

__device__ inline Best better(Best a, Best b) {
  // NaN loses to every number; of equal values the smaller id is better.
  bool take_b = b.value > a.value || (b.value == a.value && b.id < a.id) || (a.value != a.value);
  return take_b ? b : a;
}

// Push a token to its row's ring. The host polls the stamps: each eight bytes have their own and
// arrive together, so no fence is needed.
__device__ inline void push_token(RingEntry* ring, int size, u32* step, int id, float logprob) {
  RingEntry* entry = ring + *step % size;
  u64 stamp = ++*step;
  *(volatile u64*)&entry->stamp = stamp | (u64)(u32)id << 32;
  *(volatile u64*)&entry->stamp_again = stamp | (u64)__float_as_uint(logprob) << 32;
}

// ---------------------------------------------------------------------------------------------
// noise: one Philox call for four tokens; that of a token depends on (seed, position, id) alone

__device__ inline uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u32 high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    u32 high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// A number between 0 and 1. Near 0 it keeps float's full resolution, and it is small u that makes
// large noise.
__device__ inline float uniform(u32 bits) {
  return fminf(((float)bits + 0.5f) * 2.3283064365386963e-10f, 1.0f - 5.9604644775390625e-8f);
}

__device__ inline float gumbel(u32 bits) { return -logf(-log1pf(-uniform(bits))); }

// The bits of a float as an integer of the same order.
__device__ inline u32 ordered(float x) {
  u32 bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float unordered(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
