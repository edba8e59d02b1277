// Sum of token and position embedding: where the residual stream begins.
//
//   x[n, c] = wte[ids[n], c] + wpe[positions[n], c]
//
// Shapes    ids, positions [N] int; wte [Vp, C] and wpe [P, C] ELEM; x [N, C] float
// Bytes     N C (4 + 2 sizeof ELEM)
// Work      one block per row, threads stride over the channels
//
// An id or position outside its table gives a row of zeros instead of a read out of bounds: idle
// rows of a decode batch run on past the context, and nothing reads them.
#include "common.cuh"

extern "C" __global__ void embedding(const int* ids,
                                     const int* positions,
                                     const elem_t* wte,
                                     const elem_t* wpe,
                                     float* x,
                                     int Vp,
                                     int P,
                                     int C) {
  release_dependents();  // it does not wait itself: it must be launched the plain way
  int row = blockIdx.x;
  int id = ids[row], position = positions[row];
  bool inside = id >= 0 && id < Vp && position >= 0 && position < P;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    float value = 0.0f;
    if (inside) value = to_float(wte[(size_t)id * C + c]) + to_float(wpe[(size_t)position * C + c]);
    x[(size_t)row * C + c] = value;
  }
}
