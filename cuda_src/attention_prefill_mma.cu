// Causal attention of many new tokens per sequence, on tensor cores.
//
//   out[n, h] = softmax(scale * q[n, h] . K[0..p]) V[0..p]      p = past + n, position of token n
//
// Shapes    as in attention_prefill.cu, which takes float and the head sizes that this cannot
// Dtypes    ELEM is half or bfloat16; scores, sums and output are kept in float
// Bytes     N 4C sizeof ELEM at the least; each query tile reads the keys before it again, from L2
// FLOPs     4 HS per query, head and visible key
// Work      one block per (head, tile of BR queries, sequence). The tiles of BC keys are dealt out
//           to GROUPS groups of WARPS warps, 16 queries a warp, and merged at the end: the last
//           queries see the most keys, and what a prompt takes is their chain of tiles. Each group
//           has two buffers in shared memory, one filled while the other is worked on. Scores come
//           out of mma in the layout in which the next mma takes its left operand, so the weights
//           of the softmax never leave the registers.
// Order     of a query's sums: along the absolute positions of the keys. Where its prompt was cut
//           into pieces, and where it lies in its tile, does not matter: a tile of which it sees
//           nothing changes no bit. What the compiler may fuse or not is spelled out for that.
// Source    Dao, "FlashAttention-2", 2023
//
// Needs sm_80 (mma.m16n8k16, cp.async) and a head size that is a multiple of 16.
#include "mma.cuh"
#include "softmax.cuh"

#ifndef HS
#define HS 64
#endif

#if __CUDA_ARCH__ >= 800 && HS % 16 == 0

// The constants up to the tile's size are also in gpt2cupy/ops/cached_attention.py.
constexpr int GROUPS = 2;
constexpr int WARPS = 4;                // of a group
constexpr int BR = WARPS * 16;          // queries of a block
constexpr int BC = HS <= 64 ? 64 : 32;  // keys of a tile
constexpr int VEC = 8;
constexpr int UNITS = HS / VEC;        // copies of a row
constexpr int THREADS = WARPS * WARP;  // of a group

struct Tile {
  elem_t key[BC * PITCH<UNITS>], value[BC * PITCH<UNITS>];
};

// What a group hands over: for each of its threads two maxima, two sums and its share of the
// weighted values.
constexpr int HANDED = 4 + HS / 2;
constexpr unsigned HANDED_BYTES = HANDED * THREADS * sizeof(float), TILE_BYTES = 2 * sizeof(Tile);
// Bytes of a group: two tiles, and what it hands over lies where they were.
constexpr unsigned GROUP_BYTES = TILE_BYTES > HANDED_BYTES ? TILE_BYTES : HANDED_BYTES;

// A barrier of one group.
__device__ inline void group_sync(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(THREADS) : "memory");
}

// The factor that brings sums from their own maximum to a common one; 0 where there are none.
__device__ inline float rescale(float top, float common) {
  return top == MINUS_INFINITY ? 0.0f : power_of_two(top - common);
}

// Start fetching keys and values t0 .. t0 + BC - 1; those past the end repeat the last.
__device__ inline void fetch(Tile& tile,
                             const elem_t* fresh,
                             const elem_t* k,
                             const elem_t* v,
                             int t0,
                             int keys,
                             int past,
                             int C,
                             int thread) {
#pragma unroll 2  // with more the registers do not last
  for (int i = thread; i < BC * UNITS; i += THREADS) {
    int r = i / UNITS, c = i % UNITS * VEC, t = min(t0 + r, keys - 1);
    int at = place_of<UNITS>(r, i % UNITS);
    // New tokens are read from qkv: the block that writes them to the cache may not have run yet.
    const elem_t* key = t < past ? k + (t * HS + c) : fresh + ((t - past) * 3 * C + c);
    copy_async(&tile.key[at], key);
    copy_async(&tile.value[at], t < past ? v + (t * HS + c) : key + C);
  }
  copy_commit();
}

extern "C" __global__ void __launch_bounds__(GROUPS* THREADS, HS <= 64 ? 2 : 1)
    attention_prefill_mma(const elem_t* qkv,
                          elem_t* k,
                          elem_t* v,
                          const int* starts,
                          const int* slots,
                          const int* past_tokens,
                          elem_t* out,
                          float scale,
                          int NH,
                          int T) {
  extern __shared__ __align__(128) unsigned char memory[];
  release_dependents();
  int head = blockIdx.x, sequence = blockIdx.z;
  // No kernel writes what describes the sequences, so it is read before the wait.
  int start = starts[sequence], count = starts[sequence + 1] - start;
  int past = past_tokens[sequence];
  size_t cache = ((size_t)slots[sequence] * NH + head) * T * HS;
  wait_for_inputs();
  // Later tiles have more keys: start them first, of all heads.
  int first = (gridDim.y - 1 - blockIdx.y) * BR;
  if (first >= count) return;
  int rows = min(BR, count - first), C = NH * HS;
  qkv += (size_t)start * 3 * C + head * HS;
  k += cache;
  v += cache;
  int group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
  int lane = thread % WARP, warp = thread / WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment
  Tile* tiles = reinterpret_cast<Tile*>(memory + group * GROUP_BYTES);

  int keys = past + first + rows;  // one past the last key that any query of the tile sees
  int t0 = group * BC;
  if (t0 < keys) fetch(tiles[0], qkv + C, k, v, t0, keys, past, C, thread);

  // This lane's two queries: rows `across` and `across + 8` of the warp's sixteen.
  unsigned query[HS / 16][4];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int r = min(warp * 16 + across + half * 8, rows - 1);
    const unsigned* row = reinterpret_cast<const unsigned*>(qkv + (first + r) * 3 * C);
#pragma unroll
    for (int c = 0; c < HS / 16; c++) {
      query[c][half] = row[c * 8 + along];
      query[c][half + 2] = row[c * 8 + 4 + along];
    }
  }
  int seen = past + first + warp * 16;  // the last key that the warp's first query sees

  // The new keys and values go to the cache; all are loaded before the first is stored.
  using Piece = Vec<elem_t, VEC>;
  constexpr int COPIES = (BR * UNITS + GROUPS * THREADS - 1) / (GROUPS * THREADS);
  Piece new_keys[COPIES], new_values[COPIES];
  int last = min(rows, T - past - first);  // rows of the tile that have a place
#pragma unroll
  for (int n = 0; n < COPIES; n++) {
    int i = n * GROUPS * THREADS + threadIdx.x;
    const elem_t* token = qkv + (first + i / UNITS) * 3 * C + i % UNITS * VEC;
    if (i >= last * UNITS) break;
    new_keys[n] = *reinterpret_cast<const Piece*>(token + C);
    new_values[n] = *reinterpret_cast<const Piece*>(token + 2 * C);
  }
#pragma unroll
  for (int n = 0; n < COPIES; n++) {
    int i = n * GROUPS * THREADS + threadIdx.x;
    int at = (past + first) * HS + i * VEC;
    if (i >= last * UNITS) break;
    *reinterpret_cast<Piece*>(k + at) = new_keys[n];
    *reinterpret_cast<Piece*>(v + at) = new_values[n];
  }

  float output[HS / 8][4] = {}, top[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {};
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  for (int turn = 0; t0 < keys; t0 += GROUPS * BC, turn ^= 1) {
    copy_wait<0>();
    // After it this tile is there for all, and nobody reads the other any more.
    group_sync(group);
    int next = t0 + GROUPS * BC;
    if (next < keys) fetch(tiles[turn ^ 1], qkv + C, k, v, next, keys, past, C, thread);
    if (t0 > seen + 15) continue;  // no query of this warp sees a key of the tile
    Tile& own = tiles[turn];

    float scores[BC / 8][4] = {};
#pragma unroll
    for (int c = 0; c < HS / 16; c++)
#pragma unroll
      for (int j = 0; j < BC / 16; j++) {
        unsigned b[4];
        int key = j * 16 + lane / 16 * 8 + lane % 8;
        load_matrices(b, &own.key[place_of<UNITS>(key, c * 2 + lane / 8 % 2)]);
        mma<elem_t>(scores[j * 2], query[c], b[0], b[1]);
        mma<elem_t>(scores[j * 2 + 1], query[c], b[2], b[3]);
      }

#pragma unroll
    for (int j = 0; j < BC / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) scores[j][i] = __fmul_rn(scores[j][i], factor);
    if (t0 + BC - 1 > seen) {
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (t0 + j * 8 + along * 2 + i % 2 > seen + across + i / 2 * 8)
            scores[j][i] = MINUS_INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float tile_top = top[half];
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
        tile_top = fmaxf(tile_top, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
      // Four lanes share a row.
      tile_top = fmaxf(tile_top, __shfl_xor_sync(FULL_MASK, tile_top, 1));
      tile_top = fmaxf(tile_top, __shfl_xor_sync(FULL_MASK, tile_top, 2));
      // A query may see none of its group's keys so far: its maximum is then minus infinity.
      float common = tile_top == MINUS_INFINITY ? 0.0f : tile_top;
      float old = rescale(top[half], common);
      top[half] = tile_top;
      sum[half] = __fmul_rn(sum[half], old);
#pragma unroll
      for (int d = 0; d < HS / 8; d++) {
        output[d][half * 2] *= old;
        output[d][half * 2 + 1] *= old;
      }
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = scores[j][half * 2 + i];
          score = power_of_two(score - common);
          sum[half] += score;
        }
    }

#pragma unroll
    for (int j = 0; j < BC / 16; j++) {
      unsigned weights[4] = {packed<elem_t>(scores[j * 2][0], scores[j * 2][1]),
                             packed<elem_t>(scores[j * 2][2], scores[j * 2][3]),
                             packed<elem_t>(scores[j * 2 + 1][0], scores[j * 2 + 1][1]),
                             packed<elem_t>(scores[j * 2 + 1][2], scores[j * 2 + 1][3])};
#pragma unroll
      for (int d = 0; d < HS / 16; d++) {
        unsigned b[4];
        load_matrices_transposed(
            b, &own.value[place_of<UNITS>(j * 16 + lane % 16, d * 2 + lane / 16)]);
        mma<elem_t>(output[d * 2], weights, b[0], b[1]);
        mma<elem_t>(output[d * 2 + 1], weights, b[2], b[3]);
      }
    }
  }

  if (keys > BC) {  // else the first group has seen all
    float (*handed)[THREADS] =
        reinterpret_cast<float (*)[THREADS]>(memory + max(group, 1) * GROUP_BYTES);
    group_sync(group);  // its tiles are read no more
    if (group > 0) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        handed[half][thread] = top[half];
        handed[half + 2][thread] = sum[half];
      }
#pragma unroll
      for (int d = 0; d < HS / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) handed[4 + d * 4 + i][thread] = output[d][i];
    }
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float other = handed[half][thread], common = fmaxf(top[half], other);
      float factors[2] = {rescale(top[half], common), rescale(other, common)};
      sum[half] = fmaf(sum[half], factors[0], handed[half + 2][thread] * factors[1]);
#pragma unroll
      for (int d = 0; d < HS / 8; d++)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; i++)
          output[d][i] = fmaf(output[d][i], factors[0], handed[4 + d * 4 + i][thread] * factors[1]);
    }
  } else if (group > 0) {
    return;
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 1);
    sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 2);
    int r = warp * 16 + across + half * 8;
    if (r >= rows) continue;
    float share = 1.0f / sum[half];
    // Not kept through the loop, which needs every register.
    size_t token = starts[blockIdx.z] + first + r;
    unsigned* row = reinterpret_cast<unsigned*>(out + token * C + blockIdx.x * HS);
#pragma unroll
    for (int d = 0; d < HS / 8; d++)
      row[d * 4 + along] =
          packed<elem_t>(output[d][half * 2] * share, output[d][half * 2 + 1] * share);
  }
}

#endif
