// Layer norm over the channels of each row, alone or with the residual addition before it.
//
//   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        var divides by C
//
// Shapes    x, residual [N, C]; weight, bias [C]; y [N, C]; all row-major and contiguous
// Dtypes    the residual stream is float, weight, bias and y are ELEM; x of add_layer_norm is ELEM
// Bytes     layer_norm       N C (4 + sizeof ELEM), parameters stay in cache
//           add_layer_norm   N C (8 + 2 sizeof ELEM)
// Work      one warp per row. The mean is taken before the squares, so that an outlier channel in
//           the thousands cancels nothing: a one-pass E[x^2] - E[x]^2 loses half the digits there.
// Source    Ba, Kiros, Hinton, "Layer Normalization", 2016
//
// The ladder
//   layer_norm_naive   one thread per row: the formula, for readers and for tests
//   layer_norm         one warp per row, float4 loads, three passes of which two hit L1
#include "common.cuh"

extern "C" __global__ void layer_norm_naive(
    const float* x, const elem_t* weight, const elem_t* bias, elem_t* y, float eps, int N, int C) {
  int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= N) return;
  x += (size_t)row * C;
  y += (size_t)row * C;
  float mean = 0.0f;
  for (int c = 0; c < C; c++) mean += x[c];
  mean /= C;
  float variance = 0.0f;
  for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
  float scale = rsqrtf(variance / C + eps);
  for (int c = 0; c < C; c++)
    y[c] = from_float<elem_t>((x[c] - mean) * scale * to_float(weight[c]) + to_float(bias[c]));
}

// Normalise one row with one warp. VEC channels per access; C must be a multiple of VEC.
template <int VEC>
__device__ inline void normalise_row(
    const float* x, const elem_t* weight, const elem_t* bias, elem_t* y, float eps, int C) {
  int lane = threadIdx.x % WARP;
  float values[VEC], w[VEC], b[VEC];

  float sum = 0.0f;
  for (int c = lane * VEC; c < C; c += WARP * VEC) {
    load_floats(x + c, values);
#pragma unroll
    for (int i = 0; i < VEC; i++) sum += values[i];
  }
  float mean = warp_sum(sum) / C;

  float squares = 0.0f;
  for (int c = lane * VEC; c < C; c += WARP * VEC) {
    load_floats(x + c, values);
#pragma unroll
    for (int i = 0; i < VEC; i++) squares += (values[i] - mean) * (values[i] - mean);
  }
  float scale = rsqrtf(warp_sum(squares) / C + eps);

  for (int c = lane * VEC; c < C; c += WARP * VEC) {
    load_floats(x + c, values);
    load_floats(weight + c, w);
    load_floats(bias + c, b);
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = (values[i] - mean) * scale * w[i] + b[i];
    store_floats(y + c, values);
  }
}

extern "C" __global__ void layer_norm(
    const float* x, const elem_t* weight, const elem_t* bias, elem_t* y, float eps, int N, int C) {
  release_dependents();
  wait_for_inputs();
  int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (row >= N) return;
  size_t start = (size_t)row * C;
  if (C % 4 == 0)
    normalise_row<4>(x + start, weight, bias, y + start, eps, C);
  else
    normalise_row<1>(x + start, weight, bias, y + start, eps, C);
}

// residual += x, then y = layer_norm(residual). Each lane later re-reads only what it wrote itself.
template <int VEC>
__device__ inline void add_row(const elem_t* x, float* residual, int C) {
  float values[VEC], addend[VEC];
  for (int c = (threadIdx.x % WARP) * VEC; c < C; c += WARP * VEC) {
    load_floats(residual + c, values);
    load_floats(x + c, addend);
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] += addend[i];
    store_floats(residual + c, values);
  }
}

extern "C" __global__ void add_layer_norm(const elem_t* x,
                                          float* residual,
                                          const elem_t* weight,
                                          const elem_t* bias,
                                          elem_t* y,
                                          float eps,
                                          int N,
                                          int C) {
  int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (row >= N) return;
  size_t start = (size_t)row * C;
  if (C % 4 == 0) {
    add_row<4>(x + start, residual + start, C);
    normalise_row<4>(residual + start, weight, bias, y + start, eps, C);
  } else {
    add_row<1>(x + start, residual + start, C);
    normalise_row<1>(residual + start, weight, bias, y + start, eps, C);
  }
}
