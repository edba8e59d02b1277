// The next token of each row, greedy or by temperature alone, in one pass over the logits.
//
//   token  = argmax(logits)                               temperature 0
//          = argmax(logits / temperature + gumbel noise)  otherwise
//
// Shapes    as in sampling.cu, without counts, bias and scratch
// Bytes     4 V a row
// Work      PARTS blocks of a cluster share a row; their states (maximum, sum, best token) are
//           merged in the shared memory of the first. A thread loads QUADS quads of tokens at a
//           time. Noise costs ten times as much as a bound of it, so it is computed only for tokens
//           that could become the best by it.
//
// Entries   sample_plain                one block a row: rows that fill the chip, or no clusters
//           sample_plain_c2, _c4, _c8   as many blocks of a cluster a row
//
// gpt2cupy/ops/reference_sampling.py is the specification, the kernel of sampling.cu the baseline.
#include "dsmem.cuh"
#include "sampling.cuh"
#include "softmax_state.cuh"

constexpr int THREADS = 512;  // of a block
constexpr int WARPS = THREADS / WARP;
constexpr int QUADS = 4;        // of a thread at a time: 8,192 tokens of a block
constexpr int OWN = QUADS * 4;  // values
constexpr float LN_2 = 0.6931471805599453f;
constexpr int NO_TOKEN = 0x7fffffff;  // where nothing is larger than NaN

// A bound of gumbel(), but for rounding: -log1p(-u) is at least u.
__device__ inline float most_gumbel(u32 bits) { return -LN_2 * __log2f(uniform(bits)); }

// The state of a part of a row: maximum m, l = sum of exp(x - m), best token and its raw logit.
struct State {
  float m, l;
  Best best;
  float logit;
};

// A sum of exp(x - from) as one of exp(x - to). Where there has been no number it is 0, or NaN
// after a NaN: it stays as it is.
__device__ inline float rescaled(float sum, float from, float to) {
  float factor = power_of_two((from - to) * LOG2_E);
  return from == MINUS_INFINITY ? sum : sum * factor;
}

// x / divisor, given 1 / divisor: the exact error of the quotient corrects its last bit.
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

// The best token of the warp, given each lane's and its logit; every lane gets it.
__device__ inline void warp_best(Best own, float logit, State* state) {
  float value = warp_largest(own.value);
  int id = warp_least(own.value == value ? own.id : NO_TOKEN);
  int lane = __ffs(__ballot_sync(FULL_MASK, own.id == id)) - 1;
  state->best = {value, id};
  state->logit = __shfl_sync(FULL_MASK, logit, lane);
}

// Merge N states of each lane of a warp; every lane gets the result.
template <int N>
__device__ inline State warp_merged(const State (&own)[N]) {
  State found = {MINUS_INFINITY, 0.0f};
  Best best = own[0].best;
  float logit = own[0].logit;
#pragma unroll
  for (int i = 0; i < N; i++) {
    found.m = fmaxf(found.m, own[i].m);
    best = better(best, own[i].best);
    if (best.id == own[i].best.id) logit = own[i].logit;
  }
  found.m = warp_largest(found.m);
#pragma unroll
  for (int i = 0; i < N; i++) found.l += rescaled(own[i].l, own[i].m, found.m);
  found.l = warp_sum(found.l);
  warp_best(best, logit, &found);
  return found;
}

// Merge two states.
__device__ inline State merged(const State& a, const State& b) {
  float m = fmaxf(a.m, b.m);
  Best best = better(a.best, b.best);
  return {m, rescaled(a.l, a.m, m) + rescaled(b.l, b.m, m), best,
          best.id == a.best.id ? a.logit : b.logit};
}

// The random word of one token.
__device__ inline u32 noise_of(int id, int position, uint2 key) {
  uint4 bits = philox(make_uint4(id / 4, position, 0, 0), key);
  u32 even = id & 2 ? bits.z : bits.x, odd = id & 2 ? bits.w : bits.y;
  return id & 1 ? odd : even;
}

// Remove the highest of the bounds. Returns its index, with its logit and the highest of the rest.
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

// A value that is reached for certain, less what rounding can have taken from a larger bound.
__device__ inline float safely(float value) { return value - (fabsf(value) + 32.0f) * 0x1p-20f; }

// The offset of value i: quads are STRIDE tokens apart.
template <int STRIDE>
__device__ constexpr int offset(int i) {
  return i / 4 * STRIDE + i % 4;
}

// Bounds of the noise of the tokens from `start` on.
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

// The logits of the tokens; minus infinity past the last `left`.
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

// The maximum and sum of the warp's logits.
__device__ inline State summed(const float (&x)[OWN]) {
  State found = {MINUS_INFINITY, 0.0f};
#pragma unroll
  for (int i = 0; i < OWN; i++) found.m = fmaxf(found.m, x[i]);
  found.m = warp_largest(found.m);
  float base = found.m == MINUS_INFINITY ? 0.0f : found.m;
#pragma unroll
  for (int i = 0; i < OWN; i++) found.l += power_of_two((x[i] - base) * LOG2_E);
  found.l = warp_sum(found.l);
  return found;
}

template <int PARTS>
__device__ inline void sample_row(const float* logits,
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
  __shared__ State states[PARTS * WARPS];
  __shared__ float highest[WARPS], certain_of[WARPS];  // of each warp
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

  const State EMPTY = {MINUS_INFINITY, 0.0f, {MINUS_INFINITY, NO_TOKEN}, 0.0f};
  State own = EMPTY;
  float certain = MINUS_INFINITY;         // some token of the block reaches it
  const int begin = block * THREADS * 4;  // of the block; it may have no tokens
#pragma unroll 1
  for (int first = begin; first < V; first += QUADS * STRIDE) {
    int start = first + threadIdx.x * 4;
    float x[OWN], bounds[OWN] = {};
    // The noise does not depend on the logits: its bounds are computed while those still are.
    if (random) bound_noise<STRIDE>(start, position, key, bounds);
    if (first == begin) griddepcontrol_wait();
    load_logits<STRIDE>(logits + start, V - start, x);
    State found = summed(x);

    float most = MINUS_INFINITY;
#pragma unroll
    for (int i = 0; i < OWN; i++) {  // NaN comes last, and loses
      bounds[i] = fmaxf(random ? fmaf(x[i], inverse, bounds[i]) : x[i], LOWEST);
      most = fmaxf(most, bounds[i]);
    }
    most = warp_largest(most);
    if (lane == 0) highest[warp] = most;
    __syncthreads();

    // The noise itself is computed first in the warp with the highest bound; then in warps whose
    // bounds are not below what is certain by then, which are few.
    bool leads = most == warp_largest(highest[lane % WARPS]);
    float logit = 0.0f;
    Best best = {MINUS_INFINITY, NO_TOKEN};
#pragma unroll 1
    for (int others = 0; others < 2; others++) {
      if (leads != others && most >= safely(certain)) {
        float rest;
        do {
          float raw;
          Best token;
          token.id = start + offset<STRIDE>(take_highest(bounds, x, raw, rest));
          token.value = raw;
          if (random)
            token.value =
                divided(raw, p.temperature, inverse) + gumbel(noise_of(token.id, position, key));
          best = better(best, token);
          if (best.id == token.id) logit = raw;
          certain = fmaxf(certain, warp_largest(best.value));
        } while (__any_sync(FULL_MASK, rest > MINUS_INFINITY && rest >= safely(certain)));
      }
      if (others) break;
      if (lane == 0) certain_of[warp] = certain;
      __syncthreads();
      certain = warp_largest(certain_of[lane % WARPS]);
    }
    warp_best(best, logit, &found);
    own = first == begin ? found : merged(own, found);
  }

  if constexpr (PARTS > 1) {
    cluster_wait();  // the mbarrier is initialised
    if (block == 0 && threadIdx.x == 0)
      mbarrier_arrive_expect_tx(shared_address(&arrived), sizeof(states));
    if (lane == 0) dsmem_store_struct(&states[block * WARPS + warp], &arrived, 0, own);
    if (block > 0) return;
    mbarrier_wait_cluster(shared_address(&arrived), 0);
  } else {
    if (lane == 0) states[warp] = own;
    __syncthreads();
  }
  if (warp > 0) return;
  constexpr int EACH = (PARTS * WARPS + WARP - 1) / WARP;
  State all[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++)
    all[i] = i * WARP + lane < PARTS * WARPS ? states[i * WARP + lane] : EMPTY;
  own = warp_merged(all);
  if (lane > 0) return;
  int id = min(own.best.id, V - 1);  // a row of NaN has no best
  ids[row] = id;
  positions[row] = position;
  float logprob = own.logit - (own.m + logf(own.l));
  push_token(ring + (size_t)row * ring_size, ring_size, &steps[row], id, logprob);
}

#define SAMPLE_PLAIN_ENTRY(name, cluster, parts)                                            \
  extern "C" __global__ void cluster __launch_bounds__(THREADS, 2)                          \
      name(const float* logits, const int* rows, const RowParams* params, int* ids,         \
           int* positions, u32* steps, RingEntry* ring, int V, int Vp, int ring_size) {     \
    sample_row<parts>(logits, rows, params, ids, positions, steps, ring, V, Vp, ring_size); \
  }

SAMPLE_PLAIN_ENTRY(sample_plain, , 1)
#if __CUDA_ARCH__ >= 900
SAMPLE_PLAIN_ENTRY(sample_plain_c2, __cluster_dims__(2), 2)
SAMPLE_PLAIN_ENTRY(sample_plain_c4, __cluster_dims__(4), 4)
SAMPLE_PLAIN_ENTRY(sample_plain_c8, __cluster_dims__(8), 8)
#endif
