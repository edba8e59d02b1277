// Look-up speculation: drafts of the tokens that may follow, from what the text has said before.
//
// They are what followed the last place where the text so far ended alike: the longest match of
// SHORTEST to LONGEST tokens, of equally long ones the latest.
//
// Shapes    ids, positions [R] int: of a step's rows, the first of which has the newest token;
//           history [H] int: the text's tokens by position
// Bytes     4 (positions[0] + 1), the text so far
// Work      one block; a thread for each place where a match may end
//
// ids[1 ..] are set to the drafts, or to -1, which never stands, where there is no match.
//
// gpt2cupy/ops/reference_sampling.py is the specification.
// Source    Saxena, "Prompt Lookup Decoding", 2023
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int SHORTEST = 2;  // tokens of a match
constexpr int LONGEST = 8;
constexpr int PLACE_BITS = 24;

extern "C" __global__ void __launch_bounds__(THREADS)
    propose_drafts(int* ids, const int* positions, int* history, int R, int H) {
  __shared__ int bests[THREADS / WARP];
  int tid = threadIdx.x, last = positions[0];
  bool inside = last >= 0 && last < H;
  if (tid == 0 && inside) history[last] = ids[0];  // the first token of a text is not there yet
  __syncthreads();
  int best = -1;  // length of the match and the place where it ends
  if (inside)
    for (int end = tid; end < last; end += THREADS) {
      int length = 0;
      while (length < LONGEST && length <= end && history[end - length] == history[last - length])
        length++;
      if (length >= SHORTEST) best = max(best, length << PLACE_BITS | end);
    }
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    best = max(best, __shfl_xor_sync(FULL_MASK, best, offset));
  if (tid % WARP == 0) bests[tid / WARP] = best;
  __syncthreads();
  if (tid == 0 || tid >= R) return;
#pragma unroll
  for (int warp = 0; warp < THREADS / WARP; warp++) best = max(best, bests[warp]);
  int end = best & ((1 << PLACE_BITS) - 1), from = end + tid;
  // What would follow lies past the newest token where the text repeats itself right away.
  while (best >= 0 && from > last) from -= last - end;
  ids[tid] = best >= 0 ? history[from] : -1;
}
