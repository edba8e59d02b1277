// Decode attention of many rows: as attention_decode_mma.cu, with keys and values copied through
// shared memory.
//
//   out[b, h] = softmax(scale * q[b, h] . K[slot, h, 0..p]) V[slot, h, 0..p]      p = positions[b]
//
// Shapes    as in attention_decode.cu
// Bytes     2 (p + 1) HS sizeof ELEM per row and head, plus qkv and out
// FLOPs     4 (p + 1) HS per row and head
// Work      a block of 2 or 4 warps per row and head. Each warp has a pipeline of its own: STAGES
//           tiles of KEYS keys and values in shared memory, filled by cp.async. Copies in flight
//           take no registers, so the memory stays busy while the warp multiplies; the first are
//           issued before griddepcontrol.wait. No other warp uses the tiles, so there is no barrier
//           before the end. ldmatrix loads keys as they lie and values transposed; the query is in
//           eight rows of the left operand of mma.m16n8k16, whose units would be idle otherwise.
//
// Entries   attention_decode_rows_w2   blocks of 2 warps: the most rows
//           attention_decode_rows_w4   of 4 warps: fewer, but too many for blocks of 8
//
// Needs sm_80 (mma.m16n8k16) and a head size that is a multiple of 16.
//
// A row with slot -1 is idle and gives zeros. Nothing beyond position p is read.
#include "attention_head.cuh"
#include "attention_merge.cuh"
#include "mma.cuh"

#if __CUDA_ARCH__ >= 800 && HS % 16 == 0

constexpr int STAGES = 2;
constexpr int KEYS = HS <= 64 ? 32 : 16;  // of a tile

constexpr int VEC = 8;                                            // elements of a copy
constexpr int UNITS = HS / VEC;                                   // copies of a row
constexpr int AT_ONCE = WARP / UNITS;                             // rows that a warp copies at once
constexpr int WARP_BYTES = STAGES * 2 * KEYS * PITCH<UNITS> * 2;  // of the pipeline of a warp

struct KeyTile {
  elem_t keys[KEYS * PITCH<UNITS>], values[KEYS * PITCH<UNITS>];
};
static_assert(WARP_BYTES == STAGES * sizeof(KeyTile), "the launch asks for so much");

template <int WARPS>
__device__ inline void attend(const Head& head, float scale) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ SoftmaxStates<WARPS> states;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int along = lane % 4, across = lane / 4;  // place in a fragment
  KeyTile* tiles = reinterpret_cast<KeyTile*>(memory) + warp * STAGES;
  bool idle = head.count == 0;
  int position = head.past;  // -1 in an idle row

  // Past the end zeros are stored, for a weight of zero would not hide a NaN. The newest key and
  // value are not in the cache yet.
  int line = lane / UNITS, unit = lane % UNITS;
  unsigned to = shared_address(tiles);
  constexpr unsigned TO_VALUES = sizeof(KeyTile::keys);
  auto fetch = [&](int t0, int stage) {
    const elem_t *from_k = head.k + (size_t)(t0 + line) * HS + unit * VEC,
                 *from_v = head.v + (size_t)(t0 + line) * HS + unit * VEC;
#pragma unroll
    for (int i = 0; i < KEYS; i += AT_ONCE) {
      if (WARP % UNITS && (line >= AT_ONCE || i + line >= KEYS)) break;
      bool there = t0 + i + line < position;
      unsigned at = to + stage * (unsigned)sizeof(KeyTile) + swizzled<UNITS>(i + line, unit) * 2;
      cp_async_or_zero(at, from_k + i * HS, there);
      cp_async_or_zero(at + TO_VALUES, from_v + i * HS, there);
    }
  };
  constexpr int STRIDE = WARPS * KEYS;
  int first = warp * KEYS;
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    if (first + s * STRIDE <= position) fetch(first + s * STRIDE, s);
    cp_async_commit();
  }
  griddepcontrol_wait();

  unsigned query[HS / 16][2];
#pragma unroll
  for (int c = 0; c < HS / 16; c++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      query[c][i] = *reinterpret_cast<const unsigned*>(head.q + c * 16 + i * 8 + along * 2);
  using Piece = Packed<elem_t, VEC>;
  Piece new_key = {}, new_value = {};
  if (lane < UNITS) {
    new_key = *reinterpret_cast<const Piece*>(head.new_k + lane * VEC);
    new_value = *reinterpret_cast<const Piece*>(head.new_v + lane * VEC);
    if (warp == 0 && !idle) {
      *reinterpret_cast<Piece*>(head.k + (size_t)position * HS + lane * VEC) = new_key;
      *reinterpret_cast<Piece*>(head.v + (size_t)position * HS + lane * VEC) = new_value;
    }
  }

  float o[UNITS][4] = {}, m = LOWEST, l = 0.0f;
  float factor = scale * LOG2_E;  // exp(x) = 2^(x log2 e)
  int stage = 0;
  for (int t0 = first; t0 <= position; t0 += STRIDE) {
    KeyTile& tile = tiles[stage];
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    if (t0 + KEYS > position) {  // the tile of the newest key
      if (lane < UNITS) {
        int at = swizzled<UNITS>(position - t0, lane);
        *reinterpret_cast<Piece*>(&tile.keys[at]) = new_key;
        *reinterpret_cast<Piece*>(&tile.values[at]) = new_value;
      }
      __syncwarp();
    }

    // Of keys 8 g + 2 along and the next: the first two of scores[g].
    float scores[KEYS / 8][4] = {};
#pragma unroll
    for (int c = 0; c < HS / 16; c++) {
      unsigned a[4] = {query[c][0], 0, query[c][1], 0};
#pragma unroll
      for (int g = 0; g < KEYS / 8; g += 2) {
        unsigned b[4];  // channels 0 to 7 and 8 to 15 of eight keys, then of the next eight
        int key = g * 8 + lane / 16 * 8 + lane % 8;
        ldmatrix(b, &tile.keys[swizzled<UNITS>(key, c * 2 + lane / 8 % 2)]);
        mma<elem_t>(scores[g], a, b[0], b[1]);
        mma<elem_t>(scores[g + 1], a, b[2], b[3]);
      }
    }

    float weights[KEYS / 4];
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++)
      weights[i] = t0 + i / 2 * 8 + along * 2 + i % 2 > position ? MINUS_INFINITY
                                                                 : scores[i / 2][i % 2] * factor;
    float old = add_scores(weights, m, l);
#pragma unroll
    for (int n = 0; n < UNITS; n++) {
      o[n][0] *= old;
      o[n][1] *= old;
    }
#pragma unroll
    for (int g = 0; g < KEYS / 8; g += 2) {
      unsigned a[4] = {packed<elem_t>(weights[g * 2], weights[g * 2 + 1]), 0,
                       packed<elem_t>(weights[g * 2 + 2], weights[g * 2 + 3]), 0};
#pragma unroll
      for (int n = 0; n < UNITS; n += 2) {
        unsigned b[4];  // keys 0 to 7 and 8 to 15 of eight channels, then of the next eight
        int key = g * 8 + lane / 8 % 2 * 8 + lane % 8;
        ldmatrix_trans(b, &tile.values[swizzled<UNITS>(key, n + lane / 16)]);
        mma<elem_t>(o[n], a, b[0], b[1]);
        mma<elem_t>(o[n + 1], a, b[2], b[3]);
      }
    }
    __syncwarp();
    int next = t0 + STAGES * STRIDE;
    if (next <= position) fetch(next, stage);
    cp_async_commit();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  l = warp_sum<4>(l);

  // All rows of the fragments are alike.
  if (lane == 0) {
    states.m[warp] = m;
    states.l[warp] = l;
  }
#pragma unroll
  for (int n = 0; n < UNITS; n++)
    if (across == n % 8) {
      float own[2] = {o[n][0], o[n][1]};
      store_floats(&states.o[warp][n * 8 + along * 2], own);
    }
  __syncthreads();
  ClusterStates none;
  write_output<WARPS, false>(states, none, 0, 1, idle, head.out);
}

#define ATTENTION_ENTRY(name, warps)                                                        \
  extern "C" __global__ void __launch_bounds__(warps* WARP)                                 \
      name(const elem_t* qkv, elem_t* k, elem_t* v, const int* slots, const int* positions, \
           elem_t* out, float scale, int NH, int T) {                                       \
    griddepcontrol_launch_dependents();                                                     \
    int head = blockIdx.x;                                                                  \
    attend<warps>(decode_head(qkv, k, v, slots, positions, out, head, NH, T), scale);       \
  }

ATTENTION_ENTRY(attention_decode_rows_w2, 2)
ATTENTION_ENTRY(attention_decode_rows_w4, 4)

#endif
