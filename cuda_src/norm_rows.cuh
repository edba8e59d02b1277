// Rows that are normalised: the body of norm.cu and rms_norm.cu.
//
//   layer norm   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias      var divides by C
//   RMS norm     y = x / sqrt(mean(x^2) + eps) * weight
//
// alone, or of total = x + residual, which is then written too, rounded as it is stored, and it is
// the rounded sum that is normalised.
//
// Work      the threads along x of a block share a row, in pieces of 16 bytes of the wider type;
//           narrow rows have a warp each, several to a block (along y). How many threads share a
//           row follows from C alone, so that the order of a row's additions does not depend on
//           the other rows. Where there are more rows than blocks at once, a block goes from row
//           to row, and the next is loaded while this one is summed. The mean is taken before the
//           squares, so that an outlier channel in the thousands cancels nothing: E[x^2] - E[x]^2
//           loses half the digits there. Where a block has one row, weight and bias are loaded
//           before the kernel waits for its predecessor.
// Alignment a row is read in pieces if C and all strides are multiples of a piece, else by
// elements.
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

__device__ inline float sum_of(float4 x) { return (x.x + x.y) + (x.z + x.w); }

// The sum over the threads of a row, the same in all of them. Between two uses of `shared` there
// must be a sum by way of another.
__device__ inline float row_sum(float x, float* shared) {
  x = warp_sum(x);
  int warps = blockDim.x / WARP;
  if (warps == 1) return x;
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  if (threadIdx.x < WARP && threadIdx.x >= warps) shared[threadIdx.x] = 0.0f;
  __syncthreads();
  // Every thread adds all: shuffles would take several times as long.
  const float4* sums = reinterpret_cast<const float4*>(shared);
  float sum = sum_of(sums[0]) + sum_of(sums[1]);
  if (warps > 8) sum += sum_of(sums[2]) + sum_of(sums[3]);
  if (warps > 16) sum += (sum_of(sums[4]) + sum_of(sums[5])) + (sum_of(sums[6]) + sum_of(sums[7]));
  return sum;
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

// Rows of up to S pieces a thread. With MANY rows a block, registers hold the next row while this
// one is summed, and parameters come from the L1 cache; otherwise registers hold the parameters.
template <int VEC, int S, bool MANY, bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void rows_in_registers(const NormRows<X, R>& rows, float (*shared)[WARP]) {
  const int C = rows.C, step = blockDim.x * VEC, first = threadIdx.x * VEC;
  int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows.N) return;  // a whole warp, or none of the block
  Vec<elem_t, VEC> weight[S], bias[S];
  auto load_parameters = [&](int s, int c) {
    if (rows.weight) weight[s] = *reinterpret_cast<const Vec<elem_t, VEC>*>(rows.weight + c);
    if (CENTRED && rows.bias) bias[s] = *reinterpret_cast<const Vec<elem_t, VEC>*>(rows.bias + c);
  };
  if constexpr (!MANY) {
#pragma unroll
    for (int s = 0; s < S; s++)
      if (first + s * step < C) load_parameters(s, first + s * step);
  }
  const float share = 1.0f / C;
  const bool weighted = rows.weight, biased = CENTRED && rows.bias;
  Vec<X, VEC> x[S];
  Vec<R, VEC> residual[ADD ? S : 1];
  auto load = [&](int from) {
#pragma unroll
    for (int s = 0; s < S; s++) {
      int c = first + s * step;
      if (c >= C) continue;
      x[s] = *reinterpret_cast<const Vec<X, VEC>*>(rows.x + (size_t)from * rows.x_stride + c);
      if constexpr (ADD)
        residual[s] = *reinterpret_cast<const Vec<R, VEC>*>(
            rows.residual + (size_t)from * rows.residual_stride + c);
    }
  };
  griddepcontrol_wait();

  load(row);
  for (int turn = 0;; turn ^= 1) {
    float values[S][VEC];
#pragma unroll
    for (int s = 0; s < S; s++) {
      int c = first + s * step;
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        values[s][i] = c < C ? to_float(x[s].value[i]) : 0.0f;
        if constexpr (ADD)
          if (c < C)
            values[s][i] = to_float(from_float<R>(values[s][i] + to_float(residual[s].value[i])));
      }
      if constexpr (ADD)
        if (c < C) store_floats(rows.total + (size_t)row * rows.total_stride + c, values[s]);
    }
    int next = row + gridDim.x * blockDim.y;
    float mean = 0.0f, part = 0.0f;
    if constexpr (CENTRED) {
#pragma unroll
      for (int s = 0; s < S; s++) part += sum_of(values[s]);
      mean = row_sum(part, shared[0]) * share;
      part = 0.0f;
    }
    if constexpr (MANY)
      if (next < rows.N) load(next);
#pragma unroll
    for (int s = 0; s < S; s++)
      if (!CENTRED || first + s * step < C) part += sum_of_squares(values[s], mean);
    float scale = one_over_root(fmaf(row_sum(part, shared[CENTRED ? 1 : turn]), share, rows.eps));
#pragma unroll
    for (int s = 0; s < S; s++) {
      int c = first + s * step;
      if (c >= C) continue;
      if constexpr (MANY) load_parameters(s, c);
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        float w = weighted ? to_float(weight[s].value[i]) : 1.0f;
        float b = biased ? to_float(bias[s].value[i]) : 0.0f;
        float n = (values[s][i] - mean) * scale;
        values[s][i] = CENTRED ? fmaf(n, w, b) : n * w;
      }
      store_floats(rows.y + (size_t)row * rows.y_stride + c, values[s]);
    }
    if (!MANY || next >= rows.N) return;
    row = next;
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
                                     int row,
                                     float* shared,
                                     float* shared_again) {
  const int C = rows.C, step = blockDim.x * VEC, first = threadIdx.x * VEC;
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

template <int VEC, bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void rows_in_passes(const NormRows<X, R>& rows, float (*shared)[WARP]) {
  griddepcontrol_wait();
  int turn = 0;
  // Rows of a warp each are met here too, where their stride keeps them from being read in pieces.
  int first = blockIdx.x * blockDim.y + threadIdx.y;
  for (int row = first; row < rows.N; row += gridDim.x * blockDim.y, turn ^= 1)
    row_in_passes<VEC, CENTRED, ADD>(rows, row, shared[0], shared[CENTRED ? 1 : turn]);
}

template <bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void norm_rows(const NormRows<X, R>& rows) {
  __shared__ alignas(16) float shared[2][WARP];
  constexpr int WIDE = sizeof(X) > sizeof(elem_t) || (ADD && sizeof(R) > sizeof(elem_t))
                           ? WIDEST<float>
                           : WIDEST<elem_t>;
  griddepcontrol_launch_dependents();
  int strides = rows.x_stride | rows.y_stride;
  if constexpr (ADD) strides |= rows.residual_stride | rows.total_stride;
  if ((rows.C | strides) % WIDE == 0) {
    if (rows.C / WIDE > 2 * (int)blockDim.x)
      rows_in_passes<WIDE, CENTRED, ADD>(rows, shared);
    else if (!ADD && rows.N > gridDim.x * blockDim.y)
      rows_in_registers<WIDE, 2, true, CENTRED, ADD>(rows, shared);
    else
      rows_in_registers<WIDE, 2, false, CENTRED, ADD>(rows, shared);
  } else if (rows.C <= 4 * (int)blockDim.x) {
    rows_in_registers<1, 4, !ADD, CENTRED, ADD>(rows, shared);
  } else {
    rows_in_passes<1, CENTRED, ADD>(rows, shared);
  }
}
