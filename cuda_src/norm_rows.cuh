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
//           the other rows. A row of up to four pieces a thread is loaded once and stays in
//           registers. The mean is taken before the squares, so that an outlier channel in the
//           thousands cancels nothing: E[x^2] - E[x]^2 loses half the digits there.
//           Where they fit, weight and bias are loaded before the kernel waits for its predecessor.
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

// The sum over the threads of a row, the same in all of them; `shared` is used by no other sum.
__device__ inline float row_sum(float x, float* shared) {
  x = warp_sum(x);
  int warps = blockDim.x / WARP;
  if (warps == 1) return x;
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  int lane = threadIdx.x % WARP;
  return warp_sum(lane < warps ? shared[lane] : 0.0f);
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

// A row of up to S pieces a thread.
template <int VEC, int S, bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void row_in_registers(const NormRows<X, R>& rows,
                                        int row,
                                        float (*shared)[WARP]) {
  constexpr bool AHEAD = S <= 2 || VEC == 1;  // the parameters fit into registers beside the row
  const int C = rows.C, step = blockDim.x * VEC, first = threadIdx.x * VEC;
  Vec<elem_t, VEC> weight[AHEAD ? S : 1], bias[AHEAD ? S : 1];
  if constexpr (AHEAD) {
#pragma unroll
    for (int s = 0; s < S; s++) {
      int c = first + s * step;
      if (c >= C) continue;
      if (rows.weight) weight[s] = *reinterpret_cast<const Vec<elem_t, VEC>*>(rows.weight + c);
      if (CENTRED && rows.bias) bias[s] = *reinterpret_cast<const Vec<elem_t, VEC>*>(rows.bias + c);
    }
  }
  const X* x = rows.x + (size_t)row * rows.x_stride;
  const R* residual = ADD ? rows.residual + (size_t)row * rows.residual_stride : nullptr;
  R* total = ADD ? rows.total + (size_t)row * rows.total_stride : nullptr;
  elem_t* y = rows.y + (size_t)row * rows.y_stride;
  wait_for_inputs();

  float values[S][VEC] = {};
#pragma unroll
  for (int s = 0; s < S; s++) {
    int c = first + s * step;
    if (c < C) take_piece<VEC, ADD>(x, residual, total, c, values[s]);
  }
  float mean = 0.0f, part = 0.0f;
  if constexpr (CENTRED) {
#pragma unroll
    for (int s = 0; s < S; s++) part += sum_of(values[s]);
    mean = row_sum(part, shared[0]) / C;
    part = 0.0f;
  }
#pragma unroll
  for (int s = 0; s < S; s++) {
    float squares[VEC];
#pragma unroll
    for (int i = 0; i < VEC; i++) squares[i] = (values[s][i] - mean) * (values[s][i] - mean);
    if (!CENTRED || first + s * step < C) part += sum_of(squares);
  }
  float scale = rsqrtf(row_sum(part, shared[1]) / C + rows.eps);
#pragma unroll
  for (int s = 0; s < S; s++) {
    int c = first + s * step;
    if (c >= C) continue;
    float w[VEC], b[VEC];
    if constexpr (AHEAD) {
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        w[i] = rows.weight ? to_float(weight[s].value[i]) : 1.0f;
        b[i] = CENTRED && rows.bias ? to_float(bias[s].value[i]) : 0.0f;
      }
    } else {
      load_or(rows.weight, c, 1.0f, w);
      load_or(CENTRED ? rows.bias : nullptr, c, 0.0f, b);
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      float y = (values[s][i] - mean) * scale * w[i];
      values[s][i] = CENTRED ? y + b[i] : y;
    }
    store_floats(y + c, values[s]);
  }
}

// A row of any width, read once for each sum and once more: again from a cache, mostly.
template <int VEC, bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void row_in_passes(const NormRows<X, R>& rows, int row, float (*shared)[WARP]) {
  const int C = rows.C, step = blockDim.x * VEC, first = threadIdx.x * VEC;
  const X* x = rows.x + (size_t)row * rows.x_stride;
  const R* residual = ADD ? rows.residual + (size_t)row * rows.residual_stride : nullptr;
  R* total = ADD ? rows.total + (size_t)row * rows.total_stride : nullptr;
  elem_t* y = rows.y + (size_t)row * rows.y_stride;
  wait_for_inputs();

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
    mean = row_sum(sum, shared[0]) / C;
    squares = 0.0f;
    for (int c = first; c < C; c += step) {
      again(c);
#pragma unroll
      for (int i = 0; i < VEC; i++) squares += (values[i] - mean) * (values[i] - mean);
    }
  }
  float scale = rsqrtf(row_sum(squares, shared[1]) / C + rows.eps);
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

template <bool CENTRED, bool ADD, typename X, typename R>
__device__ inline void norm_rows(const NormRows<X, R>& rows) {
  __shared__ float shared[2][WARP];
  constexpr int WIDE = sizeof(X) > sizeof(elem_t) || (ADD && sizeof(R) > sizeof(elem_t))
                           ? WIDEST<float>
                           : WIDEST<elem_t>;
  release_dependents();
  int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows.N) return;  // a whole warp, or none of the block
  int strides = rows.x_stride | rows.y_stride;
  if constexpr (ADD) strides |= rows.residual_stride | rows.total_stride;
  if ((rows.C | strides) % WIDE == 0) {
    int pieces = rows.C / WIDE;
    if (pieces <= 2 * (int)blockDim.x)
      row_in_registers<WIDE, 2, CENTRED, ADD>(rows, row, shared);
    else if (pieces <= 4 * (int)blockDim.x)
      row_in_registers<WIDE, 4, CENTRED, ADD>(rows, row, shared);
    else
      row_in_passes<WIDE, CENTRED, ADD>(rows, row, shared);
  } else if (rows.C <= 4 * (int)blockDim.x) {
    row_in_registers<1, 4, CENTRED, ADD>(rows, row, shared);
  } else {
    row_in_passes<1, CENTRED, ADD>(rows, row, shared);
  }
}
