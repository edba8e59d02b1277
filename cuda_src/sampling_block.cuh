// What a block needs that chooses a token of one row by everything that can be asked for:
// reductions over the block, thresholds of top-k and top-p, and the draw.
#pragma once

#include "sampling.cuh"

constexpr int THREADS = 1024;  // also in gpt2cupy/ops/sampling.py

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

// The largest x such that the tokens of value >= x weigh at least `target`, eight bits a pass.
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
// top-k of at most THREADS tokens: of the largest value of each thread the k-th largest is at most
// the k-th largest of all, and few other tokens reach it; those are collected and compared with
// each other

constexpr int FEW = THREADS;  // tokens that are collected

struct Few {
  u32 count;  // of tokens that reach the bound; only FEW are there
  u32 key[FEW];
  int id[FEW];
  u64 mass[FEW];
};

// The k-th largest of the values of all threads, bit by bit.
__device__ inline float kth_of_threads(float x, int k) {
  u32 key = ordered(x), found = 0;
  for (u32 bit = 1u << 31; bit; bit >>= 1)
    if (__syncthreads_count(key >= (found | bit)) >= k) found |= bit;
  return unordered(found);
}

// The largest key of all threads.
__device__ inline u32 block_largest(u32 key, u32* shared) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    key = max(key, __shfl_xor_sync(FULL_MASK, key, offset));
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = key;
  __syncthreads();
  for (int i = 0; i < THREADS / WARP; i++) key = max(key, shared[i]);
  return key;
}

// The draw where top-k keeps few: the same token as draw()'s. False where it cannot say: more than
// FEW tokens reach the bound.
//
// Values are exact(raw(v)), and exact never falls; `largest` is the largest raw value of the
// thread's tokens v = threadIdx.x + i THREADS, none of which is NaN, and top the largest value of
// all, which is finite.
template <typename Raw, typename Exact>
__device__ inline bool draw_few(Raw raw,
                                Exact exact,
                                int V,
                                const RowParams& p,
                                float largest,
                                float top,
                                int position,
                                Best* bests,
                                Few& few,
                                Best* drawn) {
  __shared__ u32 keys[THREADS / WARP];
  float kth = kth_of_threads(largest, p.top_k), bound = exact(kth);
  // Other raw values may come to the same value, but none that is smaller by more than rounding.
  float low = fabsf(bound) > 1e-30f ? kth - fabsf(kth) * 1e-6f : MINUS_INFINITY;
  if (threadIdx.x == 0) few.count = 0;
  __syncthreads();
#pragma unroll 4
  for (int v = threadIdx.x; v < V; v += THREADS) {
    float value = raw(v);
    if (value < low || (value = exact(value)) < bound) continue;
    u32 place = atomicAdd(&few.count, 1);
    if (place < FEW) {
      few.key[place] = ordered(value);
      few.id[place] = v;
    }
  }
  __syncthreads();
  int count = few.count, i = threadIdx.x;
  if (count > FEW) return false;

  u32 key = i < count ? few.key[i] : 0;
  float value = i < count ? unordered(key) : MINUS_INFINITY;
  int reached = 0;
  for (int j = 0; j < count; j++) reached += few.key[j] >= key;
  float least = unordered(block_largest(i < count && reached >= p.top_k ? key : 0, keys));
  if (p.top_p < 1.0f) {
    bool kept = i < count && value >= least;
    if (i < count) few.mass[i] = kept ? (u64)(exp((double)value - top) * 1099511627776.0) : 0;
    __syncthreads();
    u64 total = 0, above = 0;
    for (int j = 0; j < count; j++) {
      u64 mass = few.mass[j];
      total += mass;
      if (few.key[j] >= key) above += mass;
    }
    u64 target = (u64)ceil((double)p.top_p * (double)total);
    least = fmaxf(least, unordered(block_largest(kept && above >= target ? key : 0, keys)));
  }
  if (p.min_p > 0.0f) least = fmaxf(least, top + logf(p.min_p));

  Best own = {MINUS_INFINITY, V};
  if (i < count && value >= least) {
    int v = few.id[i];
    uint4 bits =
        philox(make_uint4(v / 4, position, 0, 0), make_uint2((u32)p.seed, (u32)(p.seed >> 32)));
    u32 lane = v % 4 == 0 ? bits.x : v % 4 == 1 ? bits.y : v % 4 == 2 ? bits.z : bits.w;
    own = {value + gumbel(lane), v};
  }
  *drawn = block_best(own, bests);
  return true;
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

// A token of softmax(x), cut off by top-k, top-p and min-p, by the Gumbel-max method; x[v] are the
// logits divided by the temperature, `top` is the largest.
__device__ inline Best draw(
    const float* x, int V, const RowParams& p, float top, int position, Best* bests, u64* bins) {
  float least = MINUS_INFINITY;
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
  return block_best(own, bests);
}
