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
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
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

// The same value, which the compiler cannot make again from what it came from, in a loop, to save a register.
template <typename T>
__device__ __forceinline__ T held(T x) {
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(x));
  else asm volatile("" : "+r"(x));
  return x;
}

// Four floats at an address that is a multiple of 16 bytes.
__device__ __forceinline__ float4 load_four(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ void store_four(float* to, const float4& x) { *reinterpret_cast<float4*>(to) = x; }
__device__ __forceinline__ float2 load_two(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ void store_two(float* to, const float2& x) { *reinterpret_cast<float2*>(to) = x; }

// 1 / x of a normal x that is far from the ends of the range, to an ulp: without the branches of the division.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return fmaf(fmaf(-x, y, 1.0f), y, y);
}
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }
__device__ __forceinline__ int warp() { return threadIdx.x / WARP; }
__device__ __forceinline__ int warps() { return blockDim.x / WARP; }

// warp(), and the compiler knows that all lanes have the same.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(ALL_LANES, warp(), 0); }

// R sums over the warp side by side, so that they wait for each other's shuffles; every lane gets the same bits.
template <int R>
__device__ __forceinline__ void warp_sums(float (&x)[R]) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset /= 2)
#pragma unroll
    for (int r = 0; r < R; ++r) x[r] += __shfl_xor_sync(ALL_LANES, x[r], offset);
}

// R sums over the warp, each for some of the lanes: lane l gets that of x[sum_of(l)], as do those with the same l % R.
template <int R>
__device__ __forceinline__ int sum_of(int lane) {
  int index = 0;
#pragma unroll
  for (int bit = 1, half = R / 2; half; bit *= 2, half /= 2) index += lane & bit ? half : 0;
  return index;
}
// Lanes that differ in BIT share out the sums of 2 HALF numbers; a template, so that all are known to be registers.
template <int HALF, int BIT, int R>
__device__ __forceinline__ void share_out(float (&x)[R]) {
  if constexpr (HALF > 0) {
    const bool upper = lane() & BIT;
#pragma unroll
    for (int r = 0; r < HALF; ++r) {
      const float mine = upper ? x[r + HALF] : x[r], other = upper ? x[r] : x[r + HALF];
      x[r] = mine + __shfl_xor_sync(ALL_LANES, other, BIT);
    }
    share_out<HALF / 2, 2 * BIT>(x);
  }
}
template <int R>
__device__ __forceinline__ float scattered_sums(float (&x)[R]) {
  static_assert((R & (R - 1)) == 0);
  share_out<R / 2, 1>(x);
#pragma unroll
  for (int offset = R; offset < WARP; offset *= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], offset);
  return x[0];
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
