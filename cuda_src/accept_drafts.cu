// Look-up speculation: which drafts of a step stand.
//
// A step has fed the newest token and drafts of those that may follow, and has sampled a token
// after each. A draft stands if it is the token that was sampled after the one before it; the first
// that does not stand ends the step's tokens.
//
// Shapes    ids, positions, sampled_positions [M] int: of the rows of the widest step, all of one
//           text; chosen [R]: what was sampled in the rows of this step; history [H] int: the
//           text's tokens by position; steps [M], ring [M, ring_size]: as in sampling.cu
// Bytes     some hundred
// Work      one warp, a thread for each row
//
// Each row of the step pushes one token to its ring: the one sampled, or -1 where its draft did not
// stand. ids[0] and positions become those of the next step, whichever number of rows it has.
//
// gpt2cupy/ops/reference_sampling.py is the specification.
// Source    Leviathan et al., "Fast inference from transformers via speculative decoding", 2023
#include "sampling.cuh"

constexpr int MOST_ROWS = WARP;  // of the widest step

extern "C" __global__ void __launch_bounds__(MOST_ROWS) accept_drafts(int* ids,
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
  int row = threadIdx.x;
  bool fed = row < R;
  // No kernel of the step writes what was fed.
  int draft = fed ? ids[row] : -1, first = positions[0];
  griddepcontrol_wait();
  RingEntry own = fed ? chosen[row] : RingEntry{};
  // Row n stands if the drafts of rows 1 .. n do.
  int before = __shfl_up_sync(FULL_MASK, own.id, 1);
  unsigned wrong = __ballot_sync(FULL_MASK, row > 0 && (!fed || draft != before));
  int count = __ffs(wrong) - 1;  // the rows from R on are wrong
  int last = first + count;      // position of the newest token
  int newest = __shfl_sync(FULL_MASK, own.id, count - 1);
  if (fed) {
    int id = row < count ? own.id : -1;
    if (row == 0 && first >= 0 && first < H) history[first] = draft;
    if (row < count && first >= 0 && last < H) history[first + 1 + row] = id;
    push_token(ring + (size_t)row * ring_size, ring_size, &steps[row], id, own.logprob);
  }
  if (row == 0) ids[0] = newest;
  if (row < M) positions[row] = sampled_positions[row] = last + row;
}
