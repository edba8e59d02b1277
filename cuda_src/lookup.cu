// Rows of a table: y[n] = table[ids[n]], an embedding alone.
//
// Shapes    ids [N]; table [V, C]; y [N, C] with a stride between rows
// Dtypes    table and y ELEM; ids int, or 64 bits with the suffix _i64. An id outside the table
//           gives zeros
// Bytes     2 N C sizeof ELEM + N sizeof id
// Work      a block per row, copied in pieces of 16 bytes, or by elements where C or the stride is
//           no multiple of a piece
#include "common.cuh"

template <int VEC>
__device__ inline void copy_row(const elem_t* row, elem_t* y, int C) {
  for (int c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
    Vec<elem_t, VEC> values;
    if (row) {
      values = *reinterpret_cast<const Vec<elem_t, VEC>*>(row + c);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; i++) values.value[i] = from_float<elem_t>(0.0f);
    }
    *reinterpret_cast<Vec<elem_t, VEC>*>(y + c) = values;
  }
}

template <typename Id>
__device__ inline void lookup_row(
    const Id* ids, const elem_t* table, elem_t* y, int V, int C, int y_stride) {
  Id id = ids[blockIdx.x];
  const elem_t* row = id >= 0 && id < V ? table + (size_t)id * C : nullptr;
  y += (size_t)blockIdx.x * y_stride;
  if ((C | y_stride) % WIDEST<elem_t> == 0)
    copy_row<WIDEST<elem_t>>(row, y, C);
  else
    copy_row<1>(row, y, C);
}

extern "C" __global__ void __launch_bounds__(256)
    lookup(const int* ids, const elem_t* table, elem_t* y, int V, int C, int y_stride) {
  lookup_row(ids, table, y, V, C, y_stride);
}

extern "C" __global__ void __launch_bounds__(256)
    lookup_i64(const long long* ids, const elem_t* table, elem_t* y, int V, int C, int y_stride) {
  lookup_row(ids, table, y, V, C, y_stride);
}
