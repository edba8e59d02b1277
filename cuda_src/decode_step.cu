// A whole decode step up to the logits in one launch: one block a multiprocessor, all resident.
//
//   x = wte[ids] + wpe[positions]
//   L times:  x += proj(attention(qkv(norm(x))));  x += out(activation(fc(norm(x))))
//   logits = lm_head norm(x)
//
// Entries   decode_step_b1, _b2, _b4: as many rows N of the batch
// Shapes    as in Weights and KVCache; logits [N, Vp] float; C = K, inner size 4 C, head size HS
// Dtypes    ELEM is fp16 or bf16; the residual stream, proj_b, out_b and the logits are float
// Bytes     all weights but the embeddings once, and keys and values of the past
// FLOPs     2 N for each weight
// Work      Every matrix is shared out by rows: a block has the same share of outputs of each, and
//           their weights follow each other in an order that depends on no activation. So one warp,
//           the producer, does nothing but copy them to a pipeline of stages in shared memory,
//           eight rows of C elements a stage: it runs ahead by as much as the stages hold
//           (pipeline.cuh). The memory is busy while the other warps wait for each other. Those
//           multiply on tensor cores; each has its part of K for all rows of weights, so that it
//           needs only its part of x. Their sums are added through shared memory. A head is
//           attended to by one block, with many tokens by several.
// Together  Rows may belong to one text, at neighbouring positions: each then sees the new keys and
//           values of the rows before its own, which it reads where these are exchanged.
// Exchange  Blocks exchange values through flagged mailboxes in global memory (mailbox.cuh). A
//           mailbox may be overwritten when all have read it: its writer has seen values to which
//           every block contributed after it had read the mailbox.
// Residency A block that is not resident would be waited for forever: the launch is cooperative,
//           and a spin timeout of ten seconds ends the kernel with an error.
//
// Needs sm_90 (bulk copies that complete an mbarrier).
#include "step_gemv.cuh"

#define STEP_HEAD_SIZE 64
constexpr int STEP_FEWEST_CHANNELS = 256;  // n_embd: each warp has a part of it
constexpr int STEP_MOST_CHANNELS = 2048;   // and the stages in flight fit shared memory

#if __CUDA_ARCH__ >= 900 && HS == STEP_HEAD_SIZE

static_assert(STEP_FEWEST_CHANNELS <= C && C <= STEP_MOST_CHANNELS, "K");

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
                            Mailboxes<N>* mailboxes,
                            float* logits,
                            float scale,
                            int by_layer,
                            float eps,
                            int activation,
                            int together,
                            int L,
                            int S,
                            int T,
                            int P,
                            int Vp) {
  extern __shared__ __align__(128) char memory[];
  Weights<N> pipeline = {(unsigned)opaque(shared_address(memory))};
  unsigned base = pipeline.base + Weights<N>::BYTES;
  auto& shared = *reinterpret_cast<SharedStorage<N>*>(memory + Weights<N>::BYTES);
  constexpr int NH = C / HS;

  // As many blocks share each head of each row; the remaining blocks have no job.
  constexpr int heads = N * NH;
  int most = min(MOST_PARTS, max(1, (int)gridDim.x / heads)), jobs = heads * most;
  size_t layer_size = (size_t)S * NH * T * HS;
  auto job_of = [&](int j) {
    Job job = {j % heads / NH, j % NH, j / heads};
    int slot = slots[job.n];
    job.position = positions[job.n];
    job.idle = slot < 0 || job.position < 0 || job.position >= T;
    if (job.idle) job.position = -1;
    job.fresh = N > 1 && together ? job.n + 1 : 1;
    job.parts = min(most, job.position / (2 * TOKENS) + 1);
    job.cache = cache_offset(max(slot, 0), job.head, NH, T);
    return job;
  };

  pipeline.init(CONSUMERS);
  if (threadIdx.x < 4)
    shared.shares[threadIdx.x] = share_of(threadIdx.x == FC    ? WIDE * C
                                          : threadIdx.x == QKV ? 3 * C
                                                               : C);
  if (threadIdx.x == WARP) shared.job = (int)blockIdx.x < jobs ? job_of(blockIdx.x) : Job{};
  __syncthreads();
  Share stream = shared.shares[PROJ];  // of the residual stream: PROJ and OUT have the same rows

  if (threadIdx.x / WARP == CONSUMERS) {
    Producer<STAGES<N>> producer = {pipeline};
    Share qkv = shared.shares[QKV], inner = shared.shares[FC];
    for (int l = 0; l < L; l++) {
      // Biases and norms of a layer are prefetched to L2.
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
      shared.job.prefetch(k + l * layer_size, v + l * layer_size);
      producer.rows(w.qkv_w + (size_t)l * 3 * C * C, qkv, 1);
      producer.rows(w.proj_w + (size_t)l * C * C, stream, 1);
      producer.rows(w.fc_w + (size_t)l * WIDE * C * C, inner, 1);
      producer.rows(w.out_w + (size_t)l * WIDE * C * C, stream, WIDE);
    }
    producer.rows(lm_head, share_of(Vp), 1);
    return;
  }

  unsigned epoch = *reinterpret_cast<volatile unsigned*>(&mailboxes->epoch);
  auto embedding = [&](int n, int c) {
    int id = ids[n], position = positions[n];
    bool inside = id >= 0 && id < Vp && position >= 0 && position < P;
    return inside ? to_float(wte[(size_t)id * C + c]) + to_float(wpe[(size_t)position * C + c])
                  : 0.0f;
  };
  // The block's outputs of the residual stream, each in a register of the thread that writes it.
  float residual = 0.0f;
  if (writes<N>(threadIdx.x, stream.count))
    residual = embedding(threadIdx.x / GROUP, stream.first + threadIdx.x % GROUP);

  PipelineState at = {};
  int buffer = 0;
  auto load_normalised = [&](const FloatMailbox* from, unsigned flag, bool first,
                             const elem_t* weight, const elem_t* bias) {
    int tid = opaque(threadIdx.x);
    Norm norm;
    norm.load(tid, weight, bias);
    PerUnit<float> x[N];
    if (first) {
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int u = 0; u < MOST_UNITS; u++)
          x[n][u] = has_unit(tid, u) ? embedding(n, lane_at(tid, u)) : 0.0f;
    } else {
      wait_for_stream<N>(tid, from, flag, x);
    }
    normalise<N>(tid, x, norm, eps, base, buffer);
  };
#pragma unroll 1
  for (int l = 0; l < L; l++) {
    unsigned flag = epoch + l + 1;
    elem_t *layer_k = k + l * layer_size, *layer_v = v + l * layer_size;
    load_normalised(&mailboxes->after_mlp[0][0], flag - 1, l == 0, w.ln1_w + l * C,
                    w.ln1_b + l * C);
    gemv<N, 1>(pipeline, at, buffer, base, shared.shares[QKV], w.qkv_b + l * 3 * C,
               [&](int n, int m, float y) { post(&mailboxes->qkv[n][m], y, flag); });
#pragma unroll 1
    for (int j = blockIdx.x; j < jobs; j += gridDim.x) {
      int tid = opaque(threadIdx.x);
      if (j != (int)blockIdx.x) sync_consumers();
      Job job = j == (int)blockIdx.x ? shared.job : job_of(j);
      if (job.part < job.parts)
        attend<N>(tid, mailboxes, shared.attention, flag, job, layer_k, layer_v,
                  by_layer ? scale / (l + 1) : scale);
    }
    wait_for_rows<N, 1>(opaque(threadIdx.x), &mailboxes->attended[0][0], flag, base);
    gemv<N, 1>(pipeline, at, buffer, base, shared.shares[PROJ], w.proj_b + l * C,
               [&](int n, int m, float y) {
                 post(&mailboxes->after_attention[n][m], residual += y, flag);
               });
    load_normalised(&mailboxes->after_attention[0][0], flag, false, w.ln2_w + l * C,
                    w.ln2_b + l * C);
    gemv<N, 1>(pipeline, at, buffer, base, shared.shares[FC], w.fc_b + l * WIDE * C,
               [&](int n, int m, float y) {
                 post(&mailboxes->inner[n][m], activate(y, activation), flag);
               });
    wait_for_rows<N, WIDE>(opaque(threadIdx.x), &mailboxes->inner[0][0], flag, base);
    gemv<N, WIDE>(
        pipeline, at, buffer, base, shared.shares[OUT], w.out_b + l * C,
        [&](int n, int m, float y) { post(&mailboxes->after_mlp[n][m], residual += y, flag); });
  }
  load_normalised(&mailboxes->after_mlp[0][0], epoch + L, false, lnf_w, lnf_b);
  gemv<N, 1>(pipeline, at, buffer, base, share_of(Vp), (const float*)nullptr,
             [&](int n, int m, float y) { logits[(size_t)n * Vp + m] = y; });
  // All blocks have read it: each contributed to the values of the last wait.
  if (blockIdx.x == 0 && threadIdx.x == 0) mailboxes->epoch = epoch + L;
}

#define DECODE_STEP_ENTRY(name, N)                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) name(                                  \
      const int* ids, const int* positions, const int* slots, const elem_t* wte,                  \
      const elem_t* wpe, const elem_t* ln1_w, const elem_t* ln1_b, const elem_t* qkv_w,           \
      const elem_t* qkv_b, const elem_t* proj_w, const float* proj_b, const elem_t* ln2_w,        \
      const elem_t* ln2_b, const elem_t* fc_w, const elem_t* fc_b, const elem_t* out_w,           \
      const float* out_b, const elem_t* lnf_w, const elem_t* lnf_b, const elem_t* lm_head,        \
      elem_t* k, elem_t* v, unsigned char* mailboxes, float* logits, float scale, int by_layer,   \
      float eps, int activation, int together, int L, int S, int T, int P, int Vp) {              \
    Layers layers = {ln1_w, ln1_b, qkv_w, qkv_b, proj_w, proj_b,                                  \
                     ln2_w, ln2_b, fc_w,  fc_b,  out_w,  out_b};                                  \
    step<N>(ids, positions, slots, wte, wpe, layers, lnf_w, lnf_b, lm_head, k, v,                 \
            reinterpret_cast<Mailboxes<N>*>(mailboxes), logits, scale, by_layer, eps, activation, \
            together, L, S, T, P, Vp);                                                            \
  }

#ifndef BATCH
#define BATCH 1  // rows of a step
#endif
#if BATCH == 1
DECODE_STEP_ENTRY(decode_step_b1, 1)
#elif BATCH == 2
DECODE_STEP_ENTRY(decode_step_b2, 2)
#elif BATCH == 4
DECODE_STEP_ENTRY(decode_step_b4, 4)
#endif

#endif
