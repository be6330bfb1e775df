// Which layout a size gets, and the launches of each operator in order. `launch(Shape, kernel, arguments...)` is the
// CUDA runtime's in sinkhorn.cu and the emulator's in the tests: both run what is written here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/sinkhorn.cuh"

namespace aha {

struct Shape {
  int64_t blocks;
  int threads, cluster;
  int64_t shared_bytes;
};

constexpr int64_t MAX_BLOCKS = 0x7fffffff;
constexpr int STREAMED_THREADS = 256, STREAMED_ROWS = 32;

// ranks: CTAs that share a matrix; columns: of a lane in the resident sweep, 0 where X is streamed
struct Plan {
  int ranks, columns, threads;

  Shape shape(int64_t batch, int64_t k, bool backward) const {
    const int64_t warps = threads / WARP, wide = int64_t{WARP} * columns;
    const int64_t floats = columns ? shared_floats(k, ranks, wide, warps, backward) : warps * TILE;
    return {batch * ranks, threads, columns ? ranks : 1, floats * 4};
  }
  int64_t workspace_floats(int64_t k, bool backward) const { return columns ? 0 : streamed_floats(k, ranks, backward); }
};

inline Plan streamed_plan(int64_t k) {
  return {static_cast<int>(band_rows(k, STREAMED_ROWS)), 0, STREAMED_THREADS};
}

// Resident in `ranks` CTAs, or streamed where a lane cannot hold its columns.
inline Plan resident_plan(int64_t k, int ranks) {
  const int wanted = static_cast<int>(std::min<int64_t>((k + WARP - 1) / WARP, 1000));
  for (const int columns : {2, 4, 7, 13, 25})
    if (wanted <= columns && (ranks == 1 ? columns <= 7 : columns >= 7))
      return {ranks, columns, resident_threads(columns)};
  return streamed_plan(k);
}

// Regions from which on an image may get more CTAs than its memory asks for, and the rows each must have then: four for
// every warp, as many as the sweep takes at a time.
constexpr int64_t SPLIT_REGIONS = 4 * WARP + 1, SPLIT_ROWS = 32;

// The fewest CTAs whose shared memory holds X, or more where `processors`, multiprocessors for every image of the batch,
// would be idle; fits(plan) says whether the device can run that plan at all.
template <typename Fits>
Plan choose_plan(int64_t k, bool backward, int64_t shared_bytes, int64_t processors, const Fits& fits) {
  Plan best = streamed_plan(k);
  for (int ranks = 1; ranks <= 16; ranks *= 2) {
    const bool enough = best.columns != 0, split = k >= SPLIT_REGIONS && band_rows(k, ranks) >= SPLIT_ROWS;
    if (enough && (ranks > processors || !split)) break;
    const Plan plan = resident_plan(k, ranks);
    if (plan.columns && plan.shape(1, k, backward).shared_bytes <= shared_bytes && fits(plan)) best = plan;
    else if (enough) break;
  }
  return best;
}

// f.operator()<CLUSTER, N>() for a resident plan.
template <typename F>
void with_columns(const Plan& plan, const F& f) {
  if (plan.ranks == 1) {
    if (plan.columns == 2) return f.template operator()<false, 2>();
    if (plan.columns == 4) return f.template operator()<false, 4>();
    return f.template operator()<false, 7>();
  }
  if (plan.columns == 7) return f.template operator()<true, 7>();
  if (plan.columns == 13) return f.template operator()<true, 13>();
  return f.template operator()<true, 25>();
}

// Groups of columns of the streamed kernels.
inline Shape by_columns(int64_t batch, int k) {
  return {batch * ((k + STREAMED_THREADS - 1) / STREAMED_THREADS), STREAMED_THREADS, 1, 0};
}

template <typename Launch>
void run_forward(const Plan& plan, const Ranking& p, const ForwardTensors& to, int64_t batch, const Launch& launch) {
  if (batch == 0) return;  // an empty grid is a launch error
  const Shape by_rows = plan.shape(batch, p.k, false);
  if (plan.columns) {
    with_columns(plan, [&]<bool CLUSTER, int N>() {
      launch(by_rows, resident_forward<CLUSTER, N>, p, to, plan.ranks);
    });
    return;
  }
  for (int t = 0; t <= p.iterations; ++t) {
    launch(by_rows, streamed_forward_rows, p, to, plan.ranks, t);
    launch(by_columns(batch, p.k), streamed_forward_columns, p, to, plan.ranks, t);
  }
  const int64_t items = batch * p.steps * ((p.k + TILE - 1) / TILE);
  const Shape by_steps{std::min(items, MAX_BLOCKS), by_rows.threads, 1, by_rows.shared_bytes};
  if (p.readout != Readout::left) launch(by_rows, streamed_forward_rows, p, to, plan.ranks, p.iterations + 1);
  else if (items) launch(by_steps, streamed_forward_left, p, to, plan.ranks, items);
}

template <typename Launch>
void run_backward(const Plan& plan, const Ranking& p, const BackwardTensors& to, int64_t batch, const Launch& launch) {
  if (batch == 0) return;
  const Shape by_rows = plan.shape(batch, p.k, true);
  if (plan.columns) {
    with_columns(plan, [&]<bool CLUSTER, int N>() {
      launch(by_rows, resident_backward<CLUSTER, N>, p, to, plan.ranks);
    });
    return;
  }
  for (int t = p.iterations + 2; t >= 1; --t) {
    if (t != p.iterations + 1) launch(by_rows, streamed_backward_rows, p, to, plan.ranks, t);
    launch(by_rows, streamed_backward_tiles, p, to, plan.ranks, t);
    launch(by_columns(batch, p.k), streamed_backward_columns, p, to, plan.ranks, t);
  }
  if (to.grad_tau) launch(Shape{batch, WARP, 1, 0}, streamed_backward_tau, p, to, plan.ranks);
}

template <typename Launch>
void run_masks(const float* permutation, const float* left, float* out, int64_t batch, int k, int steps,
               const Launch& launch) {
  const int64_t items = batch * steps * ((k + TILE - 1) / TILE);
  const Shape shape{std::min(items, MAX_BLOCKS), STREAMED_THREADS, 1, STREAMED_THREADS / WARP * TILE * 4};
  if (items) launch(shape, masks_forward, permutation, left, out, k, steps, items);
}

template <typename Launch>
void run_masks_backward(const float* grad, const float* left, float* out, int64_t batch, int k, int steps,
                        const Launch& launch) {
  const int64_t items = batch * k, warps = STREAMED_THREADS / WARP;
  const Shape shape{std::min((items + warps - 1) / warps, MAX_BLOCKS), STREAMED_THREADS, 1, 0};
  if (items) launch(shape, masks_backward, grad, left, out, k, steps, items);
}

}  // namespace aha
