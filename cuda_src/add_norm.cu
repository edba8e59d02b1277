// Layer norm over the channels of each row of a sum: the residual addition and the norm after it.
//
//   total = x + residual
//   y = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias        var divides by C
//
// Shapes    x, residual, total, y [N, C], each with a stride of its own between rows; weight,
//           bias [C] or null
// Dtypes    x, weight, bias and y are ELEM; residual and total are ELEM, or float with the suffix
//           _f32: the residual stream of a model
// Bytes     N C (2 sizeof residual + 2 sizeof ELEM), parameters stay in cache
// Work      see norm_rows.cuh; without the addition: norm.cu
// Source    Ba, Kiros, Hinton, "Layer Normalization", 2016
#include "float_elem.cuh"
#include "norm_rows.cuh"

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2) add_layer_norm(const elem_t* x,
                                                                             const elem_t* residual,
                                                                             elem_t* total,
                                                                             const elem_t* weight,
                                                                             const elem_t* bias,
                                                                             elem_t* y,
                                                                             float eps,
                                                                             int N,
                                                                             int C,
                                                                             int x_stride,
                                                                             int residual_stride,
                                                                             int total_stride,
                                                                             int y_stride) {
  norm_rows<true, true, elem_t, elem_t>({x, residual, total, weight, bias, y, eps, N, C, x_stride,
                                         residual_stride, total_stride, y_stride});
}

#if !ELEM_IS_FLOAT
extern "C" __global__ void __launch_bounds__(MOST_THREADS, WIDE_BLOCKS)
    add_layer_norm_f32(const elem_t* x,
                       const float* residual,
                       float* total,
                       const elem_t* weight,
                       const elem_t* bias,
                       elem_t* y,
                       float eps,
                       int N,
                       int C,
                       int x_stride,
                       int residual_stride,
                       int total_stride,
                       int y_stride) {
  norm_rows<true, true, elem_t, float>({x, residual, total, weight, bias, y, eps, N, C, x_stride,
                                        residual_stride, total_stride, y_stride});
}
#endif
