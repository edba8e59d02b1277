// Causal attention of many new tokens per sequence, on tensor cores.
//
//   out[n, h] = softmax(scale * q[n, h] . K[0..p]) V[0..p]      p = past + n, position of token n
//
// Shapes    as in attention_prefill.cu, which takes float and the head sizes that this cannot
// Dtypes    ELEM is fp16 or bf16; scores, sums and output are kept in float
// Bytes     N 4C sizeof ELEM at the least; each query tile reads the keys before it again, from L2
// FLOPs     4 HS per query, head and visible key
// Work      one block per (head, tile of BR queries, sequence). GROUPS groups of WARPS warps, 16
//           queries a warp, share the tiles of BC keys, and their softmax states are merged at the
//           end: the last queries see the most keys, and the time of a prompt is that of their
//           chain of tiles. Each group has two buffers in shared memory, one filled while the other
//           is used. Scores leave mma in the layout in which the next mma takes its left operand,
//           so the weights of the softmax stay in registers.
// Order     A query's sums run along the absolute positions of the keys. It does not matter where
//           its prompt was cut into pieces, nor where it lies in its tile: a tile of which it sees
//           no key changes no bit. What the compiler may fuse is spelled out for that.
// Source    Dao, "FlashAttention-2", 2023
//
// Needs sm_80 (mma.m16n8k16, cp.async) and a head size that is a multiple of 16.
#include "attention_head.cuh"
#include "mma.cuh"
#include "softmax_state.cuh"

#if __CUDA_ARCH__ >= 800 && HS % 16 == 0

constexpr int GROUPS = 2;
constexpr int WARPS = 4;                // of a group
constexpr int BR = WARPS * 16;          // queries of a block
constexpr int BC = HS <= 64 ? 64 : 32;  // keys of a tile
constexpr int VEC = 8;
constexpr int UNITS = HS / VEC;        // copies of a row
constexpr int THREADS = WARPS * WARP;  // of a group

struct KeyTile {
  elem_t key[BC * PITCH<UNITS>], value[BC * PITCH<UNITS>];
};

// The softmax states of a group: of each of its threads two m, two l and its share of o.
constexpr int STATE_BYTES = (4 + HS / 2) * THREADS * 4;
// Bytes of a group: two tiles, and later its states in their place.
constexpr int TILES_BYTES = 2 * 2 * BC * PITCH<UNITS> * 2;
constexpr int GROUP_BYTES = TILES_BYTES > STATE_BYTES ? TILES_BYTES : STATE_BYTES;
constexpr int SHARED_BYTES = GROUPS * GROUP_BYTES;  // dynamic, of a block
static_assert(TILES_BYTES == 2 * sizeof(KeyTile), "the launch asks for so much");

// A named barrier of one group.
__device__ inline void group_sync(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(THREADS) : "memory");
}

// The factor that brings a state to a common maximum; 0 where it is empty.
__device__ inline float rescale(float m, float common) {
  return m == MINUS_INFINITY ? 0.0f : power_of_two(m - common);
}

// Start copying keys and values t0 .. t0 + BC - 1; those past the end repeat the last.
__device__ inline void fetch(KeyTile& tile, const Head& head, int t0, int keys, int thread) {
#pragma unroll 2  // with more the registers do not last
  for (int i = thread; i < BC * UNITS; i += THREADS) {
    int r = i / UNITS, c = i % UNITS * VEC, t = min(t0 + r, keys - 1);
    int at = swizzled<UNITS>(r, i % UNITS);
    // New tokens are read from qkv: the block that writes them to the cache may not have run yet.
    const elem_t* key = t < head.past
                            ? head.k + (t * HS + c)
                            : head.q + ((t - head.past) * head.qkv_heads * HS + head.to_k * HS + c);
    cp_async(&tile.key[at], key);
    cp_async(&tile.value[at],
             t < head.past ? head.v + (t * HS + c) : key + (head.to_v - head.to_k) * HS);
  }
  cp_async_commit();
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
  griddepcontrol_launch_dependents();
  int sequence = blockIdx.z;
  // No kernel writes what describes the sequences, so it is read before the wait.
  Head head = prefill_head(qkv, k, v, starts, slots, past_tokens, out, blockIdx.x, sequence, NH, T);
  int past = head.past;
  griddepcontrol_wait();
  // Later tiles have more keys: start them first, of all heads.
  int first = (gridDim.y - 1 - blockIdx.y) * BR;
  if (first >= head.count) return;
  int rows = min(BR, head.count - first);
  int group = threadIdx.x / THREADS, thread = threadIdx.x % THREADS;
  int lane = thread % WARP, warp = thread / WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment
  KeyTile* tiles = reinterpret_cast<KeyTile*>(memory + group * GROUP_BYTES);

  int keys = past + first + rows;  // one past the last key that any query of the tile sees
  int t0 = group * BC;
  if (t0 < keys) fetch(tiles[0], head, t0, keys, thread);

  // This lane's two queries: rows `across` and `across + 8` of the warp's sixteen.
  unsigned query[HS / 16][4];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int r = min(warp * 16 + across + half * 8, rows - 1);
    const unsigned* row =
        reinterpret_cast<const unsigned*>(head.q + (first + r) * head.qkv_heads * HS);
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
  int k_to_v = (head.to_v - head.to_k) * HS;  // one pointer for both
  int last = min(rows, T - past - first);     // rows of the tile that have a place
#pragma unroll
  for (int n = 0; n < COPIES; n++) {
    int i = n * GROUPS * THREADS + threadIdx.x;
    int from = (first + i / UNITS) * head.qkv_heads * HS + i % UNITS * VEC;
    if (i >= last * UNITS) break;
    new_keys[n] = *reinterpret_cast<const Piece*>(head.new_k + from);
    new_values[n] = *reinterpret_cast<const Piece*>(head.new_k + from + k_to_v);
  }
#pragma unroll
  for (int n = 0; n < COPIES; n++) {
    int i = n * GROUPS * THREADS + threadIdx.x;
    int at = (past + first) * HS + i * VEC;
    if (i >= last * UNITS) break;
    *reinterpret_cast<Piece*>(head.k + at) = new_keys[n];
    *reinterpret_cast<Piece*>(head.v + at) = new_values[n];
  }

  float o[HS / 8][4] = {}, m[2] = {MINUS_INFINITY, MINUS_INFINITY}, l[2] = {};
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  for (; t0 < keys; t0 += GROUPS * BC) {
    int buffer = t0 / (GROUPS * BC) % 2;  // computed: the loop needs every register
    cp_async_wait<0>();
    // Behind it the tile is complete for all threads, and the other is read no more.
    group_sync(group);
    int next = t0 + GROUPS * BC;
    if (next < keys) fetch(tiles[buffer ^ 1], head, next, keys, thread);
    if (t0 > seen + 15) continue;  // no query of this warp sees a key of the tile
    KeyTile& own = tiles[buffer];

    float scores[BC / 8][4] = {};
#pragma unroll
    for (int c = 0; c < HS / 16; c++)
#pragma unroll
      for (int j = 0; j < BC / 16; j++) {
        unsigned b[4];
        int key = j * 16 + lane / 16 * 8 + lane % 8;
        ldmatrix(b, &own.key[swizzled<UNITS>(key, c * 2 + lane / 8 % 2)]);
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
      float larger = m[half];
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
        larger = fmaxf(larger, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
      // Four lanes share a row.
      larger = fmaxf(larger, __shfl_xor_sync(FULL_MASK, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(FULL_MASK, larger, 2));
      // A query may see none of its group's keys so far: its maximum is then minus infinity.
      float common = larger == MINUS_INFINITY ? 0.0f : larger;
      float old = rescale(m[half], common);
      m[half] = larger;
      l[half] = __fmul_rn(l[half], old);
#pragma unroll
      for (int d = 0; d < HS / 8; d++) {
        o[d][half * 2] *= old;
        o[d][half * 2 + 1] *= old;
      }
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = scores[j][half * 2 + i];
          score = power_of_two(score - common);
          l[half] += score;
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
        ldmatrix_trans(b, &own.value[swizzled<UNITS>(j * 16 + lane % 16, d * 2 + lane / 16)]);
        mma<elem_t>(o[d * 2], weights, b[0], b[1]);
        mma<elem_t>(o[d * 2 + 1], weights, b[2], b[3]);
      }
    }
  }

  if (keys > BC) {  // else the first group has seen all
    float (*states)[THREADS] =
        reinterpret_cast<float (*)[THREADS]>(memory + max(group, 1) * GROUP_BYTES);
    group_sync(group);  // its tiles are read no more
    if (group > 0) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        states[half][thread] = m[half];
        states[half + 2][thread] = l[half];
      }
#pragma unroll
      for (int d = 0; d < HS / 8; d++)
#pragma unroll
        for (int i = 0; i < 4; i++) states[4 + d * 4 + i][thread] = o[d][i];
    }
    __syncthreads();
    if (group > 0) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float other = states[half][thread], common = fmaxf(m[half], other);
      float factors[2] = {rescale(m[half], common), rescale(other, common)};
      l[half] = fmaf(l[half], factors[0], states[half + 2][thread] * factors[1]);
#pragma unroll
      for (int d = 0; d < HS / 8; d++)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; i++)
          o[d][i] = fmaf(o[d][i], factors[0], states[4 + d * 4 + i][thread] * factors[1]);
    }
  } else if (group > 0) {
    return;
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    l[half] += __shfl_xor_sync(FULL_MASK, l[half], 1);
    l[half] += __shfl_xor_sync(FULL_MASK, l[half], 2);
    int position = seen + across + half * 8;
    if (position >= keys) continue;
    float share = 1.0f / l[half];
    // Loaded again: the loop needs every register.
    size_t token = starts[blockIdx.z] + (position - head.past);
    unsigned* row = reinterpret_cast<unsigned*>(out + token * NH * HS + blockIdx.x * HS);
#pragma unroll
    for (int d = 0; d < HS / 8; d++)
      row[d * 4 + along] = packed<elem_t>(o[d][half * 2] * share, o[d][half * 2 + 1] * share);
  }
}

#endif
