// RMS norm over the channels of each row, alone or with the residual addition before it.
//
//   y = x / sqrt(mean(x^2) + eps) * weight
//
// Shapes    x, residual, total, y [N, C], each with a stride of its own between rows; weight [C]
//           or null
// Dtypes    weight and y are ELEM; x is ELEM, or float with the suffix _f32. x of add_rms_norm is
//           ELEM, and residual and total are ELEM, or float with the suffix
// Bytes     rms_norm       N C (sizeof x + sizeof ELEM), the weight stays in cache
//           add_rms_norm   N C (2 sizeof residual + 2 sizeof ELEM)
// Work      see norm_rows.cuh
// Source    Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019
#include "float_elem.cuh"
#include "norm_rows.cuh"

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2) rms_norm(const elem_t* x,
                                                                       const elem_t* weight,
                                                                       elem_t* y,
                                                                       float eps,
                                                                       int N,
                                                                       int C,
                                                                       int x_stride,
                                                                       int y_stride) {
  norm_rows<false, false, elem_t, elem_t>(
      {x, nullptr, nullptr, weight, nullptr, y, eps, N, C, x_stride, 0, 0, y_stride});
}

#if !ELEM_IS_FLOAT
extern "C" __global__ void __launch_bounds__(MOST_THREADS, WIDE_BLOCKS)
    rms_norm_f32(const float* x,
                 const elem_t* weight,
                 elem_t* y,
                 float eps,
                 int N,
                 int C,
                 int x_stride,
                 int y_stride) {
  norm_rows<false, false, float, float>(
      {x, nullptr, nullptr, weight, nullptr, y, eps, N, C, x_stride, 0, 0, y_stride});
}
#endif

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2) add_rms_norm(const elem_t* x,
                                                                           const elem_t* residual,
                                                                           elem_t* total,
                                                                           const elem_t* weight,
                                                                           elem_t* y,
                                                                           float eps,
                                                                           int N,
                                                                           int C,
                                                                           int x_stride,
                                                                           int residual_stride,
                                                                           int total_stride,
                                                                           int y_stride) {
  norm_rows<false, true, elem_t, elem_t>({x, residual, total, weight, nullptr, y, eps, N, C,
                                          x_stride, residual_stride, total_stride, y_stride});
}

#if !ELEM_IS_FLOAT
extern "C" __global__ void __launch_bounds__(MOST_THREADS, WIDE_BLOCKS)
    add_rms_norm_f32(const elem_t* x,
                     const float* residual,
                     float* total,
                     const elem_t* weight,
                     elem_t* y,
                     float eps,
                     int N,
                     int C,
                     int x_stride,
                     int residual_stride,
                     int total_stride,
                     int y_stride) {
  norm_rows<false, true, elem_t, float>({x, residual, total, weight, nullptr, y, eps, N, C,
                                         x_stride, residual_stride, total_stride, y_stride});
}
#endif
