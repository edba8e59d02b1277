// Layer norm over the channels of each row.
//
//   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        var divides by C
//
// Shapes    x, y [N, C], each with a stride of its own between rows (but for layer_norm_naive,
//           whose rows follow each other); weight, bias [C] or null
// Dtypes    weight, bias and y are ELEM; x is ELEM, or float with the suffix _f32: the residual
//           stream of a model
// Bytes     N C (sizeof x + sizeof ELEM), parameters stay in cache
// Work      see norm_rows.cuh. With the residual addition before it: add_norm.cu, a file of its own
//           since a model that starts does not wait for it
// Source    Ba, Kiros, Hinton, "Layer Normalization", 2016
//
// The ladder
//   layer_norm_naive   one thread per row: the formula, for readers and for tests
//   layer_norm         a warp or a block per row, in registers
#include "float_elem.cuh"
#include "norm_rows.cuh"

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

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2) layer_norm(const elem_t* x,
                                                                         const elem_t* weight,
                                                                         const elem_t* bias,
                                                                         elem_t* y,
                                                                         float eps,
                                                                         int N,
                                                                         int C,
                                                                         int x_stride,
                                                                         int y_stride) {
  norm_rows<true, false, elem_t, elem_t>(
      {x, nullptr, nullptr, weight, bias, y, eps, N, C, x_stride, 0, 0, y_stride});
}

#if !ELEM_IS_FLOAT
extern "C" __global__ void __launch_bounds__(MOST_THREADS, WIDE_BLOCKS)
    layer_norm_f32(const float* x,
                   const elem_t* weight,
                   const elem_t* bias,
                   elem_t* y,
                   float eps,
                   int N,
                   int C,
                   int x_stride,
                   int y_stride) {
  norm_rows<true, false, float, float>(
      {x, nullptr, nullptr, weight, bias, y, eps, N, C, x_stride, 0, 0, y_stride});
}
#endif
