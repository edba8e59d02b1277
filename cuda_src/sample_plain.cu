// The next token of each row, greedy or by temperature alone, in one pass over the logits.
//
//   token  = argmax(logits)                               temperature 0
//          = argmax(logits / temperature + gumbel noise)  otherwise
//
// Shapes    as in sampling.cu, without counts, bias and scratch
// Bytes     4 V a row
// Work      PARTS blocks of a cluster share a row; their findings (maximum, sum, best choice) meet
//           in the shared memory of the first. A thread has quads of tokens, HELD of them in a
//           turn. Noise costs ten times a bound of it, so it is made only for tokens that it could
//           make the best.
//
// Entries   sample_plain                   one block a row, where there are enough rows to fill the
//                                          chip, or no clusters
//           sample_plain_c2, ..._4, ..._8   so many
//
// gpt2cupy/ops/reference_sampling.py is the specification, the kernel of sampling.cu the baseline.
#include "dsmem.cuh"
#include "sampling.cuh"
#include "softmax_state.cuh"

constexpr int THREADS = 512;  // of a block
constexpr int WARPS = THREADS / WARP;
constexpr int HELD = 4;        // quads of a thread in a turn: 8,192 tokens of a block
constexpr int OWN = HELD * 4;  // values
constexpr float LN_2 = 0.6931471805599453f;
constexpr int NO_TOKEN = 0x7fffffff;  // where nothing is larger than NaN

// What gumbel() cannot exceed, but for rounding: -log1p(-u) is at least u.
__device__ inline float most_gumbel(u32 bits) { return -LN_2 * __log2f(uniform(bits)); }

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

// Values of a turn: quads, STRIDE tokens from one to the next.
template <int STRIDE>
__device__ constexpr int offset(int i) {
  return i / 4 * STRIDE + i % 4;
}

// What the noise of the turn's tokens, which begin at `start`, is at most.
template <int STRIDE>
__device__ inline void bound_noise(int start, int position, uint2 key, float (&bounds)[OWN]) {
#pragma unroll
  for (int i = 0; i < OWN; i += 4) {
    uint4 bits = philox(make_uint4((start + offset<STRIDE>(i)) / 4, position, 0, 0), key);
    bounds[i] = most_gumbel(bits.x);
    bounds[i + 1] = most_gumbel(bits.y);
    bounds[i + 2] = most_gumbel(bits.z);
    bounds[i + 3] = most_gumbel(bits.w);
  }
}

// The turn's logits; minus infinity past the last `left`.
template <int STRIDE>
__device__ inline void load_logits(const float* source, int left, float (&x)[OWN]) {
#pragma unroll
  for (int i = 0; i < OWN; i += 4) {
    float quad[4] = {};
    if (offset<STRIDE>(i) < left)  // rows are padded to 128
      load_floats(source + offset<STRIDE>(i), quad);
#pragma unroll
    for (int j = 0; j < 4; j++) x[i + j] = offset<STRIDE>(i + j) < left ? quad[j] : MINUS_INFINITY;
  }
}

// The warp's largest logit and sum.
__device__ inline Finding summed(const float (&x)[OWN]) {
  Finding found = {MINUS_INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < OWN; i++) found.top = fmaxf(found.top, x[i]);
  found.top = warp_largest(found.top);
  float base = found.top == MINUS_INFINITY ? 0.0f : found.top;
#pragma unroll
  for (int i = 0; i < OWN; i++) found.sum += power_of_two((x[i] - base) * LOG2_E);
  found.sum = warp_sum(found.sum);
  return found;
}

template <int PARTS>
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
  constexpr int STRIDE = PARTS * THREADS * 4;  // tokens
  __shared__ Finding findings[PARTS * WARPS];
  __shared__ float highest[WARPS], found_sure[WARPS];  // of each warp
  __shared__ Mbarrier arrived;
  int block = cluster_rank(), lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  if constexpr (PARTS > 1) {
    if (block == 0 && threadIdx.x == 0) {
      mbarrier_init(shared_address(&arrived), 1);
      mbarrier_init_fence();
    }
    cluster_arrive();
  }
  int line = blockIdx.x / PARTS, row = rows[line], position = positions[row] + 1;
  RowParams p = params[row];
  uint2 key = make_uint2((u32)p.seed, (u32)(p.seed >> 32));
  bool random = p.temperature > 0.0f;
  float inverse = 1.0f / p.temperature;
  logits += (size_t)line * Vp;

  const Finding NOTHING = {MINUS_INFINITY, 0.0f, {MINUS_INFINITY, NO_TOKEN}, 0.0f};
  Finding own = NOTHING;
  float sure = MINUS_INFINITY;            // a choice of the block is as good
  const int begin = block * THREADS * 4;  // in the first turn; a block may have no tokens
#pragma unroll 1
  for (int first = begin; first < V; first += HELD * STRIDE) {
    int start = first + threadIdx.x * 4;
    float x[OWN], bounds[OWN] = {};
    // The noise does not depend on the logits: what it is at most is found while they still are.
    if (random) bound_noise<STRIDE>(start, position, key, bounds);
    if (first == begin) griddepcontrol_wait();
    load_logits<STRIDE>(logits + start, V - start, x);
    Finding found = summed(x);

    float most = MINUS_INFINITY;
#pragma unroll
    for (int i = 0; i < OWN; i++) {  // NaN comes last, and loses
      bounds[i] = fmaxf(random ? fmaf(x[i], inverse, bounds[i]) : x[i], LOWEST);
      most = fmaxf(most, bounds[i]);
    }
    most = warp_largest(most);
    if (lane == 0) highest[warp] = most;
    __syncthreads();

    // The noise itself is made first where the highest bound is; then in warps whose bounds are
    // not below what is sure by then, which are few.
    bool leads = most == warp_largest(highest[lane % WARPS]);
    float logit = 0.0f;
    Best best = {MINUS_INFINITY, NO_TOKEN};
#pragma unroll 1
    for (int others = 0; others < 2; others++) {
      if (leads != others && most >= surely(sure)) {
        float rest;
        do {
          float raw;
          Best choice;
          choice.id = start + offset<STRIDE>(take_highest(bounds, x, raw, rest));
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
    own = first == begin ? found : merged(own, found);
  }

  if constexpr (PARTS > 1) {
    cluster_wait();  // the counter is open
    if (block == 0 && threadIdx.x == 0)
      mbarrier_arrive_expect_tx(shared_address(&arrived), sizeof(findings));
    if (lane == 0) dsmem_store_struct(&findings[block * WARPS + warp], &arrived, 0, own);
    if (block > 0) return;
    mbarrier_wait_cluster(shared_address(&arrived), 0);
  } else {
    if (lane == 0) findings[warp] = own;
    __syncthreads();
  }
  if (warp > 0) return;
  constexpr int EACH = (PARTS * WARPS + WARP - 1) / WARP;
  Finding all[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++)
    all[i] = i * WARP + lane < PARTS * WARPS ? findings[i * WARP + lane] : NOTHING;
  own = warp_merged(all);
  if (lane > 0) return;
  int id = min(own.best.id, V - 1);  // a row of NaN has no best
  ids[row] = id;
  positions[row] = position;
  float logprob = own.logit - (own.top + logf(own.sum));
  hand_over(ring + (size_t)row * ring_size, ring_size, &steps[row], id, logprob);
}

#define SAMPLE_PLAIN_ENTRY(name, cluster, parts)                                        \
  extern "C" __global__ void cluster __launch_bounds__(THREADS, 2)                      \
      name(const float* logits, const int* rows, const RowParams* params, int* ids,     \
           int* positions, u32* steps, RingEntry* ring, int V, int Vp, int ring_size) { \
    choose<parts>(logits, rows, params, ids, positions, steps, ring, V, Vp, ring_size); \
  }

SAMPLE_PLAIN_ENTRY(sample_plain, , 1)
#if __CUDA_ARCH__ >= 900
SAMPLE_PLAIN_ENTRY(sample_plain_c2, __cluster_dims__(2), 2)
SAMPLE_PLAIN_ENTRY(sample_plain_c4, __cluster_dims__(4), 4)
SAMPLE_PLAIN_ENTRY(sample_plain_c8, __cluster_dims__(8), 8)
#endif
