// Where the room of the linear-time ranking lies, and its launches, for the CUDA runtime and for the emulator.
#pragma once

#include "cuda/block_kernels.cuh"
#include "cuda/sinkhorn_launch.cuh"

namespace aha {

// Whether the blocks are taken where nothing is asked for: the host knows neither the scores nor tau, and does not wait
// for them. Crossing points of an H100 at tau = .05 (bench/results/plans_cuda.md): the dense time goes with the entries
// of all matrices, three times faster in shared memory than beyond; the blocks' with the rounds of the multiprocessors.
constexpr int64_t BLOCKS_FROM = 256, BLOCKS_FROM_ENTRIES = 10'000'000, BLOCKS_FROM_ENTRIES_STREAMED = 2'000'000;
inline bool blocks_pay(int64_t batch, int64_t k) {
  const bool streamed = resident_plan(k, 16).columns == 0;
  return k >= BLOCKS_FROM && batch * k * k >= (streamed ? BLOCKS_FROM_ENTRIES_STREAMED : BLOCKS_FROM_ENTRIES);
}
// Scores from which on the CTAs of a cluster share an image.
constexpr int64_t SHARED_OUT_FROM = 4096;
constexpr int SHARED_OUT_RANKS = 8;  // the most that every card with clusters can have

struct BlockPlan {
  BlockLayout layout;
  int threads;
  int64_t shared_bytes;

  Shape shape(int64_t batch) const { return {batch * layout.ranks, threads, layout.ranks, shared_bytes}; }
  int64_t workspace_floats() const { return layout.bytes / 4; }  // of an image
};

// outputs: of the left factor, 1 where one vector reads out; shared_bytes: of a CTA, at most; ranks: CTAs of an image
inline BlockPlan block_plan(int64_t k, int64_t outputs, bool backward, int64_t shared_bytes, int ranks) {
  const BlockRoom room(k, outputs, backward);
  const int warps = static_cast<int>(std::clamp<int64_t>((k + WARP - 1) / WARP, 2, BLOCK_THREADS / WARP));
  const int64_t together = int64_t{STRETCH} * warps * ranks;
  const int tile_size = static_cast<int>(STRETCH * ((k + together - 1) / together));  // every warp has a tile
  const bool shared_room = ranks == 1 && room.hot_bytes <= shared_bytes;
  const int64_t hot = shared_room ? room.hot_bytes : 0;
  return {{room, ranks, tile_size, shared_room, room.cold_bytes + room.hot_bytes - hot}, warps * WARP, hot};
}

inline int block_ranks(int64_t k, bool clusters) { return clusters && k >= SHARED_OUT_FROM ? SHARED_OUT_RANKS : 1; }

template <typename Launch>
void run_blocks_forward(const BlockPlan& plan, const Ranking& p, const ForwardTensors& to, int64_t batch, const Launch& launch) {
  if (batch == 0) return;
  if (plan.layout.ranks == 1) launch(plan.shape(batch), blocks_forward<false>, p, to, plan.layout);
  else launch(plan.shape(batch), blocks_forward<true>, p, to, plan.layout);
}

template <typename Launch>
void run_blocks_backward(const BlockPlan& plan, const Ranking& p, const BackwardTensors& to, int64_t batch, const Launch& launch) {
  if (batch == 0) return;
  if (plan.layout.ranks == 1) launch(plan.shape(batch), blocks_backward<false>, p, to, plan.layout);
  else launch(plan.shape(batch), blocks_backward<true>, p, to, plan.layout);
}

}  // namespace aha
