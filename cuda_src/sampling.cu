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
//                         blocks a row, whose findings meet in the shared memory of the first.
//                         Noise is made only for tokens that it could make the best
//
// gpt2cupy/ops/reference_sampling.py is the specification.
#include "handover.cuh"
#include "softmax.cuh"

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int THREADS = 1024;  // also in gpt2cupy/ops/sampling.py
constexpr int PARTS = 8;       // likewise, and the next
constexpr int PLAIN_THREADS = 512;
#if __CUDA_ARCH__ >= 900
constexpr int ROW_BLOCKS = PARTS;
#else
constexpr int ROW_BLOCKS = 1;
#endif
constexpr int HELD = 4;  // quads of a thread in a turn: 65,536 tokens in all
constexpr int PROMPT_BIT = 1 << 30;
constexpr float LN_2 = 0.6931471805599453f;
constexpr int NO_TOKEN = 0x7fffffff;  // where nothing is larger than NaN

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

// Between 0 and 1. Near 0 it keeps float's full resolution, and it is small u that makes large
// noise.
__device__ inline float uniform(u32 bits) {
  return fminf(((float)bits + 0.5f) * 2.3283064365386963e-10f, 1.0f - 5.9604644775390625e-8f);
}

__device__ inline float gumbel(u32 bits) { return -logf(-log1pf(-uniform(bits))); }

// What gumbel() cannot exceed, but for rounding: -log1p(-u) is at least u.
__device__ inline float most_gumbel(u32 bits) { return -LN_2 * __log2f(uniform(bits)); }

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
  float factor = power_of_two((from - to) * LOG2_E);
  return from == MINUS_INFINITY ? sum : sum * factor;
}

// x / divisor, given 1 / divisor: the quotient's error, found exactly, mends its last bit.
__device__ inline float divided(float x, float divisor, float inverse) {
  float quotient = x * inverse;
  float mended = fmaf(fmaf(-quotient, divisor, x), inverse, quotient);
  return fabsf(quotient) < -MINUS_INFINITY ? mended : quotient;
}

// The largest of a value of each lane, none of them NaN; one instruction from sm_80 on.
__device__ inline float warp_largest(float own) {
#if __CUDA_ARCH__ >= 800
  return unordered(__reduce_max_sync(FULL_MASK, ordered(own)));
#else
  return warp_max(own);
#endif
}

__device__ inline int warp_least(int own) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(FULL_MASK, own);
#else
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    own = min(own, __shfl_xor_sync(FULL_MASK, own, offset));
  return own;
#endif
}

// Whose choice is the best of the warp, given each lane's own and its logit; every lane gets it.
__device__ inline void warp_best(Best own, float logit, Finding* found) {
  float value = warp_largest(own.value);
  int id = warp_least(own.value == value ? own.id : NO_TOKEN);
  int lane = __ffs(__ballot_sync(FULL_MASK, own.id == id)) - 1;
  found->best = {value, id};
  found->logit = __shfl_sync(FULL_MASK, logit, lane);
}

// Merge N findings of each lane of a warp; every lane gets the result.
template <int N>
__device__ inline Finding warp_merged(const Finding (&own)[N]) {
  Finding found = {MINUS_INFINITY, 0.0f};
  Best best = own[0].best;
  float logit = own[0].logit;
#pragma unroll
  for (int i = 0; i < N; i++) {
    found.top = fmaxf(found.top, own[i].top);
    best = better(best, own[i].best);
    if (best.id == own[i].best.id) logit = own[i].logit;
  }
  found.top = warp_largest(found.top);
#pragma unroll
  for (int i = 0; i < N; i++) found.sum += rescaled(own[i].sum, own[i].top, found.top);
  found.sum = warp_sum(found.sum);
  warp_best(best, logit, &found);
  return found;
}

// Merge what a warp found in two turns.
__device__ inline Finding merged(const Finding& a, const Finding& b) {
  float top = fmaxf(a.top, b.top);
  Best best = better(a.best, b.best);
  return {top, rescaled(a.sum, a.top, top) + rescaled(b.sum, b.top, top), best,
          best.id == a.best.id ? a.logit : b.logit};
}

// The word of one token's noise.
__device__ inline u32 noise_of(int id, int position, uint2 key) {
  uint4 bits = philox(make_uint4(id / 4, position, 0, 0), key);
  u32 even = id & 2 ? bits.z : bits.x, odd = id & 2 ? bits.w : bits.y;
  return id & 1 ? odd : even;
}

// Takes the highest of the bounds away. Returns whose it was, with its logit and the highest of the
// rest.
template <int N>
__device__ inline int take_highest(float (&bounds)[N],
                                   const float (&logits)[N],
                                   float& logit,
                                   float& rest) {
  float bound = rest = MINUS_INFINITY;
  int which = 0;
  logit = logits[0];
#pragma unroll
  for (int i = 0; i < N; i++)
    if (bounds[i] > bound) {
      bound = bounds[i];
      logit = logits[i];
      which = i;
    }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (i == which) bounds[i] = MINUS_INFINITY;
    rest = fmaxf(rest, bounds[i]);
  }
  return which;
}

// A value that is sure, less what rounding can have taken from a bound of a larger one.
__device__ inline float surely(float value) { return value - (fabsf(value) + 32.0f) * 0x1p-20f; }

extern "C" __global__ void CLUSTER(PARTS) __launch_bounds__(PLAIN_THREADS, 2)
    sample_plain(const float* logits,
                 const int* rows,
                 const RowParams* params,
                 int* ids,
                 int* positions,
                 u32* steps,
                 RingEntry* ring,
                 int V,
                 int Vp,
                 int ring_size) {
  constexpr int WARPS = PLAIN_THREADS / WARP;
  constexpr int OWN = HELD * 4, STRIDE = ROW_BLOCKS * PLAIN_THREADS * 4;  // tokens
  __shared__ Finding findings[ROW_BLOCKS * WARPS];
  __shared__ float highest[WARPS], found_sure[WARPS];  // of each warp
  __shared__ Counter arrived;
  int block = cluster_rank(), lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if (block == 0 && threadIdx.x == 0) open_counter(&arrived);
  cluster_begin();
  int line = blockIdx.x / ROW_BLOCKS, row = rows[line], position = positions[row] + 1;
  RowParams p = params[row];
  uint2 key = make_uint2((u32)p.seed, (u32)(p.seed >> 32));
  bool random = p.temperature > 0.0f;
  float inverse = 1.0f / p.temperature;
  logits += (size_t)line * Vp;

  const Finding NOTHING = {MINUS_INFINITY, 0.0f, {MINUS_INFINITY, NO_TOKEN}, 0.0f};
  Finding own = NOTHING;
#pragma unroll 1
  for (int first = 0; first < V; first += HELD * STRIDE) {
    int start = first + (block * PLAIN_THREADS + threadIdx.x) * 4, left = V - start;
    auto offset = [](int i) { return i / 4 * STRIDE + i % 4; };
    const float* source = logits + start;
    float x[OWN], bounds[OWN] = {};
    // The noise does not depend on the logits: what it is at most is found while they still are.
    if (random)
#pragma unroll
      for (int i = 0; i < OWN; i += 4) {
        uint4 bits = philox(make_uint4((start + offset(i)) / 4, position, 0, 0), key);
        bounds[i] = most_gumbel(bits.x);
        bounds[i + 1] = most_gumbel(bits.y);
        bounds[i + 2] = most_gumbel(bits.z);
        bounds[i + 3] = most_gumbel(bits.w);
      }
    if (first == 0) wait_for_inputs();
#pragma unroll
    for (int i = 0; i < OWN; i += 4) {
      float quad[4] = {};
      if (offset(i) < left) load_floats(source + offset(i), quad);  // rows are padded to 128
#pragma unroll
      for (int j = 0; j < 4; j++) x[i + j] = offset(i + j) < left ? quad[j] : MINUS_INFINITY;
    }

    Finding found = {MINUS_INFINITY, 0.0f};
#pragma unroll
    for (int i = 0; i < OWN; i++) found.top = fmaxf(found.top, x[i]);
    found.top = warp_largest(found.top);
    float base = found.top == MINUS_INFINITY ? 0.0f : found.top;
#pragma unroll
    for (int i = 0; i < OWN; i++) found.sum += power_of_two((x[i] - base) * LOG2_E);
    found.sum = warp_sum(found.sum);

    float most = MINUS_INFINITY;
#pragma unroll
    for (int i = 0; i < OWN; i++) {  // NaN comes last, and loses
      bounds[i] = fmaxf(random ? fmaf(x[i], inverse, bounds[i]) : x[i], LOWEST);
      most = fmaxf(most, bounds[i]);
    }
    most = warp_largest(most);
    if (lane == 0) highest[warp] = most;
    __syncthreads();

    // The noise itself takes ten times as many instructions. Where the highest bound is, it is made
    // first; then in warps whose bounds are not below what is sure by then, which are few.
    bool leads = most == warp_largest(highest[lane % WARPS]);
    float sure = MINUS_INFINITY, logit = 0.0f;
    Best best = {MINUS_INFINITY, NO_TOKEN};
#pragma unroll 1
    for (int others = 0; others < 2; others++) {
      if (leads != others && most >= surely(sure)) {
        float rest;
        do {
          float raw;
          Best choice;
          choice.id = start + offset(take_highest(bounds, x, raw, rest));
          choice.value = raw;
          if (random)
            choice.value =
                divided(raw, p.temperature, inverse) + gumbel(noise_of(choice.id, position, key));
          best = better(best, choice);
          if (best.id == choice.id) logit = raw;
          sure = fmaxf(sure, warp_largest(best.value));
        } while (__any_sync(FULL_MASK, rest > MINUS_INFINITY && rest >= surely(sure)));
      }
      if (others) break;
      if (lane == 0) found_sure[warp] = sure;
      __syncthreads();
      sure = warp_largest(found_sure[lane % WARPS]);
    }
    warp_best(best, logit, &found);
    own = first == 0 ? found : merged(own, found);
  }

  cluster_wait();  // the counter is open
  if (block == 0 && threadIdx.x == 0) expect_bytes(&arrived, sizeof(findings));
  if (lane == 0) send_words(&findings[block * WARPS + warp], &arrived, 0, own);
  if (block > 0) return;
  wait_for_bytes(&arrived);
  if (warp > 0) return;
  constexpr int EACH = (ROW_BLOCKS * WARPS + WARP - 1) / WARP;
  Finding all[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++)
    all[i] = i * WARP + lane < ROW_BLOCKS * WARPS ? findings[i * WARP + lane] : NOTHING;
  own = warp_merged(all);
  if (lane > 0) return;
  int id = min(own.best.id, V - 1);  // a row of NaN has no best
  ids[row] = id;
  positions[row] = position;
  float logprob = own.logit - (own.top + logf(own.sum));
  hand_over(ring + (size_t)row * ring_size, ring_size, &steps[row], id, logprob);
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
