// Attention of a persistent step (decode_step.cu): a head of one row, shared by blocks where it has
// many tokens; on tensor cores as in attention_decode_mma.cu.
#pragma once

#include "mma.cuh"
#include "softmax.cuh"
#include "step_words.cuh"

#if __CUDA_ARCH__ >= 900

using Eight = Packed<elem_t, 8>;
constexpr int KEYS = 16;                  // of a warp's turn
constexpr int TOKENS = CONSUMERS * KEYS;  // of a block's
constexpr int CHUNKS = HS / 32;           // of a key: of a lane, 4 lanes a key
static_assert(HS == 64, "a value is eight lanes' channels");

// Query, key and value of the newest token; and what the warps and, behind them, the other blocks
// of the head have found.
struct AttentionRoom {
  alignas(16) elem_t newest[3][HS];
  float tops[2 * CONSUMERS], weights[2 * CONSUMERS];
  alignas(16) float values[2 * CONSUMERS][HS];
};

// A head of a row and a part of its tokens. parts == 0: no job here. idle: the row is not decoded,
// zeros are published.
struct Job {
  int n, head, part, parts, position;
  bool idle;
  size_t cache;  // where the head's keys and values begin in those of a layer

  __device__ int first(int me) const { return part * TOKENS + me / WARP * KEYS; }
  __device__ int stride() const { return parts * TOKENS; }
  // Ask for the past keys and values to come to L2; a warp.
  __device__ void prefetch(const elem_t* k, const elem_t* v) const {
    int t = part * TOKENS + threadIdx.x % WARP * stride(), count = min(TOKENS, position - t);
    if (part >= parts || count <= 0) return;
    prefetch_l2(k + cache + (size_t)t * HS, count * HS * 2);
    prefetch_l2(v + cache + (size_t)t * HS, count * HS * 2);
  }
};

// A lane's keys and values of a turn from token t0, as in attention_decode_mma.cu: of the keys
// `across` and `across + 8`, channels (4 c + along) 8 and on; of the values 2 along, 2 along + 1
// and these + 8, channels 8 across and on.
struct Turn {
  Eight keys[2][CHUNKS], values[4];

  __device__ static int token_of_key(int me, int t0, int i) { return t0 + i * 8 + me % WARP / 4; }
  __device__ static int token_of_value(int me, int t0, int i) {
    return t0 + i / 2 * 8 + me % 4 * 2 + i % 2;
  }
  __device__ static int key_channel(int me, int c) { return (c * 4 + me % 4) * 8; }
  __device__ static int value_channel(int me) { return me % WARP / 4 * 8; }

  __device__ void load(int me, const Job& job, const elem_t* k, const elem_t* v, int t0) {
    auto piece = [&](const elem_t* layer, int t, int channel) {
      return t < job.position
                 ? *reinterpret_cast<const Eight*>(layer + job.cache + (size_t)t * HS + channel)
                 : Eight{};
    };
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        keys[i][c] = piece(k, token_of_key(me, t0, i), key_channel(me, c));
#pragma unroll
    for (int i = 0; i < 4; i++) values[i] = piece(v, token_of_value(me, t0, i), value_channel(me));
  }
};

template <int N>
__device__ inline void attend(int me,
                              Words<N>* words,
                              AttentionRoom& room,
                              unsigned tag,
                              const Job& job,
                              elem_t* k,
                              elem_t* v,
                              float scale) {
  int warp = me / WARP, lane = me % WARP, along = lane % 4, across = lane / 4;
  int position = job.position;
  if (me < CONSUMERS) room.tops[CONSUMERS + me] = LOWEST;
  auto newest = [&](int which, int channel) {
    return *reinterpret_cast<const Eight*>(&room.newest[which][channel]);
  };
  float output[8][4] = {}, top = LOWEST, sum = 0.0f, factor = scale * LOG2_E;
#pragma unroll 1
  for (int t0 = job.first(me), turns = 0; turns == 0 || t0 <= position;
       t0 += job.stride(), turns++) {
    Turn turn;
    turn.load(me, job, k, v, t0);
    if (turns == 0) {
      if (warp < 2) {  // the words of the newest token, four a thread
        int i = min(me, 3 * HS / 4 - 1);
        uint4 w[1];
        wait_for_words(w, tag, [&](int) {
          return poll_four(words->qkv[job.n] + i / (HS / 4) * C + job.head * HS + i % (HS / 4) * 4);
        });
        *reinterpret_cast<uint2*>(&room.newest[0][i * 4]) = elements_of(w[0]);
      }
      sync_consumers();
    }
    if (t0 + KEYS > position && t0 <= position) {
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        Eight key = newest(1, Turn::key_channel(me, c));
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (Turn::token_of_key(me, t0, i) == position) {
            turn.keys[i][c] = key;
            reinterpret_cast<Eight&>(
                k[job.cache + (size_t)position * HS + Turn::key_channel(me, c)]) = key;
          }
      }
      Eight value = newest(2, Turn::value_channel(me));
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (Turn::token_of_value(me, t0, i) == position) {
          turn.values[i] = value;
          reinterpret_cast<Eight&>(v[job.cache + (size_t)position * HS + Turn::value_channel(me)]) =
              value;
        }
    }
    // Of keys 2 along, 2 along + 1, and these + 8: the first two of scores[0] and of scores[1].
    float scores[2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      Eight query = newest(0, Turn::key_channel(me, c));
#pragma unroll
      for (int p = 0; p < 2; p++) {
        unsigned a[4] = {query.words[p * 2], 0, query.words[p * 2 + 1], 0};
#pragma unroll
        for (int i = 0; i < 2; i++)
          mma<elem_t>(scores[i], a, turn.keys[i][c].words[p * 2], turn.keys[i][c].words[p * 2 + 1]);
      }
    }
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      weights[i] = Turn::token_of_value(me, t0, i) > position ? MINUS_INFINITY
                                                              : scores[i / 2][i % 2] * factor;
    float old = take_scores(weights, top, sum);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      output[j][0] *= old;
      output[j][1] *= old;
    }
    unsigned a[4] = {packed<elem_t>(weights[0], weights[1]), 0,
                     packed<elem_t>(weights[2], weights[3]), 0};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      constexpr unsigned LOW = 0x5410, HIGH = 0x7632;  // the halves of two words, side by side
      unsigned which = j % 2 ? HIGH : LOW;
      mma<elem_t>(output[j], a,
                  __byte_perm(turn.values[0].words[j / 2], turn.values[1].words[j / 2], which),
                  __byte_perm(turn.values[2].words[j / 2], turn.values[3].words[j / 2], which));
    }
  }
  sum = warp_sum<4>(sum);
  // All rows of the fragments are alike; the lanes of the first hold n = 2 along and 2 along + 1.
  if (across == 0) {
    if (along == 0) {
      room.tops[warp] = top;
      room.weights[warp] = sum;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float channels[8];
#pragma unroll
      for (int j = 0; j < 8; j++) channels[j] = output[j][i];
      store_floats(&room.values[warp][(along * 2 + i) * 8], channels);
    }
  }
  FloatWord(*found)[HS + 4] = words->found[job.n * (C / HS) + job.head];
  if (job.part == 0 && warp > 0 && warp < job.parts) {  // what another block has found
    FloatWord w[4];
    wait_for_words(w, tag,
                   [&](int i) { return poll(&found[warp][i < 2 ? HS + i : lane * 2 + i - 2]); });
    room.tops[CONSUMERS + warp] = value_of(w[0]);
    room.weights[CONSUMERS + warp] = value_of(w[1]);
    *reinterpret_cast<float2*>(&room.values[CONSUMERS + warp][lane * 2]) = {value_of(w[2]),
                                                                            value_of(w[3])};
  }
  sync_consumers();
  if (me >= HS) return;
  int c = me;
  top = LOWEST;
  sum = 0.0f;
  float result = 0.0f;
#pragma unroll 1
  for (int from = 0; from < (job.part == 0 && job.parts > 1 ? 2 : 1) * CONSUMERS;
       from += CONSUMERS) {
    float tops[CONSUMERS], sums[CONSUMERS], values[CONSUMERS], higher = top;
#pragma unroll
    for (int w = 0; w < CONSUMERS; w++) {
      tops[w] = room.tops[from + w];
      higher = fmaxf(higher, tops[w]);
    }
#pragma unroll
    for (int w = 0; w < CONSUMERS; w++) {
      float share = power_of_two(tops[w] - higher);
      // Entries of parts that do not exist are never written.
      sums[w] = tops[w] == LOWEST ? 0.0f : room.weights[from + w] * share;
      values[w] = tops[w] == LOWEST ? 0.0f : room.values[from + w][c] * share;
    }
    float share = power_of_two(top - higher);
    sum = fmaf(sum, share, sum_of(sums));
    result = fmaf(result, share, sum_of(values));
    top = higher;
  }
  if (job.part > 0) {
    publish(&found[job.part][c], result, tag);
    if (c == 0) {
      publish(&found[job.part][HS], top, tag);
      publish(&found[job.part][HS + 1], sum, tag);
    }
    return;
  }
  publish(&words->attended[job.n][job.head * HS + c], job.idle ? 0.0f : __fdividef(result, sum),
          tag);
}

#endif
