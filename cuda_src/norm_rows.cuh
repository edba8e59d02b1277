// Rows that are normalised: the body of norm.cu, add_norm.cu and rms_norm.cu.
//
//   layer norm   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias      var divides by C
//   RMS norm     y = x / sqrt(mean(x^2) + eps) * weight
//
// alone, or of total = x + residual, which is then written too, rounded as it is stored, and it is
// the rounded sum that is normalised.
//
// Work      a row has 1, 2, 4, 8 or 16 warps, each a stretch of it in pieces of 16 bytes of the
//           wider type, and lies in their registers as it is stored. One warp needs no barrier of
//           its block; several are sooner done with the few rows that leave the chip idle.
// Order     a lane adds up its pieces by a tree, then warps of a row, lane by lane, by the levels
//           of the same tree above those, then lanes by shuffles. So a row's bits follow from C
//           alone, and neither from the other rows nor from how many warps it has. The mean is
//           taken before the squares, so that an outlier channel in the thousands cancels
//           nothing: E[x^2] - E[x]^2 loses half the digits there.
// Overlap   before it waits for its predecessor, which may have written anything, the kernel only
//           asks for weight and bias to be brought to the L2 cache.
// Alignment a row is read in pieces if C and all strides are multiples of a piece, else by
//           elements.
#pragma once

#include "common.cuh"

// What the rows of one launch have in common. R is the type of the residual and of the sum.
template <typename X, typename R>
struct NormRows {
  const X* x;
  const R* residual;     // null: none is added
  R* total;              // where the sum goes
  const elem_t* weight;  // null: 1
  const elem_t* bias;    // null: 0
  elem_t* y;
  float eps;
  int N, C;
  int x_stride, residual_stride, total_stride, y_stride;  // elements from row to row
};

constexpr int MOST_THREADS = 512;  // of a block
// Channels that a lane keeps in registers, in pieces and one by one: with two blocks of so many
// threads it has 64 registers, and a multiprocessor warps enough to wait for memory.
constexpr int MOST_IN_PIECES = 32;
constexpr int MOST_SINGLE = 16;
constexpr int FEW_ROWS = 512;
// Of floats with parameters of 16 bits a lane keeps those too, and has 128 registers.
constexpr int WIDE_BLOCKS = sizeof(elem_t) < sizeof(float) ? 1 : 2;

// The sum over the warps of a row and their lanes, the same in all of them. Between two uses of
// `shared` there must be a sum by way of another.
template <int W>
__device__ inline float sum_of_warps(const float* lane) {
  float sums[W];
#pragma unroll
  for (int w = 0; w < W; w++) sums[w] = lane[w * WARP];
  return sum_of(sums);
}

__device__ inline float row_sum(float x, float* shared) {
  int threads = blockDim.x;
  if (threads > WARP) {
    shared[threadIdx.x] = x;
    __syncthreads();
    const float* lane = shared + threadIdx.x % WARP;
    x = threads == 2 * WARP   ? sum_of_warps<2>(lane)
        : threads == 4 * WARP ? sum_of_warps<4>(lane)
        : threads == 8 * WARP ? sum_of_warps<8>(lane)
                              : sum_of_warps<16>(lane);
  }
  return warp_sum(x);
}

template <int VEC>
__device__ inline void load_or(const elem_t* source, int c, float missing, float (&values)[VEC]) {
  if (source) {
    load_floats(source + c, values);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = missing;
  }
}

// x^-1/2. The hardware's is off by up to two units of the last place, of which a channel of
// thousands makes much; float gets a step of Newton's method, with the product's rounding error.
__device__ inline float one_over_root(float x) {
  float root = rsqrtf(x);
  if constexpr (sizeof(elem_t) == sizeof(float)) {
    float product = __fmul_rn(x, root), lost = fmaf(x, root, -product);
    float rest = fmaf(lost, root, fmaf(product, root, -1.0f));
    if (x > 0.0f && x < __int_as_float(0x7f800000)) root = fmaf(-0.5f * root, rest, root);
  }
  return root;
}

// Squares that no compiler merges with an addition: the same bits wherever they are summed.
template <int N>
__device__ inline float sum_of_squares(const float (&x)[N], float mean) {
  float squares[N];
#pragma unroll
  for (int i = 0; i < N; i++) squares[i] = __fmul_rn(x[i] - mean, x[i] - mean);
  return sum_of(squares);
}

// Calls use(s, channel) for each piece of a lane that is there.
template <int VEC, int S, typename Use>
__device__ inline void each_piece(int first, int C, Use use) {
#pragma unroll
  for (int s = 0; s < S; s++) {
    int c = first + s * WARP * VEC;
    if (c < C) use(s, c);
  }
}

// The compiler forgets what elements it took from a piece: it would keep them all, which takes
// twice the registers of the piece, to save an instruction each.
template <typename T, int VEC>
__device__ inline void keep_packed(Packed<T, VEC>& piece) {
  if constexpr (sizeof(T) == 2 && VEC > 1) {
#pragma unroll
    for (unsigned& word : piece.words) asm("" : "+r"(word));
  }
}

// A row of up to S pieces a lane, in registers.
template <int VEC, int S, bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void row_in_registers(const NormRows<X, R>& rows, float (*shared)[MOST_THREADS]) {
  // Pieces whose parameters registers have room for at once; and whether those of a row are loaded
  // with it, where there are few rows: many find them in the L1 cache, and wait for their own.
  constexpr int ROOM =
      VEC == 1 ? 4 : (sizeof(R) > sizeof(elem_t) ? 64 : 32) / (VEC * sizeof(elem_t));
  constexpr int AT_ONCE = ROOM < S ? ROOM : S;
  const bool ahead = AT_ONCE == S && (!CENTRED || rows.N <= FEW_ROWS);
  const int C = rows.C;
  const int first = (threadIdx.x / WARP * S * WARP + threadIdx.x % WARP) * VEC;
  int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows.N) return;  // a whole warp, or none of the block
  // As words: taken apart when it arrives, each would be waited for before the next is asked for.
  using Parameters = Packed<elem_t, VEC>;
  Parameters weight[AT_ONCE], bias[AT_ONCE];
  auto load_parameters = [&](int s, int c) {
    if (rows.weight) weight[s] = *reinterpret_cast<const Parameters*>(rows.weight + c);
    if (CENTRED && rows.bias) bias[s] = *reinterpret_cast<const Parameters*>(rows.bias + c);
  };
  if (blockIdx.x == 0)  // for all
    each_piece<VEC, S>(first, C, [&](int, int c) {
      if (rows.weight) prefetch_to_l2(rows.weight + c);
      if (CENTRED && rows.bias) prefetch_to_l2(rows.bias + c);
    });
  const float share = 1.0f / C;
  const bool weighted = rows.weight, biased = CENTRED && rows.bias;
  griddepcontrol_wait();

  const X* x = rows.x + (size_t)row * rows.x_stride;
  Packed<R, VEC> held[S];  // what is normalised
  if constexpr (ADD) {
    const R* residual = rows.residual + (size_t)row * rows.residual_stride;
    R* total = rows.total + (size_t)row * rows.total_stride;
    constexpr int TWO_AT_ONCE = S < 4 || VEC == 1 ? S : 4;
#pragma unroll
    for (int some = 0; some < S; some += TWO_AT_ONCE) {
      const int start = first + some * WARP * VEC;
      Vec<X, VEC> addend[TWO_AT_ONCE];
      each_piece<VEC, TWO_AT_ONCE>(start, C, [&](int s, int c) {
        addend[s] = *reinterpret_cast<const Vec<X, VEC>*>(x + c);
        held[some + s] = *reinterpret_cast<const Packed<R, VEC>*>(residual + c);
      });
      each_piece<VEC, TWO_AT_ONCE>(start, C, [&](int s, int c) {
        float sum[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] = to_float(addend[s].value[i]) + held[some + s][i];
        store_floats(reinterpret_cast<R*>(&held[some + s]), sum);
        *reinterpret_cast<Packed<R, VEC>*>(total + c) = held[some + s];
      });
    }
  } else {
    each_piece<VEC, S>(
        first, C, [&](int s, int c) { held[s] = *reinterpret_cast<const Packed<R, VEC>*>(x + c); });
  }

  if constexpr (AT_ONCE == S)
    if (ahead) each_piece<VEC, S>(first, C, load_parameters);

  float values[VEC], sums[S] = {}, mean = 0.0f;
  auto unpack = [&](int s) {
    keep_packed(held[s]);
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = held[s][i];
  };
  if constexpr (CENTRED) {
    each_piece<VEC, S>(first, C, [&](int s, int) {
      unpack(s);
      sums[s] = sum_of(values);
    });
    mean = row_sum(sum_of(sums), shared[0]) * share;
  }
  each_piece<VEC, S>(first, C, [&](int s, int) {
    unpack(s);
    sums[s] = sum_of_squares(values, mean);
  });
  float scale = one_over_root(fmaf(row_sum(sum_of(sums), shared[1]), share, rows.eps));
  elem_t* y = rows.y + (size_t)row * rows.y_stride;
#pragma unroll
  for (int some = 0; some < S; some += AT_ONCE) {
    // Together: a load behind a store would wait for it, which may have written the same.
    const int start = first + some * WARP * VEC;
    if (!ahead) each_piece<VEC, AT_ONCE>(start, C, load_parameters);
    each_piece<VEC, AT_ONCE>(start, C, [&](int s, int c) {
      unpack(some + s);
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        float w = weighted ? weight[s][i] : 1.0f;
        float b = biased ? bias[s][i] : 0.0f;
        float n = (values[i] - mean) * scale;
        values[i] = CENTRED ? fmaf(n, w, b) : n * w;
      }
      store_floats(y + c, values);
    });
  }
}

// What is normalised of a piece: x, or the sum, which is stored on the way.
template <int VEC, bool ADD, typename X, typename R>
__device__ inline void take_piece(
    const X* x, const R* residual, R* total, int c, float (&values)[VEC]) {
  load_floats(x + c, values);
  if constexpr (ADD) {
    float addend[VEC];
    load_floats(residual + c, addend);
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = to_float(from_float<R>(values[i] + addend[i]));
    store_floats(total + c, values);
  }
}

// A row of any width, read once for each sum and once more: again from a cache, mostly.
template <int VEC, bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void row_in_passes(const NormRows<X, R>& rows,
                                     float* shared,
                                     float* shared_again) {
  const int C = rows.C, step = blockDim.x * VEC, first = threadIdx.x * VEC;
  const int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows.N) return;
  griddepcontrol_wait();
  const X* x = rows.x + (size_t)row * rows.x_stride;
  const R* residual = ADD ? rows.residual + (size_t)row * rows.residual_stride : nullptr;
  R* total = ADD ? rows.total + (size_t)row * rows.total_stride : nullptr;
  elem_t* y = rows.y + (size_t)row * rows.y_stride;

  float values[VEC], sum = 0.0f, squares = 0.0f, mean = 0.0f;
  for (int c = first; c < C; c += step) {
    take_piece<VEC, ADD>(x, residual, total, c, values);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      sum += values[i];
      squares += values[i] * values[i];
    }
  }
  // From here on a thread reads what it wrote itself.
  auto again = [&](int c) {
    if constexpr (ADD)
      load_floats(total + c, values);
    else
      load_floats(x + c, values);
  };
  if constexpr (CENTRED) {
    mean = row_sum(sum, shared) / C;
    squares = 0.0f;
    for (int c = first; c < C; c += step) {
      again(c);
#pragma unroll
      for (int i = 0; i < VEC; i++) squares += (values[i] - mean) * (values[i] - mean);
    }
  }
  float scale = one_over_root(row_sum(squares, shared_again) / C + rows.eps);
  for (int c = first; c < C; c += step) {
    float w[VEC], b[VEC];
    again(c);
    load_or(rows.weight, c, 1.0f, w);
    load_or(CENTRED ? rows.bias : nullptr, c, 0.0f, b);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      float y = (values[i] - mean) * scale * w[i];
      values[i] = CENTRED ? y + b[i] : y;
    }
    store_floats(y + c, values);
  }
}

// Rows whose pieces are VEC elements.
template <int VEC, bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void rows_of_pieces(const NormRows<X, R>& rows, float (*shared)[MOST_THREADS]) {
  int pieces = (rows.C / VEC + blockDim.x - 1) / blockDim.x;  // of a lane
  constexpr int MOST = VEC > 1 ? MOST_IN_PIECES / VEC : MOST_SINGLE;
  if constexpr (VEC > 1)
    if (pieces <= 2) return row_in_registers<VEC, 2, CENTRED, ADD>(rows, shared);
  if constexpr (MOST == 8)
    if (pieces <= 4) return row_in_registers<VEC, 4, CENTRED, ADD>(rows, shared);
  if (pieces <= MOST)
    row_in_registers<VEC, MOST, CENTRED, ADD>(rows, shared);
  else
    row_in_passes<VEC, CENTRED, ADD>(rows, shared[0], shared[1]);
}

template <bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void norm_rows(const NormRows<X, R>& rows) {
  __shared__ float shared[2][MOST_THREADS];
  constexpr int WIDE = sizeof(X) > sizeof(elem_t) || (ADD && sizeof(R) > sizeof(elem_t))
                           ? WIDEST<float>
                           : WIDEST<elem_t>;
  griddepcontrol_launch_dependents();
  int strides = rows.x_stride | rows.y_stride;
  if constexpr (ADD) strides |= rows.residual_stride | rows.total_stride;
  if ((rows.C | strides) % WIDE == 0)
    rows_of_pieces<WIDE, CENTRED, ADD>(rows, shared);
  else
    rows_of_pieces<1, CENTRED, ADD>(rows, shared);
}
