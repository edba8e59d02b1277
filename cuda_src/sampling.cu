// The next token of each row, chosen on the device and handed to the host through a mapped ring.
//
//   x      = processed logits: bias, penalties, minimum length, temperature, top-k, top-p, min-p
//   token  = argmax(x)                     temperature 0
//          = argmax(x + gumbel noise)      otherwise: a draw from softmax(x)
//
// Shapes    logits, scratch [R, Vp] float; rows [R]: the state row of each line of logits;
//           params, ids, positions, steps [B]; ring [B, ring_size]; counts [B, V] int and
//           bias [B, V] float may be null
// Bytes     4 V per pass over a row: 2 passes when nothing but temperature is asked, else about 10
// Work      one block per row; thread i takes the quads of tokens i, i + 1024, ... One Philox call
//           gives the noise of a quad, so a token's noise depends on (seed, position, id) alone.
//           Top-k and top-p need no sort: a radix descent over the bits of the logits finds the
//           smallest value kept. Masses are summed as 2^-40 fixed-point integers, whose sum does
//           not depend on the order in which atomics arrive. Equal logits are kept or dropped
//           together.
// Source    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox);
//           Gumbel-max: Maddison, Tarlow, Minka, 2014
//
// Entries   sample        everything that can be asked for, one block per row
//           sample_plain  greedy, or temperature alone: one pass over the logits by PARTS
//                         blocks a row, whose findings meet in the shared memory of the first
//           sample_plain_rows   the same with smaller blocks: rows that would wait for room
//
// gpt2cupy/ops/reference_sampling.py is the specification.
#include "handover.cuh"

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int THREADS = 1024;  // also in gpt2cupy/ops/sampling.py
constexpr int PARTS = 8;       // likewise, and the next two
constexpr int PLAIN_THREADS = 1024;
constexpr int ROWS_THREADS = 512;
constexpr int NOISE_AHEAD = 2;  // quads of a thread: 65,536 tokens in all
constexpr int PROMPT_BIT = 1 << 30;

struct RowParams {
  u64 seed;
  float temperature;  // 0: greedy
  int top_k;          // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
  float repetition;   // 1: off
  float presence;
  float frequency;
  int eos;           // -1: none
  int min_position;  // eos cannot be chosen at a position below this
  int unused;
};

struct alignas(16) RingEntry {
  u32 stamp;
  int id;
  u32 stamp_again;
  float logprob;
};

// ---------------------------------------------------------------------------------------------
// reductions over the block, in an order that never varies

struct Best {
  float value;
  int id;
};

__device__ inline Best better(Best a, Best b) {
  // NaN loses to every number; equal values go to the smaller id.
  bool take_b = b.value > a.value || (b.value == a.value && b.id < a.id) || (a.value != a.value);
  return take_b ? b : a;
}

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

// Put a token into its row's ring. The host polls the stamps: each half carries its own, and eight
// bytes arrive together, so no fence is needed.
__device__ inline void hand_over(RingEntry* ring, int size, u32* step, int id, float logprob) {
  RingEntry* entry = ring + *step % size;
  u64 stamp = ++*step;
  *(volatile u64*)&entry->stamp = stamp | (u64)(u32)id << 32;
  *(volatile u64*)&entry->stamp_again = stamp | (u64)__float_as_uint(logprob) << 32;
}

// ---------------------------------------------------------------------------------------------
// noise

__device__ inline uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u32 high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    u32 high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

__device__ inline float gumbel(u32 bits) {
  // u near 0 keeps float's full resolution, and it is small u that makes large noise.
  float u = fminf(((float)bits + 0.5f) * 2.3283064365386963e-10f, 1.0f - 5.9604644775390625e-8f);
  return -logf(-log1pf(-u));
}

// ---------------------------------------------------------------------------------------------
// thresholds

// Bits of a float as an integer of the same order.
__device__ inline u32 ordered(float x) {
  u32 bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float unordered(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The largest x such that the tokens of value >= x weigh at least `target`: eight bits of it a
// pass.
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

// log sum exp of the logits, and the best of them.
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
    hand_over(ring + (size_t)row * ring_size, ring_size, &steps[row], id, logits[id] - normaliser);
  }
}

// ---------------------------------------------------------------------------------------------
// greedy, or temperature alone

// What part of a row has come to: sum of exp(x - top), and the best choice with its raw logit.
struct Finding {
  float top, sum;
  Best best;
  float logit;
};

// A sum of exp(x - from) as one of exp(x - to). Where no number has been seen it is 0, or NaN
// after a NaN: it stays as it is.
__device__ inline float rescaled(float sum, float from, float to) {
  return from == MINUS_INFINITY ? sum : sum * expf(from - to);
}

// Merge the findings of a warp's lanes; every lane gets the result.
__device__ inline Finding warp_merged(Finding own) {
  float top = warp_max(own.top);
  own.sum = warp_sum(rescaled(own.sum, own.top, top));
  own.top = top;
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    Best other = {__shfl_xor_sync(FULL_MASK, own.best.value, offset),
                  __shfl_xor_sync(FULL_MASK, own.best.id, offset)};
    float logit = __shfl_xor_sync(FULL_MASK, own.logit, offset);
    own.best = better(own.best, other);
    if (own.best.id == other.id) own.logit = logit;
  }
  return own;
}

// AHEAD quads of noise of each thread are drawn before the wait, the others as they are needed.
template <int SIZE, int AHEAD>
__device__ inline void choose(const float* logits,
                              const int* rows,
                              const RowParams* params,
                              int* ids,
                              int* positions,
                              u32* steps,
                              RingEntry* ring,
                              int V,
                              int Vp,
                              int ring_size) {
  constexpr int WARPS = SIZE / WARP;
  __shared__ Finding findings[PARTS * WARPS];
  __shared__ Counter arrived;
  int blocks = cluster_size(), block = cluster_rank();
  int line = blockIdx.x / blocks, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (block == 0 && threadIdx.x == 0) open_counter(&arrived);
  cluster_begin();
  int row = rows[line];
  RowParams p = params[row];
  int position = positions[row] + 1;
  uint2 key = make_uint2((u32)p.seed, (u32)(p.seed >> 32));
  bool random = p.temperature > 0.0f;
  float divisor = random ? p.temperature : 1.0f;
  logits += (size_t)line * Vp;

  // The noise does not depend on the logits: it is made while they still are.
  int first = block * SIZE + threadIdx.x, stride = blocks * SIZE;
  auto draw = [&](int quad, float (&to)[4]) {
    uint4 bits = philox(make_uint4(quad, position, 0, 0), key);
    bool noisy = random && quad * 4 < V;
    to[0] = noisy ? gumbel(bits.x) : 0.0f;
    to[1] = noisy ? gumbel(bits.y) : 0.0f;
    to[2] = noisy ? gumbel(bits.z) : 0.0f;
    to[3] = noisy ? gumbel(bits.w) : 0.0f;
  };
  constexpr int HELD = AHEAD > 0 ? AHEAD : 1;
  float noise[HELD][4], x[HELD][4];
#pragma unroll
  for (int turn = 0; turn < AHEAD; turn++) draw(first + turn * stride, noise[turn]);
  wait_for_inputs();

  Finding own = {MINUS_INFINITY, 0.0f, {MINUS_INFINITY, V}, 0.0f};
  auto take = [&](int quad, const float (&x)[4], const float (&shift)[4]) {
    float top = own.top;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (quad * 4 + i < V) top = fmaxf(top, x[i]);
    float sum = rescaled(own.sum, own.top, top);
    own.top = top;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int v = quad * 4 + i;
      if (v >= V) continue;
      sum += x[i] == MINUS_INFINITY ? 0.0f : expf(x[i] - top);  // top may be it too
      own.best = better(own.best, Best{x[i] / divisor + shift[i], v});
      if (own.best.id == v) own.logit = x[i];
    }
    own.sum = sum;
  };
#pragma unroll
  for (int turn = 0; turn < AHEAD; turn++) {
    int quad = first + turn * stride;
    if (quad * 4 < V) load_floats(logits + quad * 4, x[turn]);  // rows are padded to 128
  }
#pragma unroll
  for (int turn = 0; turn < AHEAD; turn++) {
    int quad = first + turn * stride;
    if (quad * 4 < V) take(quad, x[turn], noise[turn]);
  }
#pragma unroll 1
  for (int quad = first + AHEAD * stride; quad * 4 < V; quad += stride) {
    load_floats(logits + quad * 4, x[0]);
    draw(quad, noise[0]);
    take(quad, x[0], noise[0]);
  }

  own = warp_merged(own);
  cluster_wait();  // the counter is open
  if (block == 0 && threadIdx.x == 0) expect_bytes(&arrived, sizeof(findings));
  if (lane == 0) send_words(&findings[block * WARPS + warp], &arrived, 0, own);
  if (block > 0) return;
  wait_for_bytes(&arrived);
  if (warp > 0) return;
  // Each lane goes through some warps' findings in order, then the lanes merge.
  own = {MINUS_INFINITY, 0.0f, {MINUS_INFINITY, V}, 0.0f};
  for (int i = lane; i < blocks * WARPS; i += WARP) {
    Finding other = findings[i];
    float top = fmaxf(own.top, other.top);
    own.sum = rescaled(own.sum, own.top, top) + rescaled(other.sum, other.top, top);
    own.top = top;
    own.best = better(own.best, other.best);
    if (own.best.id == other.best.id) own.logit = other.logit;
  }
  own = warp_merged(own);
  if (lane > 0) return;
  int id = min(own.best.id, V - 1);  // a row of NaN has no best
  ids[row] = id;
  positions[row] = position;
  float logprob = own.logit - (own.top + logf(own.sum));
  hand_over(ring + (size_t)row * ring_size, ring_size, &steps[row], id, logprob);
}

#define PLAIN_ENTRY(name, threads, resident, ahead)                                              \
  extern "C" __global__ void CLUSTER(PARTS) __launch_bounds__(threads, resident)                 \
      name(const float* logits, const int* rows, const RowParams* params, int* ids,              \
           int* positions, u32* steps, RingEntry* ring, int V, int Vp, int ring_size) {          \
    choose<threads, ahead>(logits, rows, params, ids, positions, steps, ring, V, Vp, ring_size); \
  }

PLAIN_ENTRY(sample_plain, PLAIN_THREADS, 1, NOISE_AHEAD)
PLAIN_ENTRY(sample_plain_rows, ROWS_THREADS, 3, 0)

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
