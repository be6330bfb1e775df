// What the kernels ask of the machine beyond CUDA C++: shared memory, clusters, sums over a warp.
// Free of torch. Compiled by g++ after tests/kernels/emulator/cuda_on_host.h, the kernels run on a CPU.
#pragma once

#include "aha_math.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
// `name` is the dynamic shared memory of the launch
#define AHA_DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#endif

namespace aha {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool HAS_CLUSTERS = false;
#else
constexpr bool HAS_CLUSTERS = true;
#endif

#ifdef __CUDACC__
__device__ __forceinline__ void cluster_sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// The address of what `own` is here, in the shared memory of another CTA of the cluster.
template <typename T>
__device__ __forceinline__ T* cluster_map(T* own, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
  return own;
#endif
}
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }
__device__ __forceinline__ int warps() { return blockDim.x / WARP; }

// R sums over the warp side by side, so that they wait for each other's shuffles; every lane gets the same bits.
template <int R>
__device__ __forceinline__ void warp_sums(float (&x)[R]) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset /= 2)
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] += __shfl_xor_sync(ALL_LANES, x[r], offset);
}

__device__ __forceinline__ float warp_sum(float x) {
  float sum[1] = {x};
  warp_sums(sum);
  return sum[0];
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
  return x;
}

}  // namespace aha
