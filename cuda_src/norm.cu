// Layer norm over the channels of each row, alone or with the residual addition before it.
//
//   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        var divides by C
//
// Shapes    x, residual [N, C]; weight, bias [C]; y [N, C]; all row-major and contiguous
// Dtypes    the residual stream is float, weight, bias and y are ELEM; x of add_layer_norm is ELEM
// Bytes     layer_norm       N C (4 + sizeof ELEM), parameters stay in cache
//           add_layer_norm   N C (8 + 2 sizeof ELEM)
// Work      one warp per row. The mean is computed before the squares, so that an outlier channel
//           in the thousands cancels nothing: a one-pass E[x^2] - E[x]^2 loses half the digits
//           there. A row of up to MOST float4 a lane is normalised in registers: loaded once, its
//           parameters before griddepcontrol.wait. A longer row, or one of an odd size, takes three
//           passes over memory.
// Source    Ba, Kiros, Hinton, "Layer Normalization", 2016
//
// The ladder
//   layer_norm_naive   one thread per row: the formula, for readers and for tests
//   layer_norm         one warp per row; in registers, or multi-pass (two of three passes hit L1)
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

// ---------------------------------------------------------------------------------------------
// in registers: rows of up to 128 STEPS channels, a multiple of 4

constexpr int MOST = 16;  // float4 of a lane: 2048 channels

// Call use(step, channel) for every float4 of the lane.
template <int STEPS, typename Use>
__device__ inline void each(int C, Use use) {
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    int c = (s * WARP + threadIdx.x % WARP) * 4;
    if (c < C) use(s, c);
  }
}

template <int STEPS, bool ADD>
__device__ inline void row_in_registers(const elem_t* x,
                                        float* residual,
                                        const elem_t* weight,
                                        const elem_t* bias,
                                        elem_t* y,
                                        float eps,
                                        int C) {
  // Both the row and the parameters fit the registers of the shorter one only.
  constexpr bool AHEAD = STEPS < MOST;
  Vec<elem_t, 4> w[STEPS], b[STEPS];
  auto load_parameters = [&](int s, int c) {
    w[s] = *reinterpret_cast<const Vec<elem_t, 4>*>(weight + c);
    b[s] = *reinterpret_cast<const Vec<elem_t, 4>*>(bias + c);
  };
  if constexpr (AHEAD) each<STEPS>(C, load_parameters);
  float share = 1.0f / C;
  griddepcontrol_wait();

  float values[STEPS][4] = {};
  each<STEPS>(C, [&](int s, int c) { load_floats(residual + c, values[s]); });
  if constexpr (ADD) {
    each<STEPS>(C, [&](int s, int c) {
      float addend[4];
      load_floats(x + c, addend);
#pragma unroll
      for (int i = 0; i < 4; i++) values[s][i] += addend[i];
    });
    each<STEPS>(C, [&](int s, int c) { store_floats(residual + c, values[s]); });
  }

  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < STEPS; s++)
    sum += (values[s][0] + values[s][1]) + (values[s][2] + values[s][3]);
  float mean = warp_sum(sum) * share, squares = 0.0f;
  each<STEPS>(C, [&](int s, int) {
#pragma unroll
    for (int i = 0; i < 4; i++) squares += (values[s][i] - mean) * (values[s][i] - mean);
  });
  float scale = rsqrtf(warp_sum(squares) * share + eps);
  each<STEPS>(C, [&](int s, int c) {
    if constexpr (!AHEAD) load_parameters(s, c);
#pragma unroll
    for (int i = 0; i < 4; i++)
      values[s][i] =
          (values[s][i] - mean) * scale * to_float(w[s].value[i]) + to_float(b[s].value[i]);
    store_floats(y + c, values[s]);
  });
}

// ---------------------------------------------------------------------------------------------
// multi-pass: any row

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

// residual += x. Each lane later reads only what it wrote itself.
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

template <int VEC, bool ADD>
__device__ inline void row_in_passes(const elem_t* x,
                                     float* residual,
                                     const elem_t* weight,
                                     const elem_t* bias,
                                     elem_t* y,
                                     float eps,
                                     int C) {
  griddepcontrol_wait();
  if constexpr (ADD) add_row<VEC>(x, residual, C);
  normalise_row<VEC>(residual, weight, bias, y, eps, C);
}

// y = layer_norm(residual), to which x is added first if ADD.
template <bool ADD>
__device__ inline void norm_rows(const elem_t* x,
                                 float* residual,
                                 const elem_t* weight,
                                 const elem_t* bias,
                                 elem_t* y,
                                 float eps,
                                 int N,
                                 int C) {
  griddepcontrol_launch_dependents();
  int row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
  if (row >= N) return;
  size_t start = (size_t)row * C;
  if constexpr (ADD) x += start;
  residual += start;
  y += start;
  if (C % 4)
    row_in_passes<1, ADD>(x, residual, weight, bias, y, eps, C);
  else if (C <= MOST / 2 * WARP * 4)
    row_in_registers<MOST / 2, ADD>(x, residual, weight, bias, y, eps, C);
  else if (C <= MOST * WARP * 4)
    row_in_registers<MOST, ADD>(x, residual, weight, bias, y, eps, C);
  else
    row_in_passes<4, ADD>(x, residual, weight, bias, y, eps, C);
}

extern "C" __global__ void __launch_bounds__(128) layer_norm(
    const float* x, const elem_t* weight, const elem_t* bias, elem_t* y, float eps, int N, int C) {
  // Not written without ADD.
  norm_rows<false>(nullptr, const_cast<float*>(x), weight, bias, y, eps, N, C);
}

extern "C" __global__ void __launch_bounds__(128) add_layer_norm(const elem_t* x,
                                                                 float* residual,
                                                                 const elem_t* weight,
                                                                 const elem_t* bias,
                                                                 elem_t* y,
                                                                 float eps,
                                                                 int N,
                                                                 int C) {
  norm_rows<true>(x, residual, weight, bias, y, eps, N, C);
}
