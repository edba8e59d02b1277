// Rows for the residual stream: the sum of token and position embedding, where it begins; and of
// packed prompts the last row of each, which is all that their last layer needs after attention.
//
//   embedding   x[n, c] = wte[ids[n], c] + wpe[positions[n], c]
//   last_rows   y[r] = x[starts[r + 1] - 1], out[r] = attended[starts[r + 1] - 1]
//
// Shapes    ids, positions [N] int; wte [Vp, C] and wpe [P, C] ELEM; x [N, C] float; attended
//           [N, C] ELEM; starts [R + 1] int; y [R, C] float; out [R, C] ELEM
// Bytes     embedding N C (4 + 2 sizeof ELEM); last_rows 2 R C (4 + sizeof ELEM)
// Work      one block per row, threads stride over the channels
//
// An id or position outside its table gives a row of zeros instead of a read out of bounds: idle
// rows of a decode batch run on past the context, and nothing reads them.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) embedding(const int* ids,
                                                            const int* positions,
                                                            const elem_t* wte,
                                                            const elem_t* wpe,
                                                            float* x,
                                                            int Vp,
                                                            int P,
                                                            int C) {
  griddepcontrol_launch_dependents();  // it does not wait itself: it must be launched the plain way
  int row = blockIdx.x;
  int id = ids[row], position = positions[row];
  bool inside = id >= 0 && id < Vp && position >= 0 && position < P;
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    float value = 0.0f;
    if (inside) value = to_float(wte[(size_t)id * C + c]) + to_float(wpe[(size_t)position * C + c]);
    x[(size_t)row * C + c] = value;
  }
}

extern "C" __global__ void __launch_bounds__(256) last_rows(
    const float* x, const elem_t* attended, const int* starts, float* y, elem_t* out, int C) {
  griddepcontrol_launch_dependents();
  // A sequence without tokens has the last row of another, and no row comes before the first.
  int row = blockIdx.x, from = max(starts[row + 1] - 1, 0);
  griddepcontrol_wait();
  for (int c = threadIdx.x; c < C; c += blockDim.x) {
    y[(size_t)row * C + c] = x[(size_t)from * C + c];
    out[(size_t)row * C + c] = attended[(size_t)from * C + c];
  }
}
