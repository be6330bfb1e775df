// The kernels of the linear-time ranking on CUDA.
#pragma once

#include "cuda/block_backward.cuh"
#include "cuda/block_forward.cuh"

namespace aha {

// What all images have alike; `bytes` of the workspace belong to an image, and hold what shared memory does not.
struct BlockLayout {
  BlockRoom room;
  int ranks, tile_size;
  bool shared_room;
  int64_t bytes;
};

template <bool CLUSTER, typename Work, typename Tensors>
__device__ __forceinline__ void run_blocks(const Ranking& p, const Tensors& to, const BlockLayout& layout) {
  AHA_DYNAMIC_SHARED(float4, block_room);
  const int ranks = CLUSTER ? layout.ranks : 1;
  const int64_t image = blockIdx.x / ranks;
  char *hot = reinterpret_cast<char*>(block_room), *cold = reinterpret_cast<char*>(to.workspace);
  cold += image * layout.bytes;
  if (CLUSTER || !layout.shared_room) hot = cold + layout.room.cold_bytes;
  const Crew<CLUSTER> crew{static_cast<int>(blockIdx.x % ranks), ranks};
  const Blocks<CLUSTER> blocks(p, layout.room, layout.tile_size, hot, cold, image, crew);
  Work(BlockSweeps<CLUSTER>(blocks), to).run();
}

template <bool CLUSTER>
__global__ void __launch_bounds__(BLOCK_THREADS, 1) blocks_forward(Ranking p, ForwardTensors to, BlockLayout layout) {
  run_blocks<CLUSTER, BlockForward<CLUSTER>>(p, to, layout);
}

template <bool CLUSTER>
__global__ void __launch_bounds__(BLOCK_THREADS, 1) blocks_backward(Ranking p, BackwardTensors to, BlockLayout layout) {
  run_blocks<CLUSTER, BlockBackward<CLUSTER>>(p, to, layout);
}

}  // namespace aha
