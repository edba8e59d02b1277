// Causal attention of many new tokens per sequence, on tensor cores.
//
//   out[n, h] = softmax(scale * q[n, h] . K[0..p]) V[0..p]      p = past + n, position of token n
//
// Shapes    as in attention_prefill.cu, which takes float and the head sizes that this cannot
// Dtypes    ELEM is half or bfloat16; scores, sums and output are kept in float
// Bytes     N 4C sizeof ELEM at the least; each query tile reads the keys before it again, from L2
// FLOPs     4 HS per query, head and visible key
// Work      one block per (tile of BR queries, head, sequence), 16 queries a warp. Tiles of BC keys
//           and values pass through two buffers in shared memory, one filled while the other is
//           worked on. Scores come out of mma in the layout in which the next mma takes its left
//           operand, so the weights of the softmax never leave the registers.
// Source    Dao, "FlashAttention-2", 2023
//
// Needs sm_80 (mma.m16n8k16, cp.async) and a head size that is a multiple of 16.
#include "mma.cuh"

#ifndef HS
#define HS 64
#endif

#if __CUDA_ARCH__ >= 800 && HS % 16 == 0

constexpr int WARPS = 4;                // of a block; also in gpt2cupy/ops/attention.py
constexpr int BR = WARPS * 16;          // queries of a block
constexpr int BC = HS <= 64 ? 64 : 32;  // keys of a tile
constexpr int STRIDE = HS + 8;          // of a row in shared memory: 16 bytes keep banks apart
constexpr int VEC = 8;
constexpr float LOG2_E = 1.4426950408889634f;

struct Tile {
  elem_t key[BC][STRIDE], value[BC][STRIDE];
};

// Start fetching keys and values t0 .. t0 + BC - 1; those past the end repeat the last.
__device__ inline void fetch(Tile& tile,
                             const elem_t* qkv,
                             const elem_t* k,
                             const elem_t* v,
                             int t0,
                             int keys,
                             int past,
                             int head,
                             size_t C) {
  for (int i = threadIdx.x; i < BC * (HS / VEC); i += WARPS * WARP) {
    int r = i / (HS / VEC), c = i % (HS / VEC) * VEC, t = min(t0 + r, keys - 1);
    // New tokens are read from qkv: the block that writes them to the cache may not have run yet.
    const elem_t* fresh = qkv + (size_t)(t - past) * 3 * C + head * HS + c;
    copy_async(&tile.key[r][c], t < past ? k + (size_t)t * HS + c : fresh + C);
    copy_async(&tile.value[r][c], t < past ? v + (size_t)t * HS + c : fresh + 2 * C);
  }
  copy_commit();
}

extern "C" __global__ void __launch_bounds__(WARPS* WARP)
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
  __shared__ __align__(16) Tile tiles[2];
  release_dependents();
  wait_for_inputs();
  int head = blockIdx.y, sequence = blockIdx.z;
  int start = starts[sequence], count = starts[sequence + 1] - start;
  // Later tiles have more keys: start them first.
  int first = (gridDim.x - 1 - blockIdx.x) * BR;
  if (first >= count) return;
  int rows = min(BR, count - first), past = past_tokens[sequence];
  size_t C = (size_t)NH * HS;
  qkv += start * 3 * C;
  out += start * C + head * HS;
  size_t cache = ((size_t)slots[sequence] * NH + head) * T * HS;
  k += cache;
  v += cache;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment

  int keys = past + first + rows;  // one past the last key that any query of the tile sees
  fetch(tiles[0], qkv, k, v, 0, keys, past, head, C);

  for (int i = threadIdx.x; i < rows * (HS / VEC); i += WARPS * WARP) {
    int r = i / (HS / VEC), c = i % (HS / VEC) * VEC, t = past + first + r;
    const elem_t* token = qkv + (size_t)(first + r) * 3 * C + head * HS + c;
    using Packed = Vec<elem_t, VEC>;
    if (t < T) {
      *reinterpret_cast<Packed*>(k + (size_t)t * HS + c) =
          *reinterpret_cast<const Packed*>(token + C);
      *reinterpret_cast<Packed*>(v + (size_t)t * HS + c) =
          *reinterpret_cast<const Packed*>(token + 2 * C);
    }
  }

  // This lane's two queries: rows `across` and `across + 8` of the warp's sixteen.
  unsigned query[HS / 16][4];
  int last[2];  // the last key that each of them sees
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int r = min(warp * 16 + across + half * 8, rows - 1);
    last[half] = past + first + r;
    const unsigned* row =
        reinterpret_cast<const unsigned*>(qkv + (size_t)(first + r) * 3 * C + head * HS);
#pragma unroll
    for (int c = 0; c < HS / 16; c++) {
      query[c][half] = row[c * 8 + along];
      query[c][half + 2] = row[c * 8 + 4 + along];
    }
  }

  float output[HS / 8][4] = {}, top[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {};
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  for (int t0 = 0, turn = 0; t0 < keys; t0 += BC, turn ^= 1) {
    if (t0 + BC < keys) {
      fetch(tiles[turn ^ 1], qkv, k, v, t0 + BC, keys, past, head, C);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    Tile& tile = tiles[turn];

    float scores[BC / 8][4] = {};
#pragma unroll
    for (int c = 0; c < HS / 16; c++)
#pragma unroll
      for (int j = 0; j < BC / 16; j++) {
        unsigned b[4];
        load_matrices(b, &tile.key[j * 16 + lane / 16 * 8 + lane % 8][c * 16 + lane / 8 % 2 * 8]);
        mma<elem_t>(scores[j * 2], query[c], b[0], b[1]);
        mma<elem_t>(scores[j * 2 + 1], query[c], b[2], b[3]);
      }

#pragma unroll
    for (int half = 0; half < 2; half++) {
      float tile_top = top[half];
#pragma unroll
      for (int j = 0; j < BC / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& score = scores[j][half * 2 + i];
          score = t0 + j * 8 + along * 2 + i > last[half] ? MINUS_INFINITY : score * factor;
          tile_top = fmaxf(tile_top, score);
        }
      // Four lanes share a row. Every query sees key 0, so the maximum is a number.
      tile_top = fmaxf(tile_top, __shfl_xor_sync(FULL_MASK, tile_top, 1));
      tile_top = fmaxf(tile_top, __shfl_xor_sync(FULL_MASK, tile_top, 2));
      float old = exp2f(top[half] - tile_top);
      top[half] = tile_top;
      sum[half] *= old;
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
          score = exp2f(score - tile_top);
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
        load_matrices_transposed(b, &tile.value[j * 16 + lane % 16][d * 16 + lane / 16 * 8]);
        mma<elem_t>(output[d * 2], weights, b[0], b[1]);
        mma<elem_t>(output[d * 2 + 1], weights, b[2], b[3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 1);
    sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 2);
    int r = warp * 16 + across + half * 8;
    if (r >= rows) continue;
    unsigned* row = reinterpret_cast<unsigned*>(out + (size_t)(first + r) * C);
#pragma unroll
    for (int d = 0; d < HS / 8; d++)
      row[d * 4 + along] =
          packed<elem_t>(output[d][half * 2] / sum[half], output[d][half * 2 + 1] / sum[half]);
  }
}

#endif
