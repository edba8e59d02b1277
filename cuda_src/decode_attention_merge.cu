// Merges what the blocks of decode_attention.cu and _mma.cu leave of each part of a sequence's
// keys.
//
//   m = max m[p], l = sum exp(m[p] - m) l[p], out[b, h] = sum exp(m[p] - m) o[p] / l   over parts p
//
// Shapes    states [B, NH, P, HS + 2] float: o, m and l of each part; out [B, NH, HS], ELEM, with
//           strides of its own between sequences and heads. Without keys it gives zeros.
// Bytes     B NH P (HS + 2) 4 read, B NH HS sizeof ELEM written
// Work      a block for a query head and a sequence, a thread for a channel and a group of parts.
//           A file of its own: chips with tensor cores for fp16 and bf16 need it, and not the rest
//           of decode_attention.cu
// Source    Dao et al., "Flash-Decoding for long-context inference", 2023
#include "attention_tensors.cuh"
#include "softmax_state.cuh"

// Every thread has one channel and every MERGE_GROUPS-th state, of which it loads AT_ONCE together:
// one after the other, their latencies would add up.
constexpr int MERGE_GROUPS = 4;
constexpr int AT_ONCE = 8;

extern "C" __global__ void __launch_bounds__(MERGE_GROUPS* HS) decode_attention_merge(
    const float* states, elem_t* out, int NH, int P, int out_stride_B, int out_stride_NH) {
  __shared__ float of_groups[MERGE_GROUPS][HS + 2];
  int channel = threadIdx.x % HS, group = threadIdx.x / HS, head = blockIdx.x, batch = blockIdx.y;
  const float* first = states + ((size_t)batch * NH + head) * P * (HS + 2);
  float m = LOWEST, l = 0.0f, o = 0.0f;
  for (int i = group; i < P; i += MERGE_GROUPS * AT_ONCE) {
    float ms[AT_ONCE + 1], ls[AT_ONCE + 1], os[AT_ONCE + 1];
#pragma unroll
    for (int n = 0; n < AT_ONCE; n++) {
      int place = i + n * MERGE_GROUPS;
      bool there = place < P;
      const float* state = first + (size_t)(there ? place : i) * (HS + 2);
      ms[n] = there ? state[HS] : LOWEST;
      ls[n] = there ? state[HS + 1] : 0.0f;
      os[n] = there ? state[channel] : 0.0f;
    }
    ms[AT_ONCE] = m;
    ls[AT_ONCE] = l;
    os[AT_ONCE] = o;
    merge(ms, ls, os, m, l, o);
  }
  of_groups[group][channel] = o;
  if (channel == 0) {
    of_groups[group][HS] = m;
    of_groups[group][HS + 1] = l;
  }
  __syncthreads();
  if (group > 0) return;
  float ms[MERGE_GROUPS], ls[MERGE_GROUPS], os[MERGE_GROUPS];
#pragma unroll
  for (int n = 0; n < MERGE_GROUPS; n++) {
    ms[n] = of_groups[n][HS];
    ls[n] = of_groups[n][HS + 1];
    os[n] = of_groups[n][channel];
  }
  merge(ms, ls, os, m, l, o);
  out[Strides{out_stride_B, 0, out_stride_NH}.at(batch, 0, head) + channel] =
      from_float<elem_t>(l > 0.0f ? o / l : 0.0f);
}
