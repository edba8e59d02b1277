// Rotary position embedding: each pair of channels of a head turns by an angle that grows with the
// token's position.
//
//   y[i], y[j] = x[i] cos - x[j] sin, x[j] cos + x[i] sin      cos, sin = tables[position, pair]
//
// of pair p: i, j = p, p + R/2, or 2p, 2p + 1 where pairs are interleaved; channels from R on stay.
//
// Shapes    x, y [N, H, D], heads without gaps, a stride between tokens; cos, sin [P, R/2];
//           positions [N], or null for row n of the tables
// Dtypes    x, y ELEM; tables float: an angle of tens of thousands computed in float would be wrong
//           in the third digit. positions int; one outside the tables gives zeros
// Bytes     2 N H D sizeof ELEM; the tables' rows stay in cache over the heads
// Work      a thread per VEC pairs of one head: a piece of 16 bytes from either side, or two pieces
//           where pairs are interleaved; single pairs where the sizes are no multiples of that
// Source    Su et al., "RoFormer", 2021; interleaved pairs there, split ones in Llama
#include "common.cuh"

template <int VEC>
__device__ inline void rotate_pairs(const elem_t* x,
                                    elem_t* y,
                                    const float* cosines,
                                    const float* sines,
                                    bool inside,
                                    int pair,
                                    int half,
                                    bool interleaved) {
  // Where the pairs' two members are; interleaved ones are taken apart after loading.
  int first = interleaved ? 2 * pair : pair, second = interleaved ? 2 * pair + VEC : pair + half;
  float a[VEC], b[VEC], c[VEC], s[VEC], left[VEC], right[VEC];
  load_floats(x + first, a);
  load_floats(x + second, b);
#pragma unroll
  for (int i = 0; i < VEC; i++) {
    c[i] = inside ? cosines[pair + i] : 0.0f;
    s[i] = inside ? sines[pair + i] : 0.0f;
  }
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      float* from = 2 * i < VEC ? a : b;
      float* into = 2 * i < VEC ? left : right;
      if constexpr (VEC == 1) {  // the two members are a[0] and b[0]
        left[0] = a[0] * c[0] - b[0] * s[0];
        right[0] = b[0] * c[0] + a[0] * s[0];
      } else {
        float u = from[2 * i % VEC], v = from[2 * i % VEC + 1];
        into[2 * i % VEC] = u * c[i] - v * s[i];
        into[2 * i % VEC + 1] = v * c[i] + u * s[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      left[i] = a[i] * c[i] - b[i] * s[i];
      right[i] = b[i] * c[i] + a[i] * s[i];
    }
  }
  store_floats(y + first, left);
  store_floats(y + second, right);
}

template <int VEC>
__device__ inline void rope_heads(const elem_t* x,
                                  const float* cosines,
                                  const float* sines,
                                  const int* positions,
                                  elem_t* y,
                                  int interleaved,
                                  int N,
                                  int H,
                                  int D,
                                  int P,
                                  int half,
                                  int x_stride,
                                  int y_stride) {
  // Per head: `half` pairs and D - 2 half channels that stay.
  unsigned pairs = half / VEC, work = pairs + (D - 2 * half) / VEC;
  size_t index = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= (size_t)N * H * work) return;
  // Divisions of 64 bits take several times as long.
  size_t head = index >> 32 ? index / work : (unsigned)index / work;
  unsigned unit = (unsigned)(index - head * work);
  size_t token = head >> 32 ? head / H : (unsigned)head / (unsigned)H;
  size_t within = (head - token * H) * D;
  x += token * x_stride + within;
  y += token * y_stride + within;
  int position = positions ? positions[token] : (int)token;
  bool inside = position >= 0 && position < P;
  if (unit < pairs) {
    size_t row = inside ? (size_t)position * half : 0;
    rotate_pairs<VEC>(x, y, cosines + row, sines + row, inside, unit * VEC, half, interleaved);
  } else {
    float stays[VEC];
    int c = 2 * half + (unit - pairs) * VEC;
    load_floats(x + c, stays);
    if (!inside) {
#pragma unroll
      for (int i = 0; i < VEC; i++) stays[i] = 0.0f;
    }
    store_floats(y + c, stays);
  }
}

extern "C" __global__ void __launch_bounds__(256) rope(const elem_t* x,
                                                       const float* cosines,
                                                       const float* sines,
                                                       const int* positions,
                                                       elem_t* y,
                                                       int interleaved,
                                                       int N,
                                                       int H,
                                                       int D,
                                                       int P,
                                                       int half,
                                                       int x_stride,
                                                       int y_stride) {
  constexpr int VEC = WIDEST<elem_t>;
  if ((half | D | x_stride | y_stride) % VEC == 0)
    rope_heads<VEC>(x, cosines, sines, positions, y, interleaved, N, H, D, P, half, x_stride,
                    y_stride);
  else
    rope_heads<1>(x, cosines, sines, positions, y, interleaved, N, H, D, P, half, x_stride,
                  y_stride);
}
