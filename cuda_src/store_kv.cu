// New keys and values of some rows into the cache, where rows of one slot see each other's.
//
//   K[slots[b], h, positions[b]] = key of head h of row b, and the same of V
//
// Shapes    qkv [B, 3C]; K, V [S, NH, T, HS], one layer; slots, positions [B] int; C = NH HS
// Bytes     4 B C sizeof ELEM
// Work      a block for each row and each of K and V; copied in pieces of 16 bytes, or by elements
//           where HS is no multiple of a piece
//
// attention_decode loads past keys before it waits: it may not start before this has ended. A row
// with slot -1 or a position outside the cache is left out.
#include "common.cuh"

constexpr int THREADS = 256;

template <int VEC>
__device__ inline void store_row(
    const elem_t* row, elem_t* cache, int position, int C, int T, int HS) {
  for (int c = threadIdx.x * VEC; c < C; c += THREADS * VEC) {
    size_t to = ((size_t)(c / HS) * T + position) * HS + c % HS;
    *reinterpret_cast<Packed<elem_t, VEC>*>(cache + to) =
        *reinterpret_cast<const Packed<elem_t, VEC>*>(row + c);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) store_kv(const elem_t* qkv,
                                                               elem_t* k,
                                                               elem_t* v,
                                                               const int* slots,
                                                               const int* positions,
                                                               int S,
                                                               int NH,
                                                               int T,
                                                               int HS) {
  int row = blockIdx.x, slot = slots[row], position = positions[row], C = NH * HS;
  griddepcontrol_wait();
  if (slot < 0 || slot >= S || position < 0 || position >= T) return;
  elem_t* cache = (blockIdx.y ? v : k) + (size_t)slot * C * T;
  qkv += (size_t)row * 3 * C + (1 + blockIdx.y) * C;
  if (HS % WIDEST<elem_t> == 0)
    store_row<WIDEST<elem_t>>(qkv, cache, position, C, T, HS);
  else
    store_row<1>(qkv, cache, position, C, T, HS);
}
