// Gradients of layer norm and RMS norm.
//
//   with n = (x - mean) / sigma (layer norm) or x / sigma (RMS norm), g = dy weight:
//   dx      = (g - mean(g) - n mean(g n)) / sigma        without mean(g) for RMS norm
//   dweight = sum over rows of dy n
//   dbias   = sum over rows of dy
//
// Shapes    dy, x, dx [N, C], each with a stride of its own between rows; weight, dweight, dbias
//           [C] or null; stats [N, 2]: mean and 1 / sigma of each row; partials [G, 2, C]: sums
//           over the rows of a group
// Dtypes    ELEM, but for stats and partials, which are float
// Bytes     5 N C sizeof ELEM where a row stays in cache between passes: dy and x twice, dx
// Work      norm_backward_rows     a block per row, in passes; stores the row's statistics
//           norm_backward_groups   a block per 32 channels and group of rows
//           norm_backward_total    a thread per channel adds the groups, in order
//           No atomics: the same inputs give the same bits.
// Source    Ba, Kiros, Hinton, 2016; Zhang, Sennrich, 2019
#include "common.cuh"

// The sum over the block, the same in all threads.
__device__ inline float block_sum(float x, float* shared) {
  x = warp_sum(x);
  int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
  __syncthreads();
  if (lane == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  return warp_sum(lane < warps ? shared[lane] : 0.0f);
}

template <int VEC>
__device__ inline void backward_row(const elem_t* dy,
                                    const elem_t* x,
                                    const elem_t* weight,
                                    elem_t* dx,
                                    float* stats,
                                    float eps,
                                    int centred,
                                    int C,
                                    float* shared) {
  const int step = blockDim.x * VEC, first = threadIdx.x * VEC;
  float values[VEC], g[VEC], w[VEC];
  float mean = 0.0f;
  if (centred) {
    float sum = 0.0f;
    for (int c = first; c < C; c += step) {
      load_floats(x + c, values);
      sum += sum_of(values);
    }
    mean = block_sum(sum, shared) / C;
  }
  float squares = 0.0f;
  for (int c = first; c < C; c += step) {
    load_floats(x + c, values);
#pragma unroll
    for (int i = 0; i < VEC; i++) squares += (values[i] - mean) * (values[i] - mean);
  }
  float scale = rsqrtf(block_sum(squares, shared) / C + eps);
  if (threadIdx.x == 0) {
    stats[0] = mean;
    stats[1] = scale;
  }
  if (!dx) return;

  auto gradient = [&](int c) {
    load_floats(x + c, values);
    load_floats(dy + c, g);
    if (weight) {
      load_floats(weight + c, w);
#pragma unroll
      for (int i = 0; i < VEC; i++) g[i] = __fmul_rn(g[i], w[i]);  // as its mean has it: rounded
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = (values[i] - mean) * scale;
  };
  float sum = 0.0f, product = 0.0f;
  for (int c = first; c < C; c += step) {
    gradient(c);
    sum += sum_of(g);
#pragma unroll
    for (int i = 0; i < VEC; i++) product += g[i] * values[i];
  }
  float mean_g = centred ? block_sum(sum, shared) / C : 0.0f;
  float mean_gn = block_sum(product, shared) / C;
  for (int c = first; c < C; c += step) {
    gradient(c);
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] = (g[i] - mean_g - values[i] * mean_gn) * scale;
    store_floats(dx + c, values);
  }
}

extern "C" __global__ void __launch_bounds__(512) norm_backward_rows(const elem_t* dy,
                                                                     const elem_t* x,
                                                                     const elem_t* weight,
                                                                     elem_t* dx,
                                                                     float* stats,
                                                                     float eps,
                                                                     int centred,
                                                                     int C,
                                                                     int dy_stride,
                                                                     int x_stride,
                                                                     int dx_stride) {
  __shared__ float shared[WARP];
  size_t row = blockIdx.x;
  dy += row * dy_stride;
  x += row * x_stride;
  if (dx) dx += row * dx_stride;
  stats += 2 * row;
  if ((C | dy_stride | x_stride | dx_stride) % WIDEST<elem_t> == 0)
    backward_row<WIDEST<elem_t>>(dy, x, weight, dx, stats, eps, centred, C, shared);
  else
    backward_row<1>(dy, x, weight, dx, stats, eps, centred, C, shared);
}

constexpr int LANES = 8;  // rows that a block of norm_backward_groups reads at a time

extern "C" __global__ void __launch_bounds__(WARP* LANES) norm_backward_groups(const elem_t* dy,
                                                                               const elem_t* x,
                                                                               const float* stats,
                                                                               float* partials,
                                                                               int N,
                                                                               int C,
                                                                               int G,
                                                                               int dy_stride,
                                                                               int x_stride) {
  __shared__ float shared[2][LANES][WARP + 1];
  int c = blockIdx.x * WARP + threadIdx.x;
  int rows = (N + G - 1) / G, first = blockIdx.y * rows, last = min(first + rows, N);
  float weight = 0.0f, bias = 0.0f;
  if (c < C) {
    for (int row = first + threadIdx.y; row < last; row += LANES) {
      float g = to_float(dy[(size_t)row * dy_stride + c]);
      float mean = stats[2 * row], scale = stats[2 * row + 1];
      weight += g * (to_float(x[(size_t)row * x_stride + c]) - mean) * scale;
      bias += g;
    }
  }
  shared[0][threadIdx.y][threadIdx.x] = weight;
  shared[1][threadIdx.y][threadIdx.x] = bias;
  __syncthreads();
  if (threadIdx.y < 2 && c < C) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < LANES; i++) sum += shared[threadIdx.y][i][threadIdx.x];
    partials[((size_t)blockIdx.y * 2 + threadIdx.y) * C + c] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(256)
    norm_backward_total(const float* partials, elem_t* dweight, elem_t* dbias, int G, int C) {
  int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= C) return;
  float weight = 0.0f, bias = 0.0f;
  for (int group = 0; group < G; group++) {
    weight += partials[(size_t)group * 2 * C + c];
    bias += partials[((size_t)group * 2 + 1) * C + c];
  }
  if (dweight) dweight[c] = from_float<elem_t>(weight);
  if (dbias) dbias[c] = from_float<elem_t>(bias);
}
