// A token of each row of logits, by settings that all rows share.
//
//   token = argmax(x)                  temperature 0
//         = argmax(x' + Gumbel noise)  otherwise: a draw from softmax(x')
//   x'    = x / temperature, with all but the top-k, top-p and min-p tokens taken out
//
// Shapes    logits [B, V], a stride between rows; positions [B] or null for the row's number;
//           scratch [B, V]; ids [B]
// Dtypes    logits ELEM; positions and ids int; scratch float
// Bytes     2 V sizeof ELEM a row where top-k keeps few; else V (sizeof ELEM + 4) to write scratch,
//           and 4 V for each of up to 10 passes over it
// Work      a block per row, as in sampling.cu, whose draw it shares. The noise of a token depends
//           on (seed, position, token) alone.
#include "sampling_block.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) sample_logits(const elem_t* logits,
                                                                       const int* positions,
                                                                       float* scratch,
                                                                       int* ids,
                                                                       float temperature,
                                                                       int top_k,
                                                                       float top_p,
                                                                       float min_p,
                                                                       long long seed,
                                                                       int V,
                                                                       int logits_stride) {
  __shared__ Best bests[THREADS / WARP];
  __shared__ u64 bins[256];
  __shared__ Few few;
  logits += (size_t)blockIdx.x * logits_stride;
  float* x = scratch + (size_t)blockIdx.x * V;
  bool random = temperature > 0.0f, numbers = true;
  Best own = {MINUS_INFINITY, V};
#pragma unroll 8
  for (int v = threadIdx.x; v < V; v += THREADS) {
    float value = to_float(logits[v]);
    own = better(own, Best{value, v});
    numbers = numbers && value == value;
  }
  Best best = block_best(own, bests);
  if (random) {
    RowParams p = {};
    p.seed = (u64)seed;
    p.top_k = top_k;
    p.top_p = top_p;
    p.min_p = min_p;
    int position = positions ? positions[blockIdx.x] : (int)blockIdx.x;
    float top = best.value / temperature;
    bool drawn = false;
    if (top_k > 0 && top_k < V && top_k <= THREADS && __syncthreads_and(numbers) &&
        fabsf(top) <= LARGEST_FLOAT)
      drawn = draw_few([=](int v) { return to_float(logits[v]); },
                       [=](float value) { return value / temperature; }, V, p, own.value, top,
                       position, bests, few, &best);
    if (!drawn) {
      for (int v = threadIdx.x; v < V; v += THREADS) x[v] = to_float(logits[v]) / temperature;
      __syncthreads();
      best = draw(x, V, p, top, position, bests, bins);
    }
  }
  if (threadIdx.x == 0) ids[blockIdx.x] = min(best.id, V - 1);  // a row of NaN has no best
}
