// Values handed over between the blocks of a grid that is resident as a whole: each in a word with
// the number of its layer, its tag, which readers ask for until it is there. No barrier, no fence,
// nothing to reset (sm_90 and newer, like what uses it).
//
// The word of a float has 32 bits for the tag, that of an element 16. All words of elements are
// written once a layer, so a reader finds either its tag or the one before. What blocks find of a
// head may be older by any number of layers, for fewer may have shared it then: floats.
#pragma once

#include "common.cuh"

#if __CUDA_ARCH__ >= 900

using FloatWord = unsigned long long;
using ElemWord = unsigned;

__device__ inline void publish(FloatWord* word, float value, unsigned tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word),
               "l"((FloatWord)tag << 32 | __float_as_uint(value))
               : "memory");
}
__device__ inline void publish(ElemWord* word, float value, unsigned tag) {
  elem_t rounded = from_float<elem_t>(value);
  unsigned bits = *reinterpret_cast<unsigned short*>(&rounded);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(bits | tag << 16) : "memory");
}

// The word of a float, and four neighbours of elements, as they are now.
__device__ inline FloatWord poll(const FloatWord* word) {
  FloatWord found;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
  return found;
}
__device__ inline uint4 poll_four(const ElemWord* words) {
  uint4 found;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(words)
               : "memory");
  return found;
}

// Whether they are of this tag, and what they say.
__device__ inline bool is_of(FloatWord word, unsigned tag) { return word >> 32 == tag; }
__device__ inline bool is_of(const uint4& words, unsigned tag) {
  unsigned want = tag << 16;
  return (((words.x ^ want) | (words.y ^ want) | (words.z ^ want) | (words.w ^ want)) >> 16) == 0;
}
__device__ inline float value_of(FloatWord word) { return __uint_as_float((unsigned)word); }
__device__ inline uint2 elements_of(const uint4& words) {
  return {__byte_perm(words.x, words.y, 0x5410), __byte_perm(words.z, words.w, 0x5410)};
}

// Counts how often somebody asked; a kernel that waits ten seconds ends with an error.
struct Patience {
  unsigned asked = 0;
  unsigned long long since = 0;
  __device__ void again() {
    if (++asked % 4096) return;
    unsigned long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (!since) since = now;
    if (now - since > 10000000000ull) __trap();
  }
};

// Asks for words until all are of this tag, all lanes of a warp together: what diverges costs more
// instructions than it saves loads. Of a lane's several, the first is asked for until it is there
// and only then the others: asking for all would keep the memory from those who write them.
template <int COUNT, typename word_t, typename ask_t>
__device__ inline void wait_for_words(word_t (&words)[COUNT], unsigned tag, ask_t ask) {
  Patience patience;
  do {
    words[0] = ask(0);
    patience.again();
  } while (!__all_sync(FULL_MASK, is_of(words[0], tag)));
  for (bool all = COUNT == 1; !all; patience.again()) {
#pragma unroll
    for (int i = 1; i < COUNT; i++) words[i] = ask(i);
    all = true;
#pragma unroll
    for (int i = 1; i < COUNT; i++) all &= is_of(words[i], tag);
    all = __all_sync(FULL_MASK, all);
  }
}

#endif
