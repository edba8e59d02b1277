// The first tokens of cache slots copied to other slots: prompts that begin alike run that once.
//
//   K[l, targets[r], h, t] = K[l, sources[r], h, t]   for t < counts[r], and the same of V
//
// Shapes    K, V [L, S, NH, T, HS] ELEM; sources, targets, counts [R] int
// Bytes     4 L NH HS sizeof ELEM a token; a source that several copy is read from L2
// Work      a block for each (head of a layer, copy, K or V): its tokens lie one after another, so
//           it copies one run of memory, in pieces of 16 bytes where heads begin at one, and
//           several of them a thread at a time
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int PIECES = 4;  // of a thread at a time

template <int VEC>
__device__ inline void copy_run(const elem_t* from, elem_t* to, int n) {
  using Piece = Packed<elem_t, VEC>;
  for (int i = threadIdx.x * VEC; i < n; i += PIECES * THREADS * VEC) {
    Piece piece[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      int at = i + p * THREADS * VEC;
      if (at < n) piece[p] = *reinterpret_cast<const Piece*>(from + at);
    }
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
      int at = i + p * THREADS * VEC;
      if (at < n) *reinterpret_cast<Piece*>(to + at) = piece[p];
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_slots(elem_t* k,
                                                                 elem_t* v,
                                                                 const int* sources,
                                                                 const int* targets,
                                                                 const int* counts,
                                                                 int S,
                                                                 int NH,
                                                                 int T,
                                                                 int HS) {
  int layer = blockIdx.x / NH, head = blockIdx.x % NH;
  int source = sources[blockIdx.y], target = targets[blockIdx.y];
  int n = min(counts[blockIdx.y], T) * HS;
  bool inside = source >= 0 && source < S && target >= 0 && target < S;
  if (!inside || source == target) return;
  elem_t* cache = blockIdx.z ? v : k;
  auto run_of = [&](int slot) { return cache + (((size_t)layer * S + slot) * NH + head) * T * HS; };
  if (HS % WIDEST<elem_t> == 0)
    copy_run<WIDEST<elem_t>>(run_of(source), run_of(target), n);
  else
    copy_run<1>(run_of(source), run_of(target), n);
}
