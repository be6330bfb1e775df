// The linear-time ranking on CUDA: where the vectors of an image lie, and who works on it.
#pragma once

#include "blocks.h"
#include "cuda/sinkhorn.cuh"

namespace aha {

constexpr int BLOCK_THREADS = 512;  // of a CTA, at most; two warps at least
constexpr int BLOCK_TERMS = BlockExp<float>::TERMS;
constexpr int EACH = 2, STRETCH = WARP * EACH;          // elements of a lane, and of a warp, at a time
constexpr int MOMENTS = 12;                             // room for those of one vector, one more than TERMS are used
constexpr int MOST_SETS = 3;                            // of coefficients of a pair
constexpr int OUTPUTS_AT_ONCE = 32;                     // of the left factor, whose moments are kept side by side
constexpr int SMALLEST_BLOCK = 16;                      // rows, on average

// Bytes from where the first part of an image's room begins, which is HOT, or its second.
template <typename T, bool HOT>
struct BlockPlace {
  int64_t bytes;
};
template <typename T>
using Hot = BlockPlace<T, true>;
template <typename T>
using Cold = BlockPlace<T, false>;

// A pair as one of its blocks sees it: `from` is where the moments of the other's first tile lie, -1 where one of them
// has no room; tiles: how many the other has.
struct alignas(16) BlockPair {
  int block, other, from, tiles;
};

// Where the vectors of one image lie. Those of the first part are read and written by every iteration. An argument of the
// kernels, so that no address is kept in a register.
struct BlockRoom {
  Hot<BlockPair> pairs[2];
  Hot<float> coefficients;
  Hot<float> moment[2], number[2], scaling[2], z, y, g, before, mean;
  Hot<int> flags;  // iteration of the last scaling out of range, in turns of two; then whether a number is not finite

  Cold<double> c, potential[2], ranked, shift, block_mean[2], scale;
  Cold<int> order, best, counts, edge[2], lo[2], hi[2], slot[2], factor_at[2], pair_at[2], first_tile[2];
  Cold<int> tile_block[2], lonely[2];
  Cold<float> factors[2], steps[2], step_coefficients, rest;
  Cold<int> first_block, end_block, heaviest;  // of outputs: the blocks of rows that they weigh

  int64_t slots, factor_room;     // tiles of moments of a side, and factors
  int64_t hot_bytes, cold_bytes;

  // slots and factor_room: beyond what scores without heavy tails take (12 pairs a block).
  // outputs: of the left factor, 1 where one vector reads out
  BlockRoom(int64_t k, int64_t outputs, bool backward)
      : slots(64 + (k / 2 < 32768 ? k / 2 : 32768)), factor_room(20 * k), hot_bytes(0), cold_bytes(0) {
    const int64_t most[2] = {k / SMALLEST_BLOCK + 1, k}, own = backward ? k : 0;
    for (int side = 0; side < 2; ++side) {
      take(pairs[side], slots), take(moment[side], slots * 2 * MOMENTS);
      take(number[side], k), take(scaling[side], k);
    }
    take(z, own), take(y, own), take(g, own), take(before, own), take(mean, own);
    take(coefficients, slots * MOST_SETS * BLOCK_TERMS), take(flags, 4);
    take(potential[0], 2 * k);  // the keys of the sort lie there before
    potential[1] = {potential[0].bytes + k * 8};
    take(c, k), take(ranked, k), take(shift, slots), take(scale, 1);
    take(order, k), take(best, k), take(counts, 6);
    for (int side = 0; side < 2; ++side) {
      take(block_mean[side], most[side]);
      take(edge[side], most[side] + 1), take(lo[side], most[side]), take(hi[side], most[side]);
      take(slot[side], most[side]), take(factor_at[side], most[side]);
      take(pair_at[side], most[side]), take(lonely[side], most[side]);
      take(first_tile[side], most[side] + 1), take(tile_block[side], most[side] + k / STRETCH + 1);
      take(factors[side], factor_room);
      const bool wanted = outputs > 1 && (side == 0 || backward);
      take(steps[side], wanted ? OUTPUTS_AT_ONCE * slots * MOMENTS : 0);
    }
    take(step_coefficients, outputs > 1 ? OUTPUTS_AT_ONCE * slots * 2 * BLOCK_TERMS : 0);
    const int64_t with_rest = outputs > 1 ? outputs + 1 : 0;
    take(first_block, with_rest), take(end_block, with_rest);
    take(rest, with_rest ? k : 0), take(heaviest, with_rest ? k : 0);
  }

 private:
  template <typename T, bool HOT>
  void take(BlockPlace<T, HOT>& place, int64_t count) {
    int64_t& bytes = HOT ? hot_bytes : cold_bytes;
    place.bytes = bytes;
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
  }
};

// The CTAs that work on one image.
template <bool CLUSTER>
struct Crew {
  int rank, ranks;
  __device__ int thread() const { return rank * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return ranks * static_cast<int>(blockDim.x); }
  __device__ int warp() const { return rank * warps() + uniform_warp(); }
  __device__ int all_warps() const { return ranks * warps(); }
  __device__ void sync() const { CLUSTER ? cluster_sync() : __syncthreads(); }
};

}  // namespace aha
