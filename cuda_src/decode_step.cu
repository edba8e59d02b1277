// A whole decode step up to the logits in one launch: one block a multiprocessor, all resident.
//
//   x = wte[ids] + wpe[positions]
//   L times:  x += proj(attention(qkv(norm(x))));  x += out(activation(fc(norm(x))))
//   logits = lm_head norm(x)
//
// Entries   decode_step_1, _2, _4: as many rows N of the batch
// Shapes    as in Weights and KVCache; logits [N, Vp] float; C = K, inner size 4 C, head size HS
// Dtypes    ELEM is half or bfloat16; the residual stream, proj_b, out_b and the logits are float
// Bytes     all weights but the embeddings once, and keys and values of the past
// FLOPs     2 N for each weight
// Work      Every matrix is dealt out by rows: a block has the same share of outputs of each, and
//           their weights follow each other in an order that depends on nothing. So one warp does
//           nothing but bring them, through a ring in shared memory, eight rows of C elements
//           at a time: it runs ahead by as much as the ring holds and never waits for an
//           activation (ring.cuh). The memory is busy while the other warps wait for each other.
//           Those multiply on tensor cores; each has its part of K for all rows of weights, so
//           that it needs only its part of x. Their sums meet in shared memory.
//           Attention of a head is one block's, with many tokens several blocks'.
// Hand-over What a block finds goes to all others through global memory, each value in a word with
//           the number of its layer since the first step (words.cuh). A word may be written again
//           when all have read it: whoever writes one has seen values to which every block
//           contributed after it had read the word.
// Danger    A block that is not resident would be waited for forever: the launch is cooperative,
//           and whoever waits longer than ten seconds ends the kernel with an error.
//
// Needs sm_90 (bulk copies that count themselves in).
#include "step_product.cuh"

#if __CUDA_ARCH__ >= 900 && HS == 64

struct Layers {
  const elem_t *ln1_w, *ln1_b, *qkv_w, *qkv_b, *proj_w;
  const float* proj_b;
  const elem_t *ln2_w, *ln2_b, *fc_w, *fc_b, *out_w;
  const float* out_b;
};

template <int N>
__device__ inline void step(const int* ids,
                            const int* positions,
                            const int* slots,
                            const elem_t* wte,
                            const elem_t* wpe,
                            const Layers& w,
                            const elem_t* lnf_w,
                            const elem_t* lnf_b,
                            const elem_t* lm_head,
                            elem_t* k,
                            elem_t* v,
                            Words<N>* words,
                            float* logits,
                            float scale,
                            int by_layer,
                            float eps,
                            int activation,
                            int L,
                            int S,
                            int T,
                            int P,
                            int Vp) {
  extern __shared__ __align__(128) char memory[];
  Weights<N> ring = {(unsigned)anew(shared_address(memory))};
  unsigned base = ring.base + Weights<N>::BYTES;
  Room<N>& room = *reinterpret_cast<Room<N>*>(memory + Weights<N>::BYTES);
  constexpr int NH = C / HS;

  // Of the heads of all rows, the blocks that share each; what is left has nothing to do.
  constexpr int heads = N * NH;
  int most = min(MOST_PARTS, max(1, (int)gridDim.x / heads)), jobs = heads * most;
  size_t layer_size = (size_t)S * NH * T * HS;
  auto job_of = [&](int j) {
    Job job = {j % heads / NH, j % NH, j / heads};
    int slot = slots[job.n];
    job.position = positions[job.n];
    job.idle = slot < 0 || job.position < 0 || job.position >= T;
    if (job.idle) job.position = -1;
    job.parts = min(most, job.position / (2 * TOKENS) + 1);
    job.cache = ((size_t)max(slot, 0) * NH + job.head) * T * HS;
    return job;
  };

  ring.open(CONSUMERS);
  if (threadIdx.x < 4)
    room.shares[threadIdx.x] = share_of(threadIdx.x == FC    ? WIDE * C
                                        : threadIdx.x == QKV ? 3 * C
                                                             : C);
  if (threadIdx.x == WARP) room.job = (int)blockIdx.x < jobs ? job_of(blockIdx.x) : Job{};
  __syncthreads();
  Share stream = room.shares[PROJ];  // of the residual stream: PROJ and OUT have the same rows

  if (threadIdx.x / WARP == CONSUMERS) {
    Producer<STAGES<N>> producer = {ring};
    Share qkv = room.shares[QKV], inner = room.shares[FC];
    for (int l = 0; l < L; l++) {
      // The small things of a layer come to L2 before they are asked for.
      int lane = threadIdx.x % WARP;
      if (lane == 0) prefetch_l2(w.qkv_b + l * 3 * C + qkv.first, qkv.count * 2);
      if (lane == 1) prefetch_l2(w.proj_b + l * C + stream.first, stream.count * 4);
      if (lane == 2) prefetch_l2(w.fc_b + l * WIDE * C + inner.first, inner.count * 2);
      if (lane == 3) prefetch_l2(w.out_b + l * C + stream.first, stream.count * 4);
      if (l % gridDim.x == blockIdx.x) {
        if (lane == 4) prefetch_l2(w.ln1_w + l * C, C * 2);
        if (lane == 5) prefetch_l2(w.ln1_b + l * C, C * 2);
        if (lane == 6) prefetch_l2(w.ln2_w + l * C, C * 2);
        if (lane == 7) prefetch_l2(w.ln2_b + l * C, C * 2);
      }
      room.job.prefetch(k + l * layer_size, v + l * layer_size);
      producer.rows(w.qkv_w + (size_t)l * 3 * C * C, qkv, 1);
      producer.rows(w.proj_w + (size_t)l * C * C, stream, 1);
      producer.rows(w.fc_w + (size_t)l * WIDE * C * C, inner, 1);
      producer.rows(w.out_w + (size_t)l * WIDE * C * C, stream, WIDE);
    }
    producer.rows(lm_head, share_of(Vp), 1);
    return;
  }

  unsigned epoch = *reinterpret_cast<volatile unsigned*>(&words->epoch);
  auto embedding = [&](int n, int c) {
    int id = ids[n], position = positions[n];
    bool inside = id >= 0 && id < Vp && position >= 0 && position < P;
    return inside ? to_float(wte[(size_t)id * C + c]) + to_float(wpe[(size_t)position * C + c])
                  : 0.0f;
  };
  // The outputs of this block in the residual stream, each kept by who writes it.
  float residual = 0.0f;
  if (writes<N>(threadIdx.x, stream.count))
    residual = embedding(threadIdx.x / GROUP, stream.first + threadIdx.x % GROUP);

  At<N> at = {};
  int buffer = 0;
  auto take_normed = [&](const FloatWord* from, unsigned tag, bool first, const elem_t* weight,
                         const elem_t* bias) {
    int me = anew(threadIdx.x);
    Norm norm;
    norm.load(me, weight, bias);
    PerUnit<float> x[N];
    if (first) {
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int u = 0; u < MOST_UNITS; u++)
          x[n][u] = has_unit(me, u) ? embedding(n, lane_at(me, u)) : 0.0f;
    } else {
      wait_for_stream<N>(me, from, tag, x);
    }
    normalise<N>(me, x, norm, eps, base, buffer);
  };
#pragma unroll 1
  for (int l = 0; l < L; l++) {
    unsigned tag = epoch + l + 1;
    elem_t *layer_k = k + l * layer_size, *layer_v = v + l * layer_size;
    take_normed(&words->after_mlp[0][0], tag - 1, l == 0, w.ln1_w + l * C, w.ln1_b + l * C);
    product<N, 1>(ring, at, buffer, base, room.shares[QKV], w.qkv_b + l * 3 * C,
                  [&](int n, int m, float y) { publish(&words->qkv[n][m], y, tag); });
#pragma unroll 1
    for (int j = blockIdx.x; j < jobs; j += gridDim.x) {
      int me = anew(threadIdx.x);
      if (j != (int)blockIdx.x) sync_consumers();
      Job job = j == (int)blockIdx.x ? room.job : job_of(j);
      if (job.part < job.parts)
        attend<N>(me, words, room.attention, tag, job, layer_k, layer_v,
                  by_layer ? scale / (l + 1) : scale);
    }
    wait_for_rows<N, 1>(anew(threadIdx.x), &words->attended[0][0], tag, base);
    product<N, 1>(
        ring, at, buffer, base, room.shares[PROJ], w.proj_b + l * C,
        [&](int n, int m, float y) { publish(&words->after_attention[n][m], residual += y, tag); });
    take_normed(&words->after_attention[0][0], tag, false, w.ln2_w + l * C, w.ln2_b + l * C);
    product<N, 1>(
        ring, at, buffer, base, room.shares[FC], w.fc_b + l * WIDE * C,
        [&](int n, int m, float y) { publish(&words->inner[n][m], activate(y, activation), tag); });
    wait_for_rows<N, WIDE>(anew(threadIdx.x), &words->inner[0][0], tag, base);
    product<N, WIDE>(
        ring, at, buffer, base, room.shares[OUT], w.out_b + l * C,
        [&](int n, int m, float y) { publish(&words->after_mlp[n][m], residual += y, tag); });
  }
  take_normed(&words->after_mlp[0][0], epoch + L, false, lnf_w, lnf_b);
  product<N, 1>(ring, at, buffer, base, share_of(Vp), (const float*)nullptr,
                [&](int n, int m, float y) { logits[(size_t)n * Vp + m] = y; });
  // All blocks have read it: each contributed to what was waited for last.
  if (blockIdx.x == 0 && threadIdx.x == 0) words->epoch = epoch + L;
}

#define DECODE_STEP_ENTRY(name, N)                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                         \
      name(const int* ids, const int* positions, const int* slots, const elem_t* wte,              \
           const elem_t* wpe, const elem_t* ln1_w, const elem_t* ln1_b, const elem_t* qkv_w,       \
           const elem_t* qkv_b, const elem_t* proj_w, const float* proj_b, const elem_t* ln2_w,    \
           const elem_t* ln2_b, const elem_t* fc_w, const elem_t* fc_b, const elem_t* out_w,       \
           const float* out_b, const elem_t* lnf_w, const elem_t* lnf_b, const elem_t* lm_head,    \
           elem_t* k, elem_t* v, unsigned char* words, float* logits, float scale, int by_layer,   \
           float eps, int activation, int L, int S, int T, int P, int Vp) {                        \
    Layers layers = {ln1_w, ln1_b, qkv_w, qkv_b, proj_w, proj_b,                                   \
                     ln2_w, ln2_b, fc_w,  fc_b,  out_w,  out_b};                                   \
    step<N>(ids, positions, slots, wte, wpe, layers, lnf_w, lnf_b, lm_head, k, v,                  \
            reinterpret_cast<Words<N>*>(words), logits, scale, by_layer, eps, activation, L, S, T, \
            P, Vp);                                                                                \
  }

#ifndef BATCH
#define BATCH 1  // rows of a step
#endif
#if BATCH == 1
DECODE_STEP_ENTRY(decode_step_1, 1)
#elif BATCH == 2
DECODE_STEP_ENTRY(decode_step_2, 2)
#elif BATCH == 4
DECODE_STEP_ENTRY(decode_step_4, 4)
#endif

#endif
