// Exchange of values between the blocks of a grid that is resident as a whole, through flagged
// mailboxes in global memory, as NCCL's LL protocol: a value and its flag are one word, stored and
// loaded at once, and a reader polls until the word has the flag it waits for. No barrier, no
// fence, nothing to reset (sm_90 and newer, like its user).
//
// The flag is the number of the layer since the first step. A float has 32 bits for it, an element
// 16. Each mailbox of an element is written once a layer, so a reader finds either its flag or the
// one before. Those of partial softmax states may be older by any number of layers, for fewer
// blocks may have shared a head then: they are floats.
#pragma once

#include "common.cuh"

#if __CUDA_ARCH__ >= 900

using FloatMailbox = unsigned long long;
using ElemMailbox = unsigned;

__device__ inline void post(FloatMailbox* mailbox, float value, unsigned flag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(mailbox),
               "l"((FloatMailbox)flag << 32 | __float_as_uint(value))
               : "memory");
}
__device__ inline void post(ElemMailbox* mailbox, float value, unsigned flag) {
  elem_t rounded = from_float<elem_t>(value);
  unsigned bits = *reinterpret_cast<unsigned short*>(&rounded);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(mailbox), "r"(bits | flag << 16)
               : "memory");
}

// One mailbox of a float, and four neighbours of elements, as they are now.
__device__ inline FloatMailbox poll(const FloatMailbox* mailbox) {
  FloatMailbox word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(mailbox) : "memory");
  return word;
}
__device__ inline uint4 poll_four(const ElemMailbox* mailboxes) {
  uint4 words;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(mailboxes)
               : "memory");
  return words;
}

// Whether all of it has this flag, and the values.
__device__ inline bool has_flag(FloatMailbox word, unsigned flag) { return word >> 32 == flag; }
__device__ inline bool has_flag(const uint4& words, unsigned flag) {
  unsigned want = flag << 16;
  return (((words.x ^ want) | (words.y ^ want) | (words.z ^ want) | (words.w ^ want)) >> 16) == 0;
}
__device__ inline float value_of(FloatMailbox word) { return __uint_as_float((unsigned)word); }
__device__ inline uint2 elements_of(const uint4& words) {
  return {__byte_perm(words.x, words.y, 0x5410), __byte_perm(words.z, words.w, 0x5410)};
}

// The spin timeout: a kernel that polls for ten seconds ends with an error. The clock is read once
// in 4096 polls.
struct SpinTimeout {
  unsigned polls = 0;
  unsigned long long since = 0;
  __device__ void count() {
    if (++polls % 4096) return;
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (!since) since = now;
    if (now - since > 10000000000ull) __trap();
  }
};

// Polls until all words have this flag, all lanes of a warp together: divergence costs more
// instructions than it saves loads. A lane with several polls the first until it has arrived and
// only then the others: polling all would keep the memory from the writers.
template <int COUNT, typename word_t, typename poll_t>
__device__ inline void wait_for_flag(word_t (&words)[COUNT], unsigned flag, poll_t poll) {
  SpinTimeout timeout;
  do {
    words[0] = poll(0);
    timeout.count();
  } while (!__all_sync(FULL_MASK, has_flag(words[0], flag)));
  for (bool all = COUNT == 1; !all; timeout.count()) {
#pragma unroll
    for (int i = 1; i < COUNT; i++) words[i] = poll(i);
    all = true;
#pragma unroll
    for (int i = 1; i < COUNT; i++) all &= has_flag(words[i], flag);
    all = __all_sync(FULL_MASK, all);
  }
}

#endif
