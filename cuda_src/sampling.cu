// The next token of each row, by every sampling parameter, sampled on the device and pushed to the
// host through a mapped token ring; and log-probabilities.
//
//   x      = processed logits: bias, penalties, minimum length, temperature, top-k, top-p, min-p
//   token  = argmax(x)                     temperature 0
//          = argmax(x + gumbel noise)      otherwise: a draw from softmax(x)
//
// Shapes    logits, scratch [R, Vp] float; rows [R]: the state row of each line of logits;
//           params, ids, positions, steps [B]; ring [B, ring_size]; counts [B, V] int and
//           bias [B, V] float may be null
// Bytes     4 V per pass over a row: `sample` makes up to 13 (two for the log-probability, one for
//           the processed logits, four for top-k, five for top-p, one for the draw), top_logprobs 2
//           and one for each token
// Work      one block per row. Top-k and top-p need no sort: a radix descent over the bits of the
//           logits finds the smallest value kept. Masses are summed as 2^-40 fixed-point integers,
//           whose sum does not depend on the order in which atomics arrive. Equal logits are kept
//           or dropped together.
//
// Entries   sample           the next token; greedy and temperature alone: see sample_plain.cu
//           top_logprobs     the most probable tokens of each row
//           target_logprobs  the log-probability of one given token of each row
//
// gpt2cupy/ops/reference_sampling.py is the specification.
#include "sampling.cuh"

constexpr int THREADS = 1024;  // of a block
constexpr int PROMPT_BIT = 1 << 30;

// ---------------------------------------------------------------------------------------------
// reductions over the block, in an order that never varies

__device__ inline Best block_best(Best own, Best* shared) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    Best other = {__shfl_xor_sync(FULL_MASK, own.value, offset),
                  __shfl_xor_sync(FULL_MASK, own.id, offset)};
    own = better(own, other);
  }
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = own;
  __syncthreads();
  own = shared[0];
  for (int i = 1; i < THREADS / WARP; i++) own = better(own, shared[i]);
  return own;
}

__device__ inline float block_sum(float own, float* shared) {
  own = warp_sum(own);
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = own;
  __syncthreads();
  own = 0.0f;
  for (int i = 0; i < THREADS / WARP; i++) own += shared[i];
  return own;
}

// ---------------------------------------------------------------------------------------------
// thresholds

// The largest x such that the tokens of value >= x weigh at least `target`; a pass finds eight bits
// of it.
template <typename Weight>
__device__ inline float threshold(const float* x, int V, u64 target, Weight weight, u64* bins) {
  __shared__ u32 chosen;
  __shared__ u64 weight_above;
  u32 prefix = 0, mask = 0;
  u64 above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += THREADS) bins[i] = 0;
    __syncthreads();
    for (int v = threadIdx.x; v < V; v += THREADS) {
      u32 key = ordered(x[v]);
      if ((key & mask) == prefix) atomicAdd(&bins[key >> shift & 255], weight(x[v]));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = 255;
      while (bin > 0 && above + bins[bin] < target) above += bins[bin--];
      chosen = bin;
      weight_above = above;
    }
    __syncthreads();
    above = weight_above;
    prefix |= chosen << shift;
    mask |= 255u << shift;
  }
  return unordered(prefix);
}

// ---------------------------------------------------------------------------------------------

// The log sum exp of the logits, and the best of them.
__device__ inline float log_sum_exp(const float* x, int V, Best* best, Best* bests, float* sums) {
  Best own = {MINUS_INFINITY, V};
  for (int v = threadIdx.x; v < V; v += THREADS) own = better(own, Best{x[v], v});
  *best = block_best(own, bests);
  float sum = 0.0f;
  for (int v = threadIdx.x; v < V; v += THREADS) sum += expf(x[v] - best->value);
  return best->value + logf(block_sum(sum, sums));
}

__device__ inline float processed(
    float x, int v, const RowParams& p, int position, const int* counts, const float* bias) {
  if (bias) x += bias[v];
  if (counts) {
    int count = counts[v];
    if (count) x = x < 0.0f ? x * p.repetition : x / p.repetition;
    float generated = count & ~PROMPT_BIT;
    x = x - p.frequency * generated - p.presence * (generated > 0.0f ? 1.0f : 0.0f);
  }
  if (v == p.eos && position < p.min_position) x = MINUS_INFINITY;
  return p.temperature > 0.0f ? x / p.temperature : x;
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const float* logits,
                                                             const int* rows,
                                                             const RowParams* params,
                                                             int* ids,
                                                             int* positions,
                                                             u32* steps,
                                                             RingEntry* ring,
                                                             int* counts,
                                                             const float* bias,
                                                             float* scratch,
                                                             int V,
                                                             int Vp,
                                                             int ring_size) {
  __shared__ Best bests[THREADS / WARP];
  __shared__ float sums[THREADS / WARP];
  __shared__ u64 bins[256];
  int row = rows[blockIdx.x];
  logits += (size_t)blockIdx.x * Vp;
  float* x = scratch + (size_t)blockIdx.x * Vp;
  if (counts) counts += (size_t)row * V;
  if (bias) bias += (size_t)row * V;
  RowParams p = params[row];
  int position = positions[row] + 1;

  Best best;
  float normaliser = log_sum_exp(logits, V, &best, bests, sums);

  bool random = p.temperature > 0.0f;
  bool changed = counts || bias || (p.eos >= 0 && position < p.min_position);
  if (random || changed) {
    Best own = {MINUS_INFINITY, V};
    for (int v = threadIdx.x; v < V; v += THREADS) {
      x[v] = processed(logits[v], v, p, position, counts, bias);
      own = better(own, Best{x[v], v});
    }
    best = block_best(own, bests);
  }
  if (random) {
    float top = best.value, least = MINUS_INFINITY;
    if (p.top_k > 0 && p.top_k < V)
      least = threshold(x, V, p.top_k, [](float) { return u64(1); }, bins);
    if (p.top_p < 1.0f) {
      float kept = least;
      auto mass = [=](float value) {
        return value < kept ? u64(0) : (u64)(exp((double)value - top) * 1099511627776.0);
      };
      u64 own = 0;
      if (threadIdx.x == 0) bins[0] = 0;
      __syncthreads();
      for (int v = threadIdx.x; v < V; v += THREADS) own += mass(x[v]);
      atomicAdd(&bins[0], own);
      __syncthreads();
      u64 target = (u64)ceil((double)p.top_p * (double)bins[0]);
      __syncthreads();
      least = fmaxf(least, threshold(x, V, target, mass, bins));
    }
    if (p.min_p > 0.0f) least = fmaxf(least, top + logf(p.min_p));

    Best own = {MINUS_INFINITY, V};
    uint2 key = make_uint2((u32)p.seed, (u32)(p.seed >> 32));
    for (int quad = threadIdx.x; quad * 4 < V; quad += THREADS) {
      uint4 bits = philox(make_uint4(quad, position, 0, 0), key);
      u32 lane[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int v = quad * 4 + i;
        if (v < V && x[v] >= least) own = better(own, Best{x[v] + gumbel(lane[i]), v});
      }
    }
    best = block_best(own, bests);
  }

  if (threadIdx.x == 0) {
    int id = min(best.id, V - 1);  // a row of NaN has no best
    if (counts) counts[id] += 1;
    ids[row] = id;
    positions[row] = position;
    push_token(ring + (size_t)row * ring_size, ring_size, &steps[row], id, logits[id] - normaliser);
  }
}

// The `count` most probable tokens of each row of logits, best first, with their logprobs.
extern "C" __global__ void __launch_bounds__(THREADS)
    top_logprobs(const float* logits, int* ids, float* logprobs, int V, int Vp, int count) {
  __shared__ Best bests[THREADS / WARP];
  __shared__ float sums[THREADS / WARP];
  logits += (size_t)blockIdx.x * Vp;
  Best best;
  float normaliser = log_sum_exp(logits, V, &best, bests, sums);
  for (int i = 0; i < count; i++) {
    if (threadIdx.x == 0) {
      ids[(size_t)blockIdx.x * count + i] = best.id;
      logprobs[(size_t)blockIdx.x * count + i] = best.value - normaliser;
    }
    Best own = {MINUS_INFINITY, V};
    for (int v = threadIdx.x; v < V; v += THREADS) {
      bool after = logits[v] < best.value || (logits[v] == best.value && v > best.id);
      if (after) own = better(own, Best{logits[v], v});
    }
    best = block_best(own, bests);
  }
}

// logprobs[n] = log softmax(logits[n])[targets[n]]; a target outside the vocabulary gives 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    target_logprobs(const float* logits, const int* targets, float* logprobs, int V, int Vp) {
  __shared__ Best bests[THREADS / WARP];
  __shared__ float sums[THREADS / WARP];
  logits += (size_t)blockIdx.x * Vp;
  Best best;
  float normaliser = log_sum_exp(logits, V, &best, bests, sums);
  int target = targets[blockIdx.x];
  if (threadIdx.x == 0)
    logprobs[blockIdx.x] = target >= 0 && target < V ? logits[target] - normaliser : 0.0f;
}
