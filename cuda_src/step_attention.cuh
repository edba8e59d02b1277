// Attention of a persistent step (decode_step.cu): a head of one row, shared by blocks where it has
// many tokens; on tensor cores as in attention_decode_mma.cu.
#pragma once

#include "attention_head.cuh"
#include "mma.cuh"
#include "softmax_state.cuh"
#include "step_mailboxes.cuh"

#if __CUDA_ARCH__ >= 900

using Eight = Packed<elem_t, 8>;
constexpr int KEYS = 16;                  // of a warp's tile
constexpr int TOKENS = CONSUMERS * KEYS;  // of a block's
constexpr int CHUNKS = HS / 32;           // of a key: of a lane, 4 lanes a key
static_assert(HS == 64, "a value is eight lanes' channels");

// In shared memory: the query of the newest token, and key and value of each token that the cache
// lacks, up to the newest; and the softmax states of the warps and, behind them, of the other
// blocks of the head.
template <int N>
struct AttentionStorage {
  alignas(16) elem_t newest[1 + 2 * N][HS];
  float m[2 * CONSUMERS], l[2 * CONSUMERS];
  alignas(16) float o[2 * CONSUMERS][HS];
};

// One head of a row and a part of its tokens. parts == 0: there is no job. idle: the row is not
// decoded, and zeros are posted. fresh: its tokens that the cache lacks, which are its own and,
// where all rows belong to one text, those of the rows before.
struct Job {
  int n, head, part, parts, position, fresh;
  bool idle;
  size_t cache;  // offset of the head's keys and values in those of a layer

  __device__ int first(int tid) const { return part * TOKENS + tid / WARP * KEYS; }
  __device__ int stride() const { return parts * TOKENS; }
  // Prefetch the past keys and values to L2; a warp.
  __device__ void prefetch(const elem_t* k, const elem_t* v) const {
    int t = part * TOKENS + threadIdx.x % WARP * stride(), count = min(TOKENS, position - t);
    if (part >= parts || count <= 0) return;
    prefetch_l2(k + cache + (size_t)t * HS, count * HS * 2);
    prefetch_l2(v + cache + (size_t)t * HS, count * HS * 2);
  }
};

// A lane's keys and values of a tile from token t0, as in attention_decode_mma.cu: of the keys
// `across` and `across + 8`, channels (4 c + along) 8 and on; of the values 2 along, 2 along + 1
// and these + 8, channels 8 across and on.
struct KeyTile {
  Eight keys[2][CHUNKS], values[4];

  __device__ static int token_of_key(int tid, int t0, int i) { return t0 + i * 8 + tid % WARP / 4; }
  __device__ static int token_of_value(int tid, int t0, int i) {
    return t0 + i / 2 * 8 + tid % 4 * 2 + i % 2;
  }
  __device__ static int key_channel(int tid, int c) { return (c * 4 + tid % 4) * 8; }
  __device__ static int value_channel(int tid) { return tid % WARP / 4 * 8; }

  __device__ void load(int tid, const Job& job, const elem_t* k, const elem_t* v, int t0) {
    auto piece = [&](const elem_t* layer, int t, int channel) {
      return t < job.position
                 ? *reinterpret_cast<const Eight*>(layer + job.cache + (size_t)t * HS + channel)
                 : Eight{};
    };
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        keys[i][c] = piece(k, token_of_key(tid, t0, i), key_channel(tid, c));
#pragma unroll
    for (int i = 0; i < 4; i++)
      values[i] = piece(v, token_of_value(tid, t0, i), value_channel(tid));
  }
};

template <int N>
__device__ inline void attend(int tid,
                              Mailboxes<N>* mailboxes,
                              AttentionStorage<N>& shared,
                              unsigned flag,
                              const Job& job,
                              elem_t* k,
                              elem_t* v,
                              float scale) {
  int warp = tid / WARP, lane = tid % WARP, along = lane % 4, across = lane / 4;
  int position = job.position;
  if (tid < CONSUMERS) shared.m[CONSUMERS + tid] = LOWEST;
  auto newest = [&](int which, int channel) {
    return *reinterpret_cast<const Eight*>(&shared.newest[which][channel]);
  };
  constexpr int QUADS = HS / 4;  // of a head in the mailboxes
  int oldest = position - job.fresh + 1;
  float o[8][4] = {}, m = LOWEST, l = 0.0f, factor = scale * LOG2_E;
#pragma unroll 1
  for (int t0 = job.first(tid), tiles = 0; tiles == 0 || t0 <= position;
       t0 += job.stride(), tiles++) {
    KeyTile tile;
    tile.load(tid, job, k, v, t0);
    if (tiles == 0) {
      // The mailboxes of the fresh tokens, four a thread.
      int quads = N == 1 ? 3 * QUADS : (1 + 2 * job.fresh) * QUADS;
      if (warp < (quads + WARP - 1) / WARP) {
        int i = min(tid, quads - 1), which = i / QUADS;
        int row = job.n, matrix = which;  // query, key, value
        if (N > 1 && which > 0) {
          row += (which + 1) / 2 - job.fresh;
          matrix = 2 - which % 2;
        }
        uint4 w[1];
        wait_for_flag(w, flag, [&](int) {
          return poll_four(mailboxes->qkv[row] + matrix * C + job.head * HS + i % QUADS * 4);
        });
        *reinterpret_cast<uint2*>(&shared.newest[0][i * 4]) = elements_of(w[0]);
      }
      sync_consumers();
    }
    if (t0 + KEYS > oldest && t0 <= position) {
#pragma unroll
      for (int fresh = 0; fresh < N; fresh++) {
        int at = N == 1 ? position : oldest + fresh;
        if (at > position) break;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
          Eight key = newest(1 + 2 * fresh, KeyTile::key_channel(tid, c));
#pragma unroll
          for (int i = 0; i < 2; i++)
            if (KeyTile::token_of_key(tid, t0, i) == at) {
              tile.keys[i][c] = key;
              if (at == position)
                reinterpret_cast<Eight&>(
                    k[job.cache + (size_t)position * HS + KeyTile::key_channel(tid, c)]) = key;
            }
        }
        Eight value = newest(2 + 2 * fresh, KeyTile::value_channel(tid));
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (KeyTile::token_of_value(tid, t0, i) == at) {
            tile.values[i] = value;
            if (at == position)
              reinterpret_cast<Eight&>(
                  v[job.cache + (size_t)position * HS + KeyTile::value_channel(tid)]) = value;
          }
      }
    }
    // Of keys 2 along, 2 along + 1, and these + 8: the first two of scores[0] and of scores[1].
    float scores[2][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      Eight query = newest(0, KeyTile::key_channel(tid, c));
#pragma unroll
      for (int p = 0; p < 2; p++) {
        unsigned a[4] = {query.words[p * 2], 0, query.words[p * 2 + 1], 0};
#pragma unroll
        for (int i = 0; i < 2; i++)
          mma<elem_t>(scores[i], a, tile.keys[i][c].words[p * 2], tile.keys[i][c].words[p * 2 + 1]);
      }
    }
    float weights[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      weights[i] = KeyTile::token_of_value(tid, t0, i) > position ? MINUS_INFINITY
                                                                  : scores[i / 2][i % 2] * factor;
    float old = add_scores(weights, m, l);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      o[j][0] *= old;
      o[j][1] *= old;
    }
    unsigned a[4] = {packed<elem_t>(weights[0], weights[1]), 0,
                     packed<elem_t>(weights[2], weights[3]), 0};
#pragma unroll
    for (int j = 0; j < 8; j++) {
      constexpr unsigned LOW = 0x5410,
                         HIGH = 0x7632;  // the 16-bit parts of two words, side by side
      unsigned which = j % 2 ? HIGH : LOW;
      mma<elem_t>(o[j], a,
                  __byte_perm(tile.values[0].words[j / 2], tile.values[1].words[j / 2], which),
                  __byte_perm(tile.values[2].words[j / 2], tile.values[3].words[j / 2], which));
    }
  }
  l = warp_sum<4>(l);
  // All rows of the fragments are alike; the lanes of the first hold n = 2 along and 2 along + 1.
  if (across == 0) {
    if (along == 0) {
      shared.m[warp] = m;
      shared.l[warp] = l;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float channels[8];
#pragma unroll
      for (int j = 0; j < 8; j++) channels[j] = o[j][i];
      store_floats(&shared.o[warp][(along * 2 + i) * 8], channels);
    }
  }
  FloatMailbox(*states)[HS + 4] = mailboxes->states[job.n * (C / HS) + job.head];
  if (job.part == 0 && warp > 0 && warp < job.parts) {  // the state of another block
    FloatMailbox w[4];
    wait_for_flag(w, flag,
                  [&](int i) { return poll(&states[warp][i < 2 ? HS + i : lane * 2 + i - 2]); });
    shared.m[CONSUMERS + warp] = value_of(w[0]);
    shared.l[CONSUMERS + warp] = value_of(w[1]);
    *reinterpret_cast<float2*>(&shared.o[CONSUMERS + warp][lane * 2]) = {value_of(w[2]),
                                                                         value_of(w[3])};
  }
  sync_consumers();
  if (tid >= HS) return;
  int c = tid;
  m = LOWEST;
  l = 0.0f;
  float result = 0.0f;
#pragma unroll 1
  for (int from = 0; from < (job.part == 0 && job.parts > 1 ? 2 : 1) * CONSUMERS;
       from += CONSUMERS) {
    float ms[CONSUMERS], ls[CONSUMERS], os[CONSUMERS], higher = m;
#pragma unroll
    for (int w = 0; w < CONSUMERS; w++) {
      ms[w] = shared.m[from + w];
      higher = fmaxf(higher, ms[w]);
    }
#pragma unroll
    for (int w = 0; w < CONSUMERS; w++) {
      float rescale = power_of_two(ms[w] - higher);
      // States of parts that do not exist are never written.
      ls[w] = ms[w] == LOWEST ? 0.0f : shared.l[from + w] * rescale;
      os[w] = ms[w] == LOWEST ? 0.0f : shared.o[from + w][c] * rescale;
    }
    float rescale = power_of_two(m - higher);
    l = fmaf(l, rescale, sum_of(ls));
    result = fmaf(result, rescale, sum_of(os));
    m = higher;
  }
  if (job.part > 0) {
    post(&states[job.part][c], result, flag);
    if (c == 0) {
      post(&states[job.part][HS], m, flag);
      post(&states[job.part][HS + 1], l, flag);
    }
    return;
  }
  post(&mailboxes->attended[job.n][job.head * HS + c], job.idle ? 0.0f : __fdividef(result, l),
       flag);
}

#endif
