// Look-up speculation: which drafts of a step stand, and what is proposed for the next.
//
// A step has fed the newest token and drafts of those that may follow, and has sampled a token
// after each. A draft stands if it is the token that was sampled after the one before it; the first
// that does not stand ends the step's tokens. Drafts of the next step are what followed the last
// place where the text so far ended alike: the longest match of SHORTEST to LONGEST tokens, of
// equally long ones the latest.
//
// Shapes    ids, positions, sampled_positions [M] int: of the rows of the widest step, all of one
//           text; chosen [R]: what was sampled in the rows of this step; history [H] int: the
//           text's tokens by position; steps [M], ring [M, ring_size]: as in sampling.cu
// Bytes     4 (positions[0] + 1), the text so far
// Work      one block; a thread for each place where a match may end
//
// Each row of the step pushes one token to its ring: the one sampled, or -1 where its draft did not
// stand. ids and positions become those of the next step, whichever number of rows it has; a draft
// of -1 never stands.
//
// gpt2cupy/ops/reference_sampling.py is the specification.
// Source    Saxena, "Prompt Lookup Decoding", 2023; Leviathan et al., "Fast inference from
//           transformers via speculative decoding", 2023
#include "sampling.cuh"

constexpr int THREADS = 256;
constexpr int SHORTEST = 2;  // tokens of a match
constexpr int LONGEST = 8;
constexpr int PLACE_BITS = 24;

extern "C" __global__ void __launch_bounds__(THREADS) accept_drafts(int* ids,
                                                                    int* positions,
                                                                    int* sampled_positions,
                                                                    const RingEntry* chosen,
                                                                    int* history,
                                                                    u32* steps,
                                                                    RingEntry* ring,
                                                                    int R,
                                                                    int M,
                                                                    int H,
                                                                    int ring_size) {
  __shared__ int bests[THREADS / WARP];
  griddepcontrol_wait();
  int tid = threadIdx.x, first = positions[0];
  int count = 1;
  while (count < R && ids[count] == chosen[count - 1].id) count++;
  int last = first + count;  // position of the newest token
  bool inside = first >= 0 && last < H;
  int newest = chosen[count - 1].id;

  if (tid < R) {
    int id = tid < count ? chosen[tid].id : -1;
    if (inside && tid < count) history[first + 1 + tid] = id;
    push_token(ring + (size_t)tid * ring_size, ring_size, &steps[tid], id, chosen[tid].logprob);
  }
  if (tid == 0 && inside) history[first] = ids[0];
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
  if (tid >= M) return;
#pragma unroll
  for (int warp = 0; warp < THREADS / WARP; warp++) best = max(best, bests[warp]);

  int id = newest;
  if (tid > 0) {
    int end = best & ((1 << PLACE_BITS) - 1), from = end + tid;
    // What would follow lies past the newest token where the text repeats itself right away.
    while (best >= 0 && from > last) from -= last - end;
    id = best >= 0 ? history[from] : -1;
  }
  ids[tid] = id;
  positions[tid] = sampled_positions[tid] = last + tid;
}
