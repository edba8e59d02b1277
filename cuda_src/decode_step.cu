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
#include "activation.cuh"
#include "mma.cuh"
#include "step_attention.cuh"

#if __CUDA_ARCH__ >= 900 && HS == 64

constexpr int SHARED = 226 << 10;  // of a block; also in gpt2cupy/ops/step.py
constexpr int GROUP = 64;          // outputs of a block in one turn; likewise
constexpr int SPAN = 32;           // inputs of a warp's load: 4 lanes along K, 8 along the rows
constexpr int UNITS = C / SPAN;    // of K; dealt out to the warps
constexpr int MOST_UNITS = (UNITS + CONSUMERS - 1) / CONSUMERS;
static_assert(UNITS >= CONSUMERS, "each warp has a part of K");

enum Product { QKV, PROJ, FC, OUT };

// What a block has in shared memory behind the ring. Moments and sums are there twice: the next
// product's are written while the last one's may still be read.
template <int N>
struct Room {
  static constexpr int ROW = WIDE * C + 32;  // of x; 64 bytes apart in the banks
  alignas(16) elem_t x[N][ROW];
  float2 moments[2][N][CONSUMERS];  // mean, and sum of squares about it
  float sums[2][CONSUMERS][N][GROUP];
  AttentionRoom attention;
  Share shares[4];  // of each product
  Job job;          // the first; most have no more
};

// Where things are in it, in bytes.
template <int N>
__device__ constexpr int MOMENTS(int side, int n) {
  return sizeof(elem_t) * N * Room<N>::ROW + (side * N + n) * CONSUMERS * 8;
}
template <int N>
__device__ constexpr int SUMS(int side, int warp, int n) {
  return MOMENTS<N>(2, 0) + ((side * CONSUMERS + warp) * N + n) * GROUP * 4;
}

template <int N>
constexpr int STAGES = (SHARED - (int)sizeof(Room<N>)) / (STAGE + 16);
template <int N>
using Weights = Ring<STAGES<N>>;
template <int N>
using At = Cursor<STAGES<N>>;

// ---------------------------------------------------------------------------------------------
// taking x

// The first unit of K of a warp.
__device__ inline int unit_of(int warp) { return warp * UNITS / CONSUMERS; }

// A lane's part of a row: of each unit of its warp one input.
template <typename T>
using Lane = T[MOST_UNITS];

// Whether the warp has a unit u; only the last may be missing.
__device__ inline bool has_unit(int me, int u) {
  if (UNITS % CONSUMERS == 0 || u < UNITS / CONSUMERS) return true;
  int warp = me / WARP;
  return u < unit_of(warp + 1) - unit_of(warp);
}
__device__ inline int lane_at(int me, int u) { return (unit_of(me / WARP) + u) * SPAN + me % WARP; }

template <int N>
__device__ inline void wait_for_stream(int me,
                                       const FloatWord* words,
                                       unsigned tag,
                                       Lane<float> (&x)[N]) {
  FloatWord w[N * MOST_UNITS];
  wait_for_words(w, tag, [&](int i) {
    int u = i % MOST_UNITS;
    return has_unit(me, u) ? poll(words + i / MOST_UNITS * C + lane_at(me, u))
                           : (FloatWord)tag << 32;
  });
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) x[n][u] = value_of(w[n * MOST_UNITS + u]);
}

struct Norm {
  Lane<elem_t> weight, bias;
  __device__ void load(int me, const elem_t* w, const elem_t* b) {
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) {
      int at = UNITS % CONSUMERS ? min(lane_at(me, u), C - 1) : lane_at(me, u);
      weight[u] = w[at];
      bias[u] = b[at];
    }
  }
};

// The warp's part of the normed rows to shared memory, rounded to ELEM as a norm by itself would
// be. Means and variances of parts are put together as in Chan, Golub, LeVeque, 1979.
template <int N>
__device__ inline void normalise(
    int me, const Lane<float> (&x)[N], const Norm& norm, float eps, unsigned room, int side) {
  int warp = me / WARP, lane = me % WARP;
  float mean[N], square[N], size = unit_of(warp + 1) - unit_of(warp);
#pragma unroll
  for (int n = 0; n < N; n++) {
    mean[n] = square[n] = 0.0f;
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++) mean[n] += has_unit(me, u) ? x[n][u] : 0.0f;
    mean[n] *= 1.0f / size;
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++)
      if (has_unit(me, u)) square[n] = fmaf(x[n][u] - mean[n], x[n][u] - mean[n], square[n]);
  }
#pragma unroll
  for (int offset = 1; offset < WARP; offset *= 2) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      float other = __shfl_xor_sync(FULL_MASK, mean[n], offset), apart = other - mean[n];
      square[n] += __shfl_xor_sync(FULL_MASK, square[n], offset);
      mean[n] = 0.5f * (mean[n] + other);
      square[n] = fmaf(apart * apart, 0.5f * size * offset, square[n]);
    }
  }
  if (lane == 0)
#pragma unroll
    for (int n = 0; n < N; n++)
      put8(room + MOMENTS<N>(side, n) + warp * 8,
           {__float_as_uint(mean[n]), __float_as_uint(square[n])});
  sync_consumers();
#pragma unroll
  for (int n = 0; n < N; n++) {
    float means[CONSUMERS], squares[CONSUMERS];
#pragma unroll
    for (int w = 0; w < CONSUMERS; w += 2) {
      uint4 two = get16(room + MOMENTS<N>(side, n) + w * 8);
      means[w] = __uint_as_float(two.x);
      squares[w] = __uint_as_float(two.y);
      means[w + 1] = __uint_as_float(two.z);
      squares[w + 1] = __uint_as_float(two.w);
    }
    float weighted[CONSUMERS];
#pragma unroll
    for (int w = 0; w < CONSUMERS; w++)
      weighted[w] = means[w] * ((unit_of(w + 1) - unit_of(w)) * (float)SPAN / C);
    float middle = sum_of(weighted);
#pragma unroll
    for (int w = 0; w < CONSUMERS; w++)
      squares[w] = fmaf((unit_of(w + 1) - unit_of(w)) * (float)SPAN,
                        (means[w] - middle) * (means[w] - middle), squares[w]);
    float inverse = rsqrtf(sum_of(squares) * (1.0f / C) + eps);
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++)
      if (has_unit(me, u))
        put2(room + (n * Room<N>::ROW + lane_at(me, u)) * 2,
             from_float<elem_t>(fmaf((x[n][u] - middle) * inverse, to_float(norm.weight[u]),
                                     to_float(norm.bias[u]))));
  }
  __syncwarp();
}

// The warp's part of rows of elements to shared memory, when they are there; of each row PARTS
// times C.
template <int N, int PARTS>
__device__ inline void wait_for_rows(int me, const ElemWord* words, unsigned tag, unsigned room) {
  constexpr int EACH = SPAN / 4;  // four words at a time, of a unit
  constexpr int ROUNDS = (PARTS * MOST_UNITS * EACH + WARP - 1) / WARP;
  int warp = me / WARP, first = unit_of(warp);
  int units = UNITS % CONSUMERS ? unit_of(warp + 1) - first : MOST_UNITS;
  auto index = [&](int i) { return i % ROUNDS * WARP + me % WARP; };
  auto inside = [&](int i) { return index(i) < PARTS * units * EACH; };
  auto place = [&](int i) {
    int at = min(index(i), PARTS * units * EACH - 1);
    return at / (units * EACH) * C + first * SPAN + at % (units * EACH) * 4;
  };
  uint4 w[N * ROUNDS];
  wait_for_words(w, tag,
                 [&](int i) { return poll_four(words + i / ROUNDS * PARTS * C + place(i)); });
#pragma unroll
  for (int i = 0; i < N * ROUNDS; i++)
    if (inside(i)) put8(room + (i / ROUNDS * Room<N>::ROW + place(i)) * 2, elements_of(w[i]));
  __syncwarp();
}

// ---------------------------------------------------------------------------------------------
// products

// Sums of one turn's outputs over the warp's part of K, to shared memory.
// Of the 16 rows of m16n8k16's left operand, eight are rows of weights at the inputs that a lane
// has in the first and third word of its load, and eight the same rows at those of the other two:
// so a load is an operand as it is. The right operand has of each row of x one column for either.
template <int N, int PARTS>
__device__ inline void multiply(
    int me, const Weights<N>& ring, At<N>& at, int outputs, unsigned room, int side) {
  int warp = me / WARP, lane = me % WARP, along = lane % 4, across = lane / 4;
  int first = unit_of(warp) * SPAN + along * 8;
  unsigned weights = first * 2;
  // Columns that are not there are copies: what they give is not used.
  unsigned column = room + (min(across / 2, N - 1) * Room<N>::ROW + first + across % 2 * 2) * 2;
  unsigned sums = room + SUMS<N>(side, warp, min(along, N - 1)) + across * 4;
  unsigned x[PARTS][MOST_UNITS][2];
#pragma unroll
  for (int p = 0; p < PARTS; p++)
#pragma unroll
    for (int u = 0; u < MOST_UNITS; u++)
      if (has_unit(me, u)) {
        x[p][u][0] = get4(column + (p * C + u * SPAN) * 2);
        x[p][u][1] = get4(column + (p * C + u * SPAN + 4) * 2);
      }
#pragma unroll 1
  for (int from = 0; from < outputs; from += TILE) {
    float d[2][4] = {};
    int row = min(across, outputs - from - 1);
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      ring.wait_full(at);
      unsigned w = ring.row(at, row) + weights;
#pragma unroll
      for (int u = 0; u < MOST_UNITS; u++)
        if (has_unit(me, u)) {
          uint4 a = get16(w + u * SPAN * 2);
          mma<elem_t>(d[u % 2], {a.x, a.y, a.z, a.w}, x[p][u][0], x[p][u][1]);
        }
      __syncwarp();
      if (lane == 0) ring.release(at);
      at.next();
    }
    if (along < N) put_float(sums + from * 4, (d[0][0] + d[1][0]) + (d[0][3] + d[1][3]));
  }
}

// Thread i writes output i % GROUP of row i / GROUP.
template <int N>
__device__ inline bool writes(int me, int count) {
  return me < N * GROUP && me % GROUP < count;
}
template <int N>
__device__ inline float sum_of_warps(int me, unsigned room, int side) {
  float sums[CONSUMERS];
#pragma unroll
  for (int w = 0; w < CONSUMERS; w++)
    sums[w] = get_float(room + SUMS<N>(side, w, 0) + me * 4);  // me = n GROUP + output
  return sum_of(sums);
}

// One product and what is done with its outputs, after x has been taken.
template <int N, int PARTS, typename bias_t, typename use_t>
__device__ inline void product(const Weights<N>& ring,
                               At<N>& at,
                               int& side,
                               unsigned room,
                               Share rows,
                               const bias_t* bias,
                               use_t use) {
#pragma unroll 1
  for (int from = 0; from < rows.count; from += GROUP) {
    int me = anew(threadIdx.x), count = min(GROUP, rows.count - from);
    int m = rows.first + from + me % GROUP;
    float own_bias = addend(bias, m, writes<N>(me, count));
    multiply<N, PARTS>(me, ring, at, count, room, side);
    sync_consumers();
    if (writes<N>(me, count)) use(me / GROUP, m, sum_of_warps<N>(me, room, side) + own_bias);
    side ^= 1;
  }
}

// ---------------------------------------------------------------------------------------------
// the step

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
  Share own = room.shares[PROJ];

  if (threadIdx.x / WARP == CONSUMERS) {
    Producer<STAGES<N>> producer = {ring};
    Share qkv = room.shares[QKV], inner = room.shares[FC];
    for (int l = 0; l < L; l++) {
      // The small things of a layer come to L2 before they are asked for.
      int lane = threadIdx.x % WARP;
      if (lane == 0) prefetch_l2(w.qkv_b + l * 3 * C + qkv.first, qkv.count * 2);
      if (lane == 1) prefetch_l2(w.proj_b + l * C + own.first, own.count * 4);
      if (lane == 2) prefetch_l2(w.fc_b + l * WIDE * C + inner.first, inner.count * 2);
      if (lane == 3) prefetch_l2(w.out_b + l * C + own.first, own.count * 4);
      if (l % gridDim.x == blockIdx.x) {
        if (lane == 4) prefetch_l2(w.ln1_w + l * C, C * 2);
        if (lane == 5) prefetch_l2(w.ln1_b + l * C, C * 2);
        if (lane == 6) prefetch_l2(w.ln2_w + l * C, C * 2);
        if (lane == 7) prefetch_l2(w.ln2_b + l * C, C * 2);
      }
      room.job.prefetch(k + l * layer_size, v + l * layer_size);
      producer.rows(w.qkv_w + (size_t)l * 3 * C * C, qkv, 1);
      producer.rows(w.proj_w + (size_t)l * C * C, own, 1);
      producer.rows(w.fc_w + (size_t)l * WIDE * C * C, inner, 1);
      producer.rows(w.out_w + (size_t)l * WIDE * C * C, own, WIDE);
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
  if (writes<N>(threadIdx.x, own.count))
    residual = embedding(threadIdx.x / GROUP, own.first + threadIdx.x % GROUP);

  At<N> at = {};
  int side = 0;
  auto take_normed = [&](const FloatWord* from, unsigned tag, bool first, const elem_t* weight,
                         const elem_t* bias) {
    int me = anew(threadIdx.x);
    Norm norm;
    norm.load(me, weight, bias);
    Lane<float> x[N];
    if (first) {
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int u = 0; u < MOST_UNITS; u++)
          x[n][u] = has_unit(me, u) ? embedding(n, lane_at(me, u)) : 0.0f;
    } else {
      wait_for_stream<N>(me, from, tag, x);
    }
    normalise<N>(me, x, norm, eps, base, side);
  };
#pragma unroll 1
  for (int l = 0; l < L; l++) {
    unsigned tag = epoch + l + 1;
    elem_t *layer_k = k + l * layer_size, *layer_v = v + l * layer_size;
    take_normed(words->end[0], tag - 1, l == 0, w.ln1_w + l * C, w.ln1_b + l * C);
    product<N, 1>(ring, at, side, base, room.shares[QKV], w.qkv_b + l * 3 * C,
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
    wait_for_rows<N, 1>(anew(threadIdx.x), words->attended[0], tag, base);
    product<N, 1>(
        ring, at, side, base, room.shares[PROJ], w.proj_b + l * C,
        [&](int n, int m, float y) { publish(&words->middle[n][m], residual += y, tag); });
    take_normed(words->middle[0], tag, false, w.ln2_w + l * C, w.ln2_b + l * C);
    product<N, 1>(
        ring, at, side, base, room.shares[FC], w.fc_b + l * WIDE * C,
        [&](int n, int m, float y) { publish(&words->inner[n][m], activate(y, activation), tag); });
    wait_for_rows<N, WIDE>(anew(threadIdx.x), words->inner[0], tag, base);
    product<N, WIDE>(
        ring, at, side, base, room.shares[OUT], w.out_b + l * C,
        [&](int n, int m, float y) { publish(&words->end[n][m], residual += y, tag); });
  }
  take_normed(words->end[0], epoch + L, false, lnf_w, lnf_b);
  product<N, 1>(ring, at, side, base, share_of(Vp), (const float*)nullptr,
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

DECODE_STEP_ENTRY(decode_step_1, 1)
DECODE_STEP_ENTRY(decode_step_2, 2)
DECODE_STEP_ENTRY(decode_step_4, 4)

#endif
