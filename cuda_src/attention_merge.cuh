// Merging the softmax states of the warps and blocks that share a query of decode attention.
#pragma once

#include "dsmem.cuh"
#include "softmax_state.cuh"

#ifndef HS
#define HS 64
#endif

constexpr int SPLIT = 8;  // blocks of the largest cluster

// COUNT states in shared memory. Outputs are stored 16 bytes at a time; COUNT is even.
template <int COUNT>
struct alignas(16) SoftmaxStates {
  float m[COUNT], l[COUNT], o[COUNT][HS];
};

// States that the other blocks of a cluster store in the first.
struct ClusterStates {
  SoftmaxStates<SPLIT> states;
  Mbarrier arrived;
};

// Prepare for them; all threads of all blocks, before anything is sent.
__device__ inline void open_cluster_states(ClusterStates& cluster, int block) {
  if (block == 0 && threadIdx.x == 0) {
    mbarrier_init(shared_address(&cluster.arrived), 1);
    mbarrier_init_fence();
  }
  cluster_arrive();
}

constexpr unsigned STATE_BYTES = (HS + 2) * sizeof(float);  // of one block

// Send one channel of this block's state to the first block.
__device__ inline void send_state(
    const ClusterStates& cluster, int block, int channel, float m, float l, float o) {
  const SoftmaxStates<SPLIT>& states = cluster.states;
  dsmem_store(&states.o[block][channel], &cluster.arrived, 0, o);
  if (channel == 0) {
    dsmem_store(&states.m[block], &cluster.arrived, 0, m);
    dsmem_store(&states.l[block], &cluster.arrived, 0, l);
  }
}

// Merge one channel of the states of `count` blocks into that of the first, which calls it.
__device__ inline void merge_cluster(
    const ClusterStates& cluster, int count, int channel, float& m, float& l, float& o) {
  mbarrier_wait_cluster(shared_address(&cluster.arrived), 0);
  float ms[SPLIT], ls[SPLIT], os[SPLIT];
  ms[0] = m;
  ls[0] = l;
  os[0] = o;
#pragma unroll
  for (int b = 1; b < SPLIT; b++) {
    bool there = b < count;
    ms[b] = there ? cluster.states.m[b] : LOWEST;
    ls[b] = there ? cluster.states.l[b] : 0.0f;
    os[b] = there ? cluster.states.o[b][channel] : 0.0f;
  }
  merge(ms, ls, os, m, l, o);
}

// Merge the states of all warps of `count` blocks and write the head's output. All threads call it,
// after a barrier. `count` is 1 where blocks do not share a query.
template <int WARPS, bool CLUSTERED>
__device__ inline void write_output(const SoftmaxStates<WARPS>& warps,
                                    ClusterStates& cluster,
                                    int block,
                                    int count,
                                    bool idle,
                                    elem_t* out) {
  if constexpr (CLUSTERED)
    if (count > 1) {
      cluster_wait();  // the first block is prepared
      if (block == 0 && threadIdx.x == 0)
        mbarrier_arrive_expect_tx(shared_address(&cluster.arrived), (count - 1) * STATE_BYTES);
    }
  for (int channel = threadIdx.x; channel < HS; channel += WARPS * WARP) {
    float ms[WARPS], ls[WARPS], os[WARPS], m, l, o;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      ms[w] = warps.m[w];
      ls[w] = warps.l[w];
      os[w] = warps.o[w][channel];
    }
    merge(ms, ls, os, m, l, o);
    if constexpr (CLUSTERED)
      if (count > 1) {
        if (block > 0) {
          send_state(cluster, block, channel, m, l, o);
          continue;
        }
        merge_cluster(cluster, count, channel, m, l, o);
      }
    out[channel] = from_float<elem_t>(idle ? 0.0f : __fdividef(o, l));
  }
}
